"""The one place that turns errors into HTTP answers: OpenAI's body with vLLM's values.

    {"error": {"message": ..., "type": "BadRequestError", "param": "n", "code": 400}}

Nothing a client sent is ever repeated beyond names of fields, and at most `MAX_ERRORS` problems
are listed, so an answer stays small whatever the request was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.types import Scope

from server.errors import BodyTooLarge, InvalidRequest, ServeError

MAX_ERRORS = 10
DEFAULT_RETRY_AFTER_S = 1
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_KINDS = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaTypeError",
    431: "RequestHeaderFieldsTooLarge",
}


def error_body(message: str, kind: str, param: str | None, code: int) -> dict[str, Any]:
    """Return the one shape of every error this server sends."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: ServeError) -> dict[str, Any]:
    """Return the error body for one of our own errors."""
    return error_body(error.message, error.kind, error.param, error.status)


def internal_error_body(request_id: str) -> dict[str, Any]:
    """Return the constant body of an unforeseen failure; the log has the rest under this id."""
    message = f"Internal server error. The server's log has details under request {request_id}."
    return error_body(message, "InternalServerError", None, 500)


def headers_of(error: ServeError) -> dict[str, str]:
    """Return the headers that go with an error: when to retry, whether to hang up."""
    headers: dict[str, str] = {}
    if error.status == 503 or error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s or DEFAULT_RETRY_AFTER_S)
    if isinstance(error, BodyTooLarge):
        headers["connection"] = "close"  # the rest of the body is not worth reading
    return headers


def response_of(error: ServeError) -> JSONResponse:
    """Return the whole answer for one of our own errors."""
    return JSONResponse(body_of(error), error.status, headers_of(error))


def note_error(scope: Scope, error: ServeError) -> None:
    """Keep what a request is answered with for `answered_error`."""
    scope["impart.error"] = error


def answered_error(scope: Scope) -> ServeError | None:
    """What the request was answered with, if that was one of our own errors."""
    return cast("ServeError | None", scope.get("impart.error"))


def http_error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an answer for a failure that HTTP itself names: wrong path, method, media type."""
    kind = _KINDS.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return JSONResponse(error_body(message, kind, None, status), status, headers)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Turn pydantic's findings into one 400 that names the fields and echoes nothing."""
    found = error.errors(include_url=False, include_input=False)
    lines = [f"{_field(item)}: {item['msg']}" for item in found[:MAX_ERRORS]]
    if len(found) > MAX_ERRORS:
        lines.append(f"and {len(found) - MAX_ERRORS} more")
    return InvalidRequest("; ".join(lines), param=_field(found[0]))


def unknown_fields(names: Sequence[str]) -> InvalidRequest:
    """Refuse fields that a request does not have, in pydantic's words for it."""
    fields = [name if _SAFE_NAME.fullmatch(name) else "<field>" for name in names[:MAX_ERRORS]]
    lines = [f"{field}: Extra inputs are not permitted" for field in fields]
    if len(names) > MAX_ERRORS:
        lines.append(f"and {len(names) - MAX_ERRORS} more")
    return InvalidRequest("; ".join(lines), param=fields[0])


def install(app: FastAPI) -> None:
    """Register the handlers on the application."""
    app.add_exception_handler(ServeError, _on_serve_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_serve_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServeError)
    note_error(request.scope, error)
    return response_of(error)


async def _on_http_exception(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return http_error(error.status_code, str(error.detail), error.headers)


def _field(item: ErrorDetails) -> str:
    """Return ``messages[3].content`` for a finding; names a client made up are checked first."""
    parts = item["loc"]
    if item["type"] == "conflict":  # found by a model's validator, which has no location itself
        parts = (*parts, item["ctx"]["field"])
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _SAFE_NAME.fullmatch(part) else "<field>"
            text += f".{name}" if text else name
    return text or "body"
