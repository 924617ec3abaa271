"""An application with a tenant that has limits, over the fake engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from server.api.app import create_app
from server.tenants.directory import Directory
from server.tenants.keys import hash_of
from tests.server.api.call import Call, body
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

KEY, OTHER = "acme-key-0123456789", "globex-key-0123456789"
COMPLETIONS = "/v1/completions"


def directory(folder: Path, **limits: int) -> Directory:
    """Two tenants; the limits are acme's."""
    lines = "\n".join(f"{name} = {limit}" for name, limit in limits.items())
    path = folder / "tenants.toml"
    path.write_text(
        f"[tenants.acme]\n{lines}\n[[tenants.acme.keys]]\nsha256 = '{hash_of(KEY)}'\n"
        f"[tenants.globex]\n[[tenants.globex.keys]]\nsha256 = '{hash_of(OTHER)}'\n"
    )
    return Directory(path)


class Served:
    """The application over the fake engine, with the limits of acme."""

    def __init__(
        self, folder: Path, *, settings: Any = None, ledger: Any = None, **limits: int
    ) -> None:
        self.engine = FakeEngine()
        self.app = create_app(
            self.engine,
            settings or make_settings(),
            directory=directory(folder, **limits),
            ledger=ledger,
        )
        self.limiter = self.app.state.api.limiter

    async def post(self, path: str, key: str = KEY, **fields: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            return await client.post(path, json={"model": BASE, **fields})

    async def used_tokens(self) -> int:
        used: int = (await self.limiter.store.window("acme/tokens")).used
        return used

    def call(self, **fields: Any) -> Call:
        return Call(self.app, COMPLETIONS, body(**fields), key=KEY)
