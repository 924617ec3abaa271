"""The route that replays a certificate: for administrators only."""

from __future__ import annotations

import httpx

from server.api.app import create_admin_app, create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine

ADMIN = {"authorization": "Bearer admin-key-of-16-chars"}


async def test_verify_answers_admins_and_nobody_else() -> None:
    app = create_app(FakeEngine(), make_settings(admin_key=ADMIN["authorization"][7:]))
    admin = create_admin_app(app.state.api, ADMIN["authorization"][7:])
    path = "/v1/deltas/alpha/verify"
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as http:
        assert (await http.post(path)).status_code == 403
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(admin), base_url="http://test", headers=ADMIN
    ) as http:
        answer = await http.post(path)
        assert answer.status_code == 200
        assert answer.json() == {
            "object": "delta.verification",
            "id": "alpha",
            "digest": "a" * 64,
            "verdict": "faithful",
        }
        assert (await http.post("/v1/deltas/none/verify")).status_code == 404
        assert (await http.post("/v1/deltas/broken/verify")).status_code == 424
        other_site = {"origin": "http://elsewhere.example"}
        assert (await http.post(path, headers=other_site)).status_code == 403


async def test_capacity_takes_names_of_models_and_not_too_many() -> None:
    app = create_app(FakeEngine(), make_settings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        found = await http.get("/v1/capacity?model=alpha&model=beta")
        assert found.json() == {"object": "capacity", "asked": ["alpha", "beta"], "fits": True}
        many = [("model", "alpha")] * 257
        assert (await http.get("/v1/capacity", params=many)).status_code == 400
