"""Aliases over HTTP: requests by them, who sees them, and what operators do with them."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.server.api.fake import BASE
from tests.server.api.tenancy import TENANTS, Tenancy, bearer, completion

ADMIN = bearer("admin")


@pytest.fixture
def tenancy(tmp_path):
    made = Tenancy(tmp_path)
    made.path.write_text(TENANTS.replace('["alpha", ', '["alpha", "prod", "prod:*", '))
    made.app.state.api.directory.reload()
    return made


async def put(tenancy, name, status=200, **body):
    answer = await tenancy.call_admin("PUT", f"/v1/aliases/{name}", headers=ADMIN, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def ask(tenancy, model, who="acme", **fields):
    return await tenancy.call(
        "POST", "/v1/completions", headers=bearer(who), json=completion(model, **fields)
    )


async def test_request_by_an_alias_is_its_targets_under_the_aliass_name(tenancy):
    await put(tenancy, "prod:eu", model="beta")
    answer = await ask(tenancy, "prod:eu")  # acme may not use beta by its own name
    assert (answer.status_code, answer.json()["model"]) == (200, "prod:eu")
    assert answer.json()["choices"][0]["text"].startswith("B")
    assert answer.headers["x-impart-delta"] == "b" * 64
    assert (await ask(tenancy, "beta")).status_code == 404
    tokenized = await tenancy.call(
        "POST", "/tokenize", headers=bearer("acme"), json={"model": "prod:eu", "prompt": "x"}
    )
    assert tokenized.status_code == 200
    assert (await ask(tenancy, "prod:eu", who="globex")).status_code == 404


async def test_swap_counts_from_the_next_request_on_and_rolls_back(tenancy):
    await put(tenancy, "prod", model="alpha")
    await put(tenancy, "prod", model=f"beta@{'b' * 8}")
    assert (await ask(tenancy, "prod")).json()["choices"][0]["text"].startswith("B")
    answer = await tenancy.call_admin("POST", "/v1/aliases/prod/rollback", headers=ADMIN)
    assert answer.json()["targets"] == [{"model": "alpha", "weight": 1.0}]
    assert len(answer.json()["history"]) == 3
    assert (await ask(tenancy, "prod")).json()["choices"][0]["text"].startswith("A")


async def test_canary_is_the_same_for_a_user_and_shared_by_weight(tenancy):
    targets = [{"model": "alpha", "weight": 3}, {"model": "beta", "weight": 1}]
    await put(tenancy, "prod", targets=targets)
    counts = Counter()
    for user in map(str, range(60)):
        texts = {
            (await ask(tenancy, "prod", user=user)).json()["choices"][0]["text"][0]
            for _ in range(2)
        }
        assert len(texts) == 1
        counts.update(texts)
    assert 30 <= counts["A"] < 60
    without_user = {(await ask(tenancy, "prod")).json()["choices"][0]["text"][0] for _ in range(9)}
    assert len(without_user) == 1  # the same key


@pytest.mark.parametrize("model", [f"alpha@{'a' * 8}", f"{BASE}:alpha@sha256:{'a' * 64}"])
async def test_version_by_its_digest_is_served_while_the_bytes_are_these(tenancy, model):
    answer = await ask(tenancy, model)
    assert (answer.status_code, answer.json()["model"]) == (200, "alpha")
    assert (await ask(tenancy, f"alpha@{'b' * 8}")).status_code == 404
    assert (await ask(tenancy, f"beta@{'b' * 8}")).status_code == 404
    assert (await ask(tenancy, f"{BASE}@{'b' * 8}")).status_code == 404


async def test_listing_shows_aliases_to_who_may_use_them(tenancy):
    await put(tenancy, "prod", model="alpha")
    await put(tenancy, "other", model="alpha")
    names = {}
    for who in ("acme", "globex"):
        listed = await tenancy.call("GET", "/v1/models", headers=bearer(who))
        names[who] = {entry["id"] for entry in listed.json()["data"]}
    assert names == {"acme": {BASE, "alpha", "prod"}, "globex": {"beta", "broken"}}
    entry = await tenancy.call("GET", "/v1/models/prod", headers=bearer("acme"))
    assert (entry.json()["id"], entry.json()["digest"]) == ("prod", "a" * 64)
    assert (
        await tenancy.call("GET", "/v1/models/other", headers=bearer("acme"))
    ).status_code == 404


async def test_alias_of_what_is_broken_names_only_itself(tenancy):
    await put(tenancy, "prod", model="broken")
    answer = await ask(tenancy, "prod")
    assert answer.status_code == 424
    assert "broken" not in answer.text
    assert "`prod` stands for cannot be served" in answer.json()["error"]["message"]


async def test_mistakes_of_operators_are_named(tenancy):
    await put(tenancy, "alpha", 409, model="beta")
    await put(tenancy, "prod", 400, model="nobody")
    await put(tenancy, "prod", 400, model="alpha", targets=[{"model": "alpha"}])
    await put(tenancy, "prod", 400)
    await put(tenancy, "prod", 400, targets=[])
    await put(tenancy, "prod", 400, targets=[{"model": "alpha", "weight": 0}])
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rollback")):
        answer = await tenancy.call_admin(method, f"/v1/aliases/none{path}", headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "name")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "/prod"),
        ("PUT", "/prod"),
        ("DELETE", "/prod"),
        ("POST", "/prod/rollback"),
    ],
)
async def test_tenants_may_not_touch_aliases(tenancy, method, path):
    answer = await tenancy.call(method, f"/v1/aliases{path}", headers=bearer("acme"), json={})
    assert answer.status_code == 403


async def test_variant_cannot_take_the_name_of_an_alias(tmp_path):
    tenancy = Tenancy(tmp_path, state_dir=tmp_path / "state")
    await put(tenancy, "prod", model="alpha")
    answer = await tenancy.call_admin("PUT", "/v1/deltas/prod", headers=ADMIN, content=b"x")
    assert answer.status_code == 409
    assert "`prod` is an alias" in answer.json()["error"]["message"]
