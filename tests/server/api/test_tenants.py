"""The admin's view of the tenants, and reading their file again."""

from __future__ import annotations

from server.errors import ConfigError
from tests.server.api.tenancy import KEYS, TENANTS, Tenancy, bearer


async def test_listing_shows_rights_and_ids_of_keys_never_hashes(tmp_path):
    tenancy = Tenancy(tmp_path)
    answer = await tenancy.call_admin("GET", "/v1/tenants", headers=bearer("admin"))
    acme, globex = answer.json()["data"]
    assert (acme["id"], acme["keys"], acme["weight"]) == ("acme", ["one"], 2.0)
    assert globex["variants"] == ["beta", "broken"]
    assert "sha256" not in answer.text
    assert len(globex["keys"][0]) == 8


async def test_reload_lets_new_keys_in_and_keeps_the_old_at_a_mistake(tmp_path):
    tenancy = Tenancy(tmp_path)
    tenancy.path.write_text(TENANTS.replace("weight = 2", "weight = -2"))
    refused = await tenancy.call_admin("POST", "/v1/tenants/reload", headers=bearer("admin"))
    assert refused.status_code == 400
    assert "tenants.acme.weight" in refused.json()["error"]["message"]
    assert "the tenants known before stay" in refused.json()["error"]["message"]
    assert (await tenancy.call("GET", "/v1/models", headers=bearer("acme"))).status_code == 200
    tenancy.path.write_text(TENANTS.partition("[tenants.globex]")[0])
    reloaded = await tenancy.call_admin("POST", "/v1/tenants/reload", headers=bearer("admin"))
    assert [entry["id"] for entry in reloaded.json()["data"]] == ["acme"]
    assert (await tenancy.call("GET", "/v1/models", headers=bearer("globex"))).status_code == 401


async def test_reload_is_refused_to_pages_of_other_sites(tmp_path):
    tenancy = Tenancy(tmp_path)
    headers = {**bearer("admin"), "origin": "https://evil.example"}
    answer = await tenancy.call_admin("POST", "/v1/tenants/reload", headers=headers)
    assert answer.status_code == 403
    assert KEYS["admin"] not in answer.text


async def test_reload_pins_what_the_file_says_and_names_what_cannot_be(tmp_path):
    tenancy = Tenancy(tmp_path)
    pinned = TENANTS.replace("weight = 2", 'pinned = ["alpha"]')
    tenancy.path.write_text(pinned)
    await tenancy.call_admin("POST", "/v1/tenants/reload", headers=bearer("admin"))
    assert tenancy.engine.pinned == [{"acme": ["alpha"]}]

    async def refuse(_: object) -> None:
        raise ConfigError("tenant acme pins alpha, and no variant has that name")

    tenancy.engine.pin = refuse
    answer = await tenancy.call_admin("POST", "/v1/tenants/reload", headers=bearer("admin"))
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "no variant has that name; the tenants are those of the file" in message
