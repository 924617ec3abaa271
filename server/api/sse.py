"""Server-sent events: framing, keep-alive, and a bound on how long a reader may stall."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

KEEP_ALIVE_S = 15.0  # a comment this often, for proxies that cut silent connections
STALL_S = 60.0  # a reader that takes nothing for so long is cut off

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


class Stalled(Exception):
    """The reader took nothing for `STALL_S` seconds."""


def encode_json(value: object) -> bytes:
    """Return compact JSON. Raises ValueError on NaN, which clients could not read."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def frame(payload: object) -> bytes:
    """Return one event; JSON holds no line break, so one data line is enough."""
    return b"data: " + encode_json(payload) + b"\n\n"


class EventStream:
    """Writes one event stream through an ASGI `send`."""

    def __init__(self, send: Send, headers: Mapping[str, str], stall_s: float = STALL_S) -> None:
        self._send = send
        self._headers = headers
        self._stall_s = stall_s
        self.started = False

    async def write(self, data: bytes) -> None:
        """Send bytes, headers first. Raises Stalled."""
        if not self.started:
            self.started = True
            await self._put({"type": "http.response.start", "status": 200, "headers": self._raw()})
        await self._put({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Close the response."""
        await self._put({"type": "http.response.body", "body": b"", "more_body": False})

    async def _put(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await self._send(message)
        except TimeoutError:
            raise Stalled from None

    def _raw(self) -> list[tuple[bytes, bytes]]:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx: pass events on at once
            **self._headers,
        }
        return [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
        ]
