"""The tenants file goes wrong while the server runs: the old tenants stay, and the log says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from server.tenants.keys import hash_of
from tests.attacks.conftest import KEYS, TENANTS, Running

PINS = 'pinned = ["globex-one"]\n[[tenants.globex.keys]]'


@pytest.fixture(scope="module")
def changing(start: Callable[..., Running]) -> Running:
    return start()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tenants.acme", "it is no TOML"),
        (TENANTS.replace('id = "one"', "weight = 1"), "tenants.acme.keys[0].weight: Extra inputs"),
        ("", "tenants: Field required"),
        (TENANTS.replace(hash_of(KEYS["globex"]), hash_of(KEYS["acme"])), "a key has one owner"),
    ],
)
def test_broken_file_is_named_in_the_log_and_the_old_tenants_stay(
    changing: Running, text: str, says: str
) -> None:
    changing.tenants.write_text(text)
    changing.hang_up()
    assert changing.said(says)
    changing.assert_well()
    answer = changing.admin().post("/v1/tenants/reload")
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_removed_file_keeps_the_old_tenants(changing: Running) -> None:
    changing.tenants.unlink()
    changing.hang_up()
    assert changing.said("it cannot be read (No such file or directory)")
    changing.assert_well()


def test_key_that_was_taken_away_is_refused_from_the_next_request_on(changing: Running) -> None:
    changing.tenants.write_text(TENANTS.partition("[tenants.globex]")[0])
    changing.hang_up()
    assert changing.said("knows 1 tenants and 1 keys")
    assert changing.client("globex").get("/v1/models").status_code == 401
    assert changing.client("acme").get("/v1/models").status_code == 200
    changing.tenants.write_text(TENANTS)
    assert changing.admin().post("/v1/tenants/reload").status_code == 200
    changing.assert_well()


def test_variant_that_a_tenant_pins_is_loaded_unasked_and_an_unknown_one_refused(
    changing: Running,
) -> None:
    changing.tenants.write_text(TENANTS.replace("[[tenants.globex.keys]]", PINS, 1))
    assert changing.admin().post("/v1/tenants/reload").status_code == 200
    assert changing.said("variant globex-one is ready")
    deltas = {d["id"]: d for d in changing.admin().get("/v1/deltas").json()["data"]}
    assert (deltas["globex-one"]["pinned"], deltas["acme-one"]["pinned"]) == (True, False)
    changing.tenants.write_text(changing.tenants.read_text().replace("globex-one", "globex-two"))
    answer = changing.admin().post("/v1/tenants/reload")
    assert answer.status_code == 400
    assert "tenant globex pins globex-two, and no variant" in answer.json()["error"]["message"]
    changing.tenants.write_text(TENANTS)
    assert changing.admin().post("/v1/tenants/reload").status_code == 200
