"""Reading the tenants file again, and keeping resident what its tenants pin."""

from __future__ import annotations

import asyncio

from server.api.context import Api
from server.errors import ConfigError
from server.ledger.audited import audited
from server.ledger.records import Actor


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


async def begin_pinning(api: Api) -> None:
    """Have the variants that tenants pin loaded, and kept. Returns before they are.

    Raises ConfigError where a name is wrong.
    """
    task = asyncio.create_task(api.engine.pin(api.directory.pinned))
    await asyncio.sleep(0)  # what is wrong with the names is found before anything is waited for
    if task.done():
        task.result()
        return
    api.tasks.add(task)  # the loop itself keeps weak references only
    task.add_done_callback(api.tasks.discard)
