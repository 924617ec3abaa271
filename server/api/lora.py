"""vLLM's routes for adapters, in its words and status codes, for operators that know those.

    POST /v1/load_lora_adapter    {"lora_name", "lora_path", "load_inplace"?}
    POST /v1/unload_lora_adapter  {"lora_name", "lora_int_id"?}

`lora_path` is a source as in ``POST /v1/deltas``. Fields that vLLM has beside these are accepted:
what they say (a base model's name, a number) decides nothing here. Unlike elsewhere an error's
`code` is the status, as it is there.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from server.api.access import require_admin
from server.api.body import parse_body
from server.api.context import api_of, request_id
from server.api.errors import headers_of
from server.api.keeping import apply_documents
from server.errors import ModelNotFound, ServeError, SourceNotFound
from server.ledger.audited import audited

router = APIRouter(dependencies=[Depends(require_admin)])
BOTH = "Both 'lora_name' and 'lora_path' must be provided."
NO_NAME = "'lora_name' needs to be provided to unload a LoRA adapter."
LOADED = (
    "The lora adapter '{}' has already been loaded. If you want to load the adapter in place, set "
    "'load_inplace' to True."
)
UNKNOWN = "The lora adapter '{}' cannot be found."


class LoadRequest(BaseModel):
    """vLLM's LoadLoRAAdapterRequest."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


class UnloadRequest(BaseModel):
    """vLLM's UnloadLoRAAdapterRequest."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = ""
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter")
async def load_adapter(request: Request) -> Response:
    """Serve the adapter or delta at a path under a name."""
    body = await parse_body(request, LoadRequest)
    if not body.lora_name or not body.lora_path:
        return _refusal(400, "InvalidUserInput", BOTH)
    api = api_of(request)
    name = body.lora_name
    info = api.engine.model(name)
    is_served = info is not None and info.error is None
    if is_served and not body.load_inplace:
        return _refusal(400, "InvalidUserInput", LOADED.format(name))
    try:
        with audited(api.ledger, "admin", "register", name[:128], request_id(request)):
            order = api.registrar.order(name, body.lora_path, replace=True)
            await asyncio.shield(api.registrar.begin(order))
    except SourceNotFound as error:
        return _refusal(404, "NotFoundError", error.message)
    except ServeError as error:
        return _refused(error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(request: Request) -> Response:
    """Serve a name no more."""
    body = await parse_body(request, UnloadRequest)
    name = body.lora_name
    if not name:
        return _refusal(400, "InvalidUserInput", NO_NAME)
    api = api_of(request)
    try:
        with audited(api.ledger, "admin", "delete", name[:128], request_id(request)):
            await api.registrar.remove(name)
            await apply_documents(api)  # of another variant of this name nothing was said
    except ModelNotFound:
        return _refusal(404, "NotFoundError", UNKNOWN.format(name))
    except ServeError as error:
        return _refused(error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _refused(error: ServeError) -> JSONResponse:
    """vLLM knows no other status of a client's mistake than 400 and 404."""
    if error.status >= 500:
        return _refusal(error.status, "InternalServerError", error.message, headers_of(error))
    return _refusal(400, "BadRequestError", error.message)


def _refusal(
    status: int, kind: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    body = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": body}, status, headers)
