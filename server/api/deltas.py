"""``/v1/deltas``: what is known of each variant's delta, and reading the directory again."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api.access import is_admin, no_such_model, require_admin, visible_models
from server.api.context import Api, api_of, request_id, tenant
from server.api.origin import refuse_other_sites
from server.engine.life_types import LoadRecord
from server.engine.types import ModelInfo
from server.ledger.audited import audited

router = APIRouter()
OF_ADMINS = ("source", "revision", "registered_at", "ttl_s")  # fields of a variant's document


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


@router.get("/v1/deltas/{name}")
async def get_delta(request: Request, name: str) -> JSONResponse:
    """Tell everything that is known of one delta."""
    api, info = api_of(request), variant_named(request, name)
    document = await asyncio.to_thread(api.fleet.get, "variant", info.name)
    return JSONResponse(detail_of(api, info, request, document or {}))


def variant_named(request: Request, name: str) -> ModelInfo:
    """Return the variant of that name, if this request may see it. Raises ModelNotFound."""
    info = api_of(request).engine.model(name)
    if info is None or info.parent is None or not tenant(request).may_use(info.name):
        raise no_such_model(name)
    return info


def detail_of(
    api: Api, info: ModelInfo, request: Request, document: dict[str, Any]
) -> dict[str, Any]:
    """Return all of a delta. A tenant hears of its own use only, and not where it came from.

    document  what operators have said of it
    """
    sees_all = is_admin(request)
    of = api.engine.variants.detail(info.name, None if sees_all else tenant(request).name)
    detail = delta_entry(info) | {
        "ratio": round(of.finetuned_bytes / info.n_bytes, 3) if info.n_bytes else None,
        "finetuned_bytes": of.finetuned_bytes,
        "tiers": {
            "disk": info.n_bytes,
            "host": info.host_bytes,
            "device": info.resident_bytes + info.reconstructed_bytes,
        },
        "users": of.n_users,
        "last_used": of.last_used_s,
        "loads": [_load(load) for load in of.loads],
    }
    if sees_all:
        detail["pinned_by_admin"] = bool(document.get("pinned"))
        detail |= {field: document.get(field) for field in OF_ADMINS}
    return detail


def _load(load: LoadRecord) -> dict[str, Any]:
    return {
        "time": load.time_s,
        "tier": load.tier,
        "seconds": round(load.seconds, 6),
        "error": load.error,
    }


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
        "host_bytes": info.host_bytes,
        "resident_bytes": info.resident_bytes,
        "pinned": info.pinned,
        "reconstructed_bytes": info.reconstructed_bytes,
        "fidelity": info.fidelity,
    }
