"""The list of deltas and its rescan."""

from __future__ import annotations

import httpx

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine


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
