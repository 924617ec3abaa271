"""Request body -> validated request model.

Python's own JSON reader with hooks, because each leniency of a usual one is a hole here: repeated
keys, NaN, deep nesting and endless integers all end as 400. orjson and msgspec have no such hooks:
they keep the last of two keys. They parse a body of 4 MB in half of the time, 5 MB of one text in
two thirds of it.

Whatever a body holds, others must not feel it: its values are counted before they are made
(`body_bounds`), a large one is parsed on a thread of its own, unknown fields are refused by their
names alone, and pydantic stops at the first wrong item of a list.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.body_bounds import MAX_KEYS, check_bounds
from server.api.context import api_of
from server.api.errors import invalid_request, unknown_fields
from server.errors import ClientError, InvalidRequest

Model = TypeVar("Model", bound=BaseModel)
INLINE_BYTES = 16 << 10  # parsed in less time than another thread takes to answer


class UnsupportedMediaType(ClientError):
    """The body is not declared as JSON."""

    status = 415
    kind = "UnsupportedMediaTypeError"


async def parse_body(request: Request, model: type[Model]) -> Model:
    """Return the body as `model`. Raises InvalidRequest and UnsupportedMediaType."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("Send the body as JSON, with Content-Type: application/json.")
    raw = await request.body()
    if len(raw) <= INLINE_BYTES:
        return _validated(raw, model)
    loop, pool = asyncio.get_running_loop(), api_of(request).body_parsers
    return await loop.run_in_executor(pool, _validated, raw, model)


def _validated(raw: bytes, model: type[Model]) -> Model:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    if unknown := [name for name in value if name not in model.model_fields]:
        raise unknown_fields(unknown)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_request(error) from None


def parse_json(raw: bytes) -> object:
    """Return the JSON value in `raw`, after a byte order mark or not. Raises InvalidRequest."""
    check_bounds(raw)
    try:
        return json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, too many digits, our own
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"The body is not valid JSON{where}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise InvalidRequest(f"An object of the body has more than {MAX_KEYS} fields.")
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object repeats a key")
    return value


def _refuse_constant(_: str) -> object:
    raise ValueError("NaN and infinity are not JSON")
