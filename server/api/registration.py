"""Adding and removing variants over HTTP: from a place, as an upload, and by name. Admin only.

    POST    /v1/deltas          {"name", "source", "revision"?, "replace"?, "load"?}
    PUT     /v1/deltas/{name}   a tar of the artifact's folder
    DELETE  /v1/deltas/{name}

POST answers when the variant is served (201, or 200 if it was already), or at once (202) to who
sends `Prefer: respond-async`; the work goes on whoever leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from server.api.access import require_admin
from server.api.body import parse_body
from server.api.context import api_of, request_id
from server.api.deltas import delta_entry
from server.api.keeping import apply_documents
from server.api.origin import refuse_other_sites
from server.errors import ServeError
from server.fleet.registrar import Registration
from server.ledger.audited import audited

router = APIRouter(dependencies=[Depends(require_admin), Depends(refuse_other_sites)])
MAX_NAME_CHARS = 128
MAX_SOURCE_CHARS = 2048


class RegisterRequest(BaseModel):
    """See the module's docstring."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    source: str = Field(min_length=1, max_length=MAX_SOURCE_CHARS)
    revision: str | None = Field(default=None, max_length=MAX_NAME_CHARS)
    replace: bool = False
    load: bool = False


@router.post("/v1/deltas")
async def register_delta(request: Request) -> JSONResponse:
    """Serve what is at a place under a name."""
    body = await parse_body(request, RegisterRequest)
    api = api_of(request)
    with audited(api.ledger, "admin", "register", body.name, request_id(request)):
        order = api.registrar.order(body.name, body.source, body.revision, replace=body.replace)
        task = api.registrar.begin(order)
        if _is_async(request):
            await asyncio.sleep(0)
            entry = {"id": body.name, "object": "delta", "state": "fetching"}
            return JSONResponse(entry, 202)
        done = await asyncio.shield(task)
        if body.load:
            await api.engine.variants.load(body.name)
    return _answer(request, body.name, done)


@router.put("/v1/deltas/{name}")
async def upload_delta(request: Request, name: str) -> Response:
    """Serve the artifact in the body under a name, instead of what had it."""
    api = api_of(request)
    try:
        with audited(api.ledger, "admin", "upload", name[:MAX_NAME_CHARS], request_id(request)):
            done = await api.registrar.upload(name, _pieces(request))
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    return _answer(request, name, done)


@router.delete("/v1/deltas/{name}")
async def delete_delta(request: Request, name: str) -> JSONResponse:
    """Serve a name no more; requests that run end as they began."""
    api = api_of(request)
    with audited(api.ledger, "admin", "delete", name[:MAX_NAME_CHARS], request_id(request)):
        await api.registrar.remove(name)
        await apply_documents(api)  # of another variant of this name nothing was said
    return JSONResponse({"id": name, "object": "delta", "deleted": True})


def _pieces(request: Request) -> AsyncIterator[bytes]:
    return request.stream()


def _is_async(request: Request) -> bool:
    wishes = request.headers.get("prefer", "").lower().split(",")
    return "respond-async" in (wish.strip() for wish in wishes)


def _answer(request: Request, name: str, done: Registration) -> JSONResponse:
    info = api_of(request).engine.model(name)
    if info is None:  # deleted meanwhile
        raise ServeError("The variant was served, and then deleted by another request.")
    return JSONResponse(delta_entry(info), 201 if done.is_new else 200)
