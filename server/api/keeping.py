"""What operators have said of variants in documents, carried out: pins and times to live."""

from __future__ import annotations

import asyncio
from typing import Any

from server.api.context import Api
from server.api.reload import begin_pinning
from server.errors import ConfigError, Conflict

KIND = "variant"
EMPTY: dict[str, Any] = {
    "source": None,
    "revision": None,
    "pinned": False,
    "ttl_s": None,
    "registered_at": None,
}


async def apply_documents(api: Api) -> None:
    """Have the engine keep to what the documents say now: at the start, and when they changed.

    Raises ConfigError, and StateUnwritable.
    """
    documents = await asyncio.to_thread(api.fleet.all, KIND)
    api.engine.variants.expire_after(_ttls(documents))
    await begin_pinning(api, _pinned(documents))


async def set_pinned(api: Api, name: str, *, pinned: bool) -> None:
    """Pin a variant for the operators, or let it go; kept, and then so.

    Raises Conflict where it cannot be pinned, StateUnwritable.
    """
    async with api.changing:
        documents = await asyncio.to_thread(api.fleet.all, KIND)
        before = documents.get(name)
        if bool((before or EMPTY)["pinned"]) == pinned:
            return
        after = documents | {name: {**EMPTY, **(before or {}), "pinned": pinned}}
        try:
            await begin_pinning(api, _pinned(after))
        except ConfigError as error:
            raise Conflict(f"`{name}` cannot be pinned: {error.message}.") from None
        try:
            await asyncio.to_thread(api.fleet.put, KIND, name, after[name])
        except BaseException:
            await begin_pinning(api, _pinned(documents))
            raise
    api.engine.variants.tell("pinned" if pinned else "unpinned", name)


async def set_ttl(api: Api, name: str, *, after_s: float | None) -> None:
    """Unload a variant whenever nobody has used it for so long, None: never for that; kept.

    Raises StateUnwritable.
    """
    async with api.changing:
        documents = await asyncio.to_thread(api.fleet.all, KIND)
        body = {**EMPTY, **documents.get(name, {}), "ttl_s": after_s}
        if body != {**EMPTY, **documents.get(name, {})}:
            await asyncio.to_thread(api.fleet.put, KIND, name, body)
        api.engine.variants.expire_after(_ttls(documents | {name: body}))


def _pinned(documents: dict[str, dict[str, Any]]) -> list[str]:
    return sorted(name for name, body in documents.items() if body.get("pinned") is True)


def _ttls(documents: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Another version may have written the file: what is no time is none."""
    given = ((name, body.get("ttl_s")) for name, body in documents.items())
    return {name: float(ttl) for name, ttl in given if isinstance(ttl, int | float) and ttl > 0}
