"""``/v1/aliases``: names that operators point to variants. Admin only.

GET     /v1/aliases, /v1/aliases/{name}     with what it stood for before
PUT     /v1/aliases/{name}                  {"model": M} or {"targets": [{"model", "weight"}]}
DELETE  /v1/aliases/{name}
POST    /v1/aliases/{name}/rollback         take the last change back
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from server.api.access import require_admin
from server.api.body import parse_body
from server.api.context import api_of, request_id
from server.api.origin import refuse_other_sites
from server.errors import InvalidRequest
from server.fleet.aliases import Alias, AliasTarget, Targets, no_such_alias
from server.ledger.audited import audited

router = APIRouter(dependencies=[Depends(require_admin), Depends(refuse_other_sites)])


class AliasRequest(BaseModel):
    """See the module's docstring."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    targets: Targets | None = None

    @property
    def wanted(self) -> tuple[AliasTarget, ...]:
        """What the alias is to stand for. Raises InvalidRequest."""
        if (self.model is None) == (self.targets is None):
            raise InvalidRequest("Give either model or targets.", param="targets")
        return self.targets or (AliasTarget(model=self.model or ""),)


@router.get("/v1/aliases")
async def list_aliases(request: Request) -> JSONResponse:
    """List all aliases."""
    entries = [_entry(alias) for alias in api_of(request).aliases.all()]
    return JSONResponse({"object": "list", "data": entries})


@router.get("/v1/aliases/{name}")
async def get_alias(request: Request, name: str) -> JSONResponse:
    """Describe one alias, with its history."""
    return await asyncio.to_thread(_described, request, name)


@router.put("/v1/aliases/{name}")
async def put_alias(request: Request, name: str) -> JSONResponse:
    """Point an alias somewhere, from the next request on."""
    wanted = (await parse_body(request, AliasRequest)).wanted
    api = api_of(request)
    with audited(api.ledger, "admin", "alias", name[:128], request_id(request)):
        await asyncio.to_thread(api.aliases.put, name, wanted)
    return await get_alias(request, name)


@router.delete("/v1/aliases/{name}")
async def delete_alias(request: Request, name: str) -> JSONResponse:
    """Let an alias stand for nothing."""
    api = api_of(request)
    with audited(api.ledger, "admin", "delete alias", name[:128], request_id(request)):
        await asyncio.to_thread(api.aliases.delete, name)
    return JSONResponse({"id": name, "object": "alias", "deleted": True})


@router.post("/v1/aliases/{name}/rollback")
async def roll_back(request: Request, name: str) -> JSONResponse:
    """Take the last change back."""
    api = api_of(request)
    with audited(api.ledger, "admin", "roll back", name[:128], request_id(request)):
        await asyncio.to_thread(api.aliases.roll_back, name)
    return await get_alias(request, name)


def _described(request: Request, name: str) -> JSONResponse:
    aliases = api_of(request).aliases
    alias = aliases.get(name)
    if alias is None:
        raise no_such_alias(name)
    history = [
        {"time": change.time_s, "actor": change.actor, "before": change.before, "now": change.after}
        for change in aliases.history(name)
    ]
    return JSONResponse(_entry(alias) | {"history": history})


def _entry(alias: Alias) -> dict[str, Any]:
    targets = [target.model_dump() for target in alias.targets]
    return {"id": alias.name, "object": "alias", "targets": targets}
