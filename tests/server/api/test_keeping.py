"""What operators have pinned: kept, carried out at the start, and beside the tenants' pins."""

from __future__ import annotations

import pytest

from server.api.keeping import apply_documents
from server.errors import ConfigError, StateUnwritable
from server.fleet.store import FleetStore
from tests.server.api.tenancy import TENANTS, Tenancy, bearer, tenants_file

PINNED = TENANTS.replace("weight = 2\n", 'weight = 2\npinned = ["alpha"]\n')


@pytest.fixture
def tenancy(tmp_path):
    made = Tenancy(tmp_path)
    tenants_file(tmp_path, PINNED)
    made.app.state.api.directory.reload()
    return made


async def act(tenancy: Tenancy, path: str):
    return await tenancy.call_admin("POST", f"/v1/deltas/{path}", headers=bearer("admin"))


async def test_pin_is_kept_beside_the_tenants_and_applied_at_the_next_start(tenancy, tmp_path):
    fleet = tenancy.app.state.api.fleet
    for _ in range(2):
        assert (await act(tenancy, "beta/pin")).json()["pinned_by_admin"] is True
    assert tenancy.engine.pinned == [{"acme": ["alpha"], "": ["beta"]}]
    assert len(fleet.history("variant", "beta")) == 1
    again = Tenancy(tmp_path, fleet=fleet)
    await apply_documents(again.app.state.api)
    assert again.engine.pinned == [{"": ["beta"]}]  # its tenants pin nothing
    assert (await act(tenancy, "beta/unpin")).json()["pinned_by_admin"] is False
    assert tenancy.engine.pinned[-1] == {"acme": ["alpha"]}


async def test_pin_keeps_what_else_its_document_says(tenancy):
    fleet = tenancy.app.state.api.fleet
    document = {"source": "hub:a/b", "revision": "r", "ttl_s": 60.0, "registered_at": 5.0}
    fleet.put("variant", "beta", document | {"pinned": False})
    await act(tenancy, "beta/pin")
    assert fleet.get("variant", "beta") == document | {"pinned": True}
    await apply_documents(tenancy.app.state.api)
    assert tenancy.engine.variants.ttls == {"beta": 60.0}


async def test_pin_that_cannot_be_is_a_conflict_and_not_kept(tenancy):
    async def refuse(pinned):
        raise ConfigError("3 variants are pinned, and there are 2 slots; pin fewer")

    tenancy.engine.pin = refuse
    answer = await act(tenancy, "beta/pin")
    assert answer.status_code == 409
    assert "there are 2 slots" in answer.json()["error"]["message"]
    assert tenancy.app.state.api.fleet.all("variant") == {}


async def test_pin_that_cannot_be_kept_is_taken_back(tenancy, monkeypatch):
    def full(*args: object) -> None:
        raise StateUnwritable("The change could not be kept.", retry_after_s=30)

    monkeypatch.setattr(FleetStore, "put", full)
    assert (await act(tenancy, "beta/pin")).status_code == 503
    assert tenancy.engine.pinned[-1] == {"acme": ["alpha"]}


async def test_time_to_live_is_kept_carried_out_and_taken_back(tenancy):
    engine, fleet = tenancy.engine, tenancy.app.state.api.fleet
    for _ in range(2):
        assert (await act(tenancy, "beta/expire?after_s=90")).json()["ttl_s"] == 90
    assert engine.variants.ttls == {"beta": 90.0}
    assert len(fleet.history("variant", "beta")) == 1
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        assert (await act(tenancy, f"beta/expire?after_s={wrong}")).status_code == 400
    assert (await act(tenancy, "beta/expire")).json()["ttl_s"] is None
    assert engine.variants.ttls == {}
