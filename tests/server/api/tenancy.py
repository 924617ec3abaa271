"""An application with tenants and keys over the fake engine, for tests of what each may see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from server.api.app import create_admin_app, create_app
from server.tenants.directory import Directory
from server.tenants.keys import hash_of
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

KEYS = {name: f"{name}-key-0123456789" for name in ("acme", "globex", "admin", "proxy")}
TENANTS = f"""
[tenants.acme]
variants = ["alpha", "{BASE}"]
weight = 2
[[tenants.acme.keys]]
id = "one"
sha256 = "{hash_of(KEYS["acme"])}"
[tenants.globex]
variants = ["beta", "broken"]
[[tenants.globex.keys]]
sha256 = "{hash_of(KEYS["globex"])}"
"""


def bearer(name: str) -> dict[str, str]:
    """The headers of a call with this one's key."""
    return {"authorization": f"Bearer {KEYS[name]}"}


def tenants_file(folder: Path, text: str = TENANTS) -> Path:
    path = folder / "tenants.toml"
    path.write_text(text)
    return path


class Tenancy:
    """Both applications over one engine; `call` and `call_admin` ask them."""

    def __init__(
        self, folder: Path, *, ledger: Any = None, fleet: Any = None, **settings: Any
    ) -> None:
        self.engine = FakeEngine()
        self.path = tenants_file(folder)
        header = settings.get("tenant_header")
        directory = Directory(self.path, proxy_key=KEYS["proxy"] if header else None)
        self.app = create_app(
            self.engine, make_settings(**settings), directory=directory, ledger=ledger, fleet=fleet
        )
        self.admin = create_admin_app(self.app.state.api, KEYS["admin"])

    async def call(self, method: str, path: str, **given: Any) -> httpx.Response:
        return await _call(self.app, method, path, **given)

    async def call_admin(self, method: str, path: str, **given: Any) -> httpx.Response:
        return await _call(self.admin, method, path, **given)


async def _call(app: Any, method: str, path: str, **given: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **given)


def completion(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "Hi", "max_tokens": 3, **fields}
