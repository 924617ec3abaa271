"""``POST /v1/deltas/NAME/verify``: a variant's certificate, replayed on the live server."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from server.api.access import require_admin
from server.api.context import api_of, request_id
from server.api.origin import refuse_other_sites
from server.ledger.audited import audited

router = APIRouter(dependencies=[Depends(require_admin)])


@router.post("/v1/deltas/{name}/verify", dependencies=[Depends(refuse_other_sites)])
async def replay_certificate(request: Request, name: str) -> JSONResponse:
    """Compare what the server answers with what the fine-tune did, beside whatever else runs."""
    api = api_of(request)
    with audited(api.ledger, "admin", "verify", name, request_id(request)):
        found = await api.engine.verify(name)
    return JSONResponse({"object": "delta.verification", "id": name, **found})
