"""``/v1/deltas``: what is known of each variant's delta, and reading the directory again."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api.access import require_admin, visible_models
from server.api.context import api_of, request_id
from server.api.origin import refuse_other_sites
from server.engine.types import ModelInfo
from server.ledger.audited import audited

router = APIRouter()


@router.get("/v1/deltas")
async def list_deltas(request: Request) -> JSONResponse:
    """List every registered delta, with its state and sizes."""
    return await asyncio.to_thread(_listing, request)


@router.post(
    "/v1/deltas/rescan", dependencies=[Depends(require_admin), Depends(refuse_other_sites)]
)
async def rescan(request: Request) -> JSONResponse:
    """Read the deltas directory again and list what it holds now."""
    api = api_of(request)
    with audited(api.ledger, "admin", "rescan", "deltas", request_id(request)):
        await asyncio.to_thread(api.engine.rescan)
    return await asyncio.to_thread(_listing, request)


def _listing(request: Request) -> JSONResponse:
    infos = [info for info in visible_models(request) if info.parent is not None]
    return JSONResponse({"object": "list", "data": [delta_entry(info) for info in infos]})


def delta_entry(info: ModelInfo) -> dict[str, Any]:
    """Return what is known of one delta."""
    return {
        "id": info.name,
        "object": "delta",
        "created": info.created_s,
        "parent": info.parent,
        "digest": info.digest,
        "state": info.state,
        "error": info.error,
        "codec": info.codec,
        "mode": info.mode,
        "bytes": info.n_bytes,
        "resident_bytes": info.resident_bytes,
        "pinned": info.pinned,
        "reconstructed_bytes": info.reconstructed_bytes,
        "fidelity": info.fidelity,
    }
