"""Liveness and readiness."""

from __future__ import annotations

import httpx

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine


async def test_health_follows_engine_and_draining():
    engine = FakeEngine()
    app = create_app(engine, make_settings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def statuses() -> tuple[int, int]:
            live = await http.get("/health")
            ready = await http.get("/health/ready")
            return live.status_code, ready.status_code

        assert await statuses() == (200, 200)
        engine.drain()
        assert await statuses() == (200, 503)
        engine.alive = False
        assert await statuses() == (503, 503)


async def test_questions_of_vllms_operators_are_answered_in_its_shape():
    transport = httpx.ASGITransport(create_app(FakeEngine(), make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answers = [(await http.get(path)).json() for path in ("/load", "/is_sleeping")]
        version = (await http.get("/version")).json()
    assert answers == [{"server_load": 0}, {"is_sleeping": False}]
    assert list(version) == ["version"]
