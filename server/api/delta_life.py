"""``/v1/deltas/{name}/load`` and so on: what administrators do with variants while they are served.

Each may be asked again, which changes nothing, and is in the audit log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from server.api.access import require_admin
from server.api.context import api_of, request_id
from server.api.deltas import get_delta, variant_named
from server.api.keeping import set_pinned, set_ttl
from server.api.origin import refuse_other_sites
from server.api.query import parse_query
from server.errors import DeadlineExceeded
from server.ledger.audited import audited

router = APIRouter(dependencies=[Depends(require_admin), Depends(refuse_other_sites)])

MAX_TTL_S = 366 * 24 * 3600


class UnloadQuery(BaseModel):
    """What `unload` may be asked with."""

    model_config = ConfigDict(extra="forbid")

    force: bool = False


class ExpireQuery(BaseModel):
    """What `expire` may be asked with."""

    model_config = ConfigDict(extra="forbid")

    after_s: float | None = Field(default=None, gt=0, le=MAX_TTL_S, allow_inf_nan=False)


@router.post("/v1/deltas/{name}/load")
async def load_delta(request: Request, name: str) -> JSONResponse:
    """Bring a variant into device memory; answers when it is there."""
    return await _done(request, name, "load", api_of(request).engine.variants.load)


@router.post("/v1/deltas/{name}/prefetch")
async def prefetch_delta(request: Request, name: str) -> JSONResponse:
    """Bring a variant into host memory, so that a load is a copy; answers when it is there."""
    return await _done(request, name, "prefetch", api_of(request).engine.variants.prefetch)


@router.post("/v1/deltas/{name}/unload")
async def unload_delta(request: Request, name: str) -> JSONResponse:
    """Take a variant out of device and host memory; `force`: once its running requests end."""
    force = parse_query(request, UnloadQuery).force
    unloading = partial(api_of(request).engine.variants.unload, force=force)
    return await _done(request, name, "unload", unloading)


@router.post("/v1/deltas/{name}/pin")
async def pin_delta(request: Request, name: str) -> JSONResponse:
    """Keep a variant resident from now on, over restarts too with a state folder."""
    return await _done(request, name, "pin", partial(set_pinned, api_of(request), pinned=True))


@router.post("/v1/deltas/{name}/unpin")
async def unpin_delta(request: Request, name: str) -> JSONResponse:
    """Let a variant go again; what tenants pin stays."""
    return await _done(request, name, "unpin", partial(set_pinned, api_of(request), pinned=False))


@router.post("/v1/deltas/{name}/expire")
async def expire_delta(request: Request, name: str) -> JSONResponse:
    """Unload a variant whenever nobody has used it for so many seconds; without: never for that."""
    after_s = parse_query(request, ExpireQuery).after_s
    return await _done(request, name, "expire", partial(set_ttl, api_of(request), after_s=after_s))


async def _done(
    request: Request, name: str, action: str, work: Callable[[str], Awaitable[None]]
) -> JSONResponse:
    """Do the work, and answer with what is known of the variant then."""
    api, info = api_of(request), variant_named(request, name)
    with audited(api.ledger, "admin", action, info.name, request_id(request)):
        try:
            async with asyncio.timeout(api.settings.request_timeout_s):
                await work(info.name)
        except TimeoutError:
            raise DeadlineExceeded(
                f"`{info.name}` took too long to {action}; look at its state and try again"
            ) from None
    return await get_delta(request, info.name)
