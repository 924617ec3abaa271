"""The one place that turns errors into HTTP answers: OpenAI's body, types, codes and headers.

    {"error": {"message": ..., "type": "invalid_request_error", "param": "n",
               "code": "integer_above_max_value"}}

OpenAI's clients choose their exception by the status, show `code`, and try again by the headers.
Nothing a client sent is ever repeated beyond names of fields, and at most `MAX_ERRORS` problems
are listed, so an answer stays small whatever the request was.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.types import Scope

from server.errors import (
    BodyTooLarge,
    ClientError,
    InvalidRequest,
    RateLimited,
    ServeError,
    Unauthenticated,
)

MAX_ERRORS = 10
DEFAULT_RETRY_AFTER_S = 1
JITTER = 0.25  # those who were refused together do not come back together
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_HTTP_CODES = {404: "unknown_url", 405: "method_not_supported", 408: "timeout"}
# What OpenAI calls the rule that a field breaks, by what pydantic calls it; else invalid_value.
_FIELD_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
    "string_too_short": "empty_string",  # no string of ours has another least length than 1
    "string_too_long": "string_above_max_length",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
}
_BOUNDS = {
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
}


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """Return the one shape of every error this server sends."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: ServeError) -> dict[str, Any]:
    """Return the error body for one of our own errors."""
    return error_body(error.message, error.kind, error.param, error.code)


def internal_error_body(request_id: str) -> dict[str, Any]:
    """Return the constant body of an unforeseen failure; the log has the rest under this id."""
    message = f"Internal server error. The server's log has details under request {request_id}."
    return error_body(message, ServeError.kind, None, ServeError.code)


def headers_of(error: ServeError) -> dict[str, str]:
    """Return the headers that go with an error: when to retry, whether to hang up."""
    headers: dict[str, str] = {}
    if error.status == 503 or error.retry_after_s is not None:
        jitter = random.uniform(0, JITTER)  # noqa: S311  (nobody gains by guessing it)
        wait_s = (error.retry_after_s or DEFAULT_RETRY_AFTER_S) * (1 + jitter)
        headers["retry-after"] = str(math.ceil(wait_s))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
    elif isinstance(error, RateLimited):
        headers["x-should-retry"] = "false"  # waiting, for as long as clients do, is of no use
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
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
    kind = ClientError.kind if status < 500 else ServeError.kind
    body = error_body(message, kind, None, _HTTP_CODES.get(status))
    return JSONResponse(body, status, headers)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Turn pydantic's findings into one 400 that names the fields and echoes nothing."""
    found = error.errors(include_url=False, include_input=False)
    lines = [f"{_field(item)}: {item['msg']}" for item in found[:MAX_ERRORS]]
    if len(found) > MAX_ERRORS:
        lines.append(f"and {len(found) - MAX_ERRORS} more")
    return InvalidRequest("; ".join(lines), param=_field(found[0]), code=_field_code(found[0]))


def unknown_fields(names: Sequence[str]) -> InvalidRequest:
    """Refuse fields that a request does not have, in pydantic's words for it."""
    fields = [name if _SAFE_NAME.fullmatch(name) else "<field>" for name in names[:MAX_ERRORS]]
    lines = [f"{field}: Extra inputs are not permitted" for field in fields]
    if len(names) > MAX_ERRORS:
        lines.append(f"and {len(names) - MAX_ERRORS} more")
    code = _FIELD_CODES["extra_forbidden"]
    return InvalidRequest("; ".join(lines), param=fields[0], code=code)


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


def _field_code(item: ErrorDetails) -> str:
    rule = item["type"]
    if rule in _BOUNDS:
        is_whole = all(isinstance(bound, int) for bound in item["ctx"].values())
        return f"{'integer' if is_whole else 'decimal'}_{_BOUNDS[rule]}"
    if rule.endswith("_type"):
        return "invalid_type"
    return _FIELD_CODES.get(rule, "invalid_value")


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
