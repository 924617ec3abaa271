"""``GET /v1/deltas/events``: what happens to variants, as server-sent events."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from server.api import sse
from server.api.context import api_of, tenant
from server.engine.life_types import VariantControl, VariantEvent

router = APIRouter()


@router.get("/v1/deltas/events")
async def read_events(request: Request) -> Response:
    """Stream what happens from now on to the variants that this tenant may use."""
    may_use = tenant(request).may_use
    return EventsResponse(api_of(request).engine.variants, lambda n: n == "" or may_use(n))


class EventsResponse(Response):
    """Answers until the reader leaves or the server drains; then the last event is `[DONE]`."""

    def __init__(self, variants: VariantControl, may_see: Callable[[str], bool]) -> None:
        super().__init__()
        self._variants = variants
        self._may_see = may_see

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._variants.events(self._may_see, sse.KEEP_ALIVE_S)
        async with sse.EventStream(send, {}) as out, aclosing(events):
            async for event in events:
                await out.write(sse.COMMENT if event is None else sse.frame(_entry(event)))
            await out.end(sse.DONE)


def _entry(event: VariantEvent) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": event.kind, "time": event.time_s}
    if event.kind == "missed":
        return entry | {"n_missed": event.n_missed}
    entry |= {"id": event.name, "digest": event.digest or None}
    if event.seconds is not None:
        entry["seconds"] = round(event.seconds, 6)
    return entry | {"reason": event.reason} if event.reason else entry
