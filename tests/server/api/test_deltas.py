"""The list of deltas and its rescan, and all that is known of one."""

from __future__ import annotations

import httpx

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine
from tests.server.api.tenancy import Tenancy, bearer


async def test_deltas_show_state_and_error_and_rescan_calls_the_engine():
    engine = FakeEngine()
    transport = httpx.ASGITransport(create_app(engine, make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        listed = (await http.get("/v1/deltas")).json()["data"]
        assert (await http.post("/v1/deltas/rescan")).status_code == 200

    assert engine.rescans == 1
    states = {delta["id"]: (delta["state"], delta["error"]) for delta in listed}
    assert states == {
        "alpha": ("ready", None),
        "beta": ("ready", None),
        "broken": ("failed", "Corrupt"),
    }


async def test_delta_shows_its_tiers_ratio_users_and_loads(tmp_path):
    tenancy = Tenancy(tmp_path)
    tenancy.app.state.api.fleet.put("variant", "alpha", {"source": "hub:a/b", "ttl_s": 9.0})
    shown = await tenancy.call_admin("GET", "/v1/deltas/alpha", headers=bearer("admin"))
    delta = shown.json()
    assert (delta["id"], delta["digest"], delta["codec"]) == ("alpha", "a" * 64, "blockdiag")
    assert (delta["ratio"], delta["users"], delta["last_used"]) == (5.0, 3, 12.5)
    assert delta["tiers"] == {"disk": 1000, "host": 0, "device": 500}
    assert delta["loads"] == [
        {"time": 20.0, "tier": "device", "seconds": 0.25, "error": None},
        {"time": 10.0, "tier": "host", "seconds": 1.5, "error": "it broke"},
    ]
    assert (delta["source"], delta["ttl_s"], delta["pinned_by_admin"]) == ("hub:a/b", 9.0, False)


async def test_delta_shows_a_tenant_its_own_use_only(tmp_path):
    tenancy = Tenancy(tmp_path)
    own = await tenancy.call("GET", "/v1/deltas/alpha", headers=bearer("acme"))
    assert own.status_code == 200
    assert tenancy.engine.variants.asked_for == ["acme"]
    assert own.json().keys().isdisjoint({"source", "pinned_by_admin", "ttl_s"})
    for name in ("beta", "nobody"):
        other = await tenancy.call("GET", f"/v1/deltas/{name}", headers=bearer("acme"))
        assert other.status_code == 404
