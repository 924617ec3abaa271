"""``POST /v1/deltas/NAME/verify``: a variant's certificate, replayed on the live server; and
``GET /v1/capacity``: what fits, before it is deployed.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api.access import require_admin
from server.api.context import api_of, request_id
from server.api.origin import refuse_other_sites
from server.errors import InvalidRequest
from server.ledger.audited import audited

MAX_ASKED = 256

router = APIRouter(dependencies=[Depends(require_admin)])


@router.post("/v1/deltas/{name}/verify", dependencies=[Depends(refuse_other_sites)])
async def replay_certificate(request: Request, name: str) -> JSONResponse:
    """Compare what the server answers with what the fine-tune did, beside whatever else runs."""
    api = api_of(request)
    with audited(api.ledger, "admin", "verify", name, request_id(request)):
        found = await api.engine.verify(name)
    return JSONResponse({"object": "delta.verification", "id": name, **found})


@router.get("/v1/capacity")
async def show_capacity(request: Request) -> JSONResponse:
    """Say how memory is shared out, and whether the variants named (`model`, repeated) fit."""
    names = request.query_params.getlist("model")
    if len(names) > MAX_ASKED:
        raise InvalidRequest(f"Ask for {MAX_ASKED} models at most.", param="model")
    found = await api_of(request).engine.variants.capacity(names)
    return JSONResponse({"object": "capacity", **found})
