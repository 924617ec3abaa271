"""``GET /v1/models``: the base and every variant, resident or not."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.api.access import no_such_model, visible_models
from server.api.context import api_of, tenant
from server.api.names import alias_info, find_model
from server.engine.types import ModelInfo

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> JSONResponse:
    """List what can be named in a request's `model`."""
    return await asyncio.to_thread(_listing, request)


def _listing(request: Request) -> JSONResponse:
    """Beside the event loop: there may be thousands."""
    api, may_use = api_of(request), tenant(request).may_use
    aliases = [alias for alias in api.aliases.all() if may_use(alias.name)]
    infos = [*visible_models(request), *(alias_info(api.engine, alias) for alias in aliases)]
    entries = [model_entry(info) for info in infos]
    return JSONResponse({"object": "list", "data": entries})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> JSONResponse:
    """Describe one model."""
    api = api_of(request)
    alias = api.aliases.get(name)
    info = find_model(api.engine, name) if alias is None else alias_info(api.engine, alias)
    if info is None or not tenant(request).may_use(info.name):
        raise no_such_model(name)
    return JSONResponse(model_entry(info))


def model_entry(info: ModelInfo) -> dict[str, Any]:
    """Return vLLM's entry of a model with our digest and state."""
    return {
        "id": info.name,
        "object": "model",
        "created": info.created_s,
        "owned_by": "impart",
        "root": info.name,  # vLLM gives a path here; paths are nobody's business
        "parent": info.parent,
        "max_model_len": info.max_model_len,
        "permission": [],
        "digest": info.digest,
        "state": info.state,
    }
