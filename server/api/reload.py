"""Reading the tenants file again, and keeping resident what is pinned."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from server.api.context import Api
from server.errors import ConfigError
from server.ledger.audited import audited
from server.ledger.records import Actor
from server.tenants.principal import SERVER

PIN_WAIT_S = 1.0  # kernels that are compiled first, or a slow disk, are not waited for


async def reload_tenants(api: Api, actor: Actor, request_id: str = "") -> None:
    """Read the tenants file again. Raises ConfigError, which says what stays as it was."""
    with audited(api.ledger, actor, "reload", "tenants", request_id):
        try:
            await asyncio.to_thread(api.directory.reload)
        except ConfigError as error:
            raise ConfigError(f"{error.message}; the tenants known before stay") from None
        try:
            await begin_pinning(api)
        except ConfigError as error:
            stays = "the tenants are those of the file, the variants pinned before stay so"
            raise ConfigError(f"{error.message}; {stays}") from None


async def begin_pinning(api: Api, by_admin: Collection[str] | None = None) -> None:
    """Have the variants loaded that tenants pin and operators do, and kept. Returns before they
    are.

    by_admin  what operators pin; None: what their documents say

    Raises ConfigError where a tenant's name is wrong, or there are too many.
    """
    if by_admin is None:
        documents = await asyncio.to_thread(api.fleet.all, "variant")
        by_admin = [name for name, body in documents.items() if body.get("pinned") is True]
    pinned = {**api.directory.pinned, **({SERVER: by_admin} if by_admin else {})}
    task = asyncio.create_task(api.engine.pin(pinned))
    api.tasks.add(task)  # the loop itself keeps weak references only
    task.add_done_callback(api.tasks.discard)
    await asyncio.wait({task}, timeout=PIN_WAIT_S)
    if task.done():
        task.result()
