"""Request body -> validated request model.

jiter, the reader within pydantic, because it can refuse what others let pass: repeated keys, NaN
and endless integers (orjson and msgspec keep the last of two keys; `json` can refuse them, but
takes twice to twenty times as long).

Whatever a body holds, others must not feel it: its values are counted before they are made
(`body_bounds`), a large one is read on a thread of its own, unknown fields are refused by their
names alone, and pydantic stops at the first wrong item of a list. Processor time that a body takes
(AMD EPYC, Zen 4), in ms, of counting, while which other threads run, and of parsing and checking,
which hold the interpreter:

    4 MB of text              1.2 + .3      262,134 token ids        3.6 + 19
    600,000 escaped letters   1.2 + 8.3     32,760 lists             1.3 + 3.2
    16 KiB of either           .0 + .2      4 MB of what is refused  8 at most
"""

from __future__ import annotations

import asyncio
import codecs
import re
from typing import TypeVar

import jiter
from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.body_bounds import check_bounds
from server.api.context import api_of
from server.api.errors import invalid_request, unknown_fields
from server.errors import InvalidRequest, UnsupportedMediaType

Model = TypeVar("Model", bound=BaseModel)
INLINE_BYTES = 16 << 10  # parsed in less time than another thread takes to answer
_PLACE = re.compile(r"\d+ column \d+")
_KINDS = {
    "duplicate key": "has an object with the same key twice",
    "hex escape": "has half of a surrogate pair, or an escape that is no character,",
    "number out of range": "has a number of too many digits",
}


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
    text = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return jiter.from_json(text, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        # The library's words may hold the client's; where it is, and these kinds, may be told.
        says, _, where = str(error).rpartition(" at line ")
        kind = next((words for part, words in _KINDS.items() if part in says), "is not valid JSON")
        place = f" at line {where}" if _PLACE.fullmatch(where) else ""
        raise InvalidRequest(f"The body {kind}{place}.") from None
