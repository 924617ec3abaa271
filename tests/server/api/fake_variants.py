"""What operators do with the fake engine's variants: noted, and told to readers of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from server.engine.events import EventFeed
from server.engine.life_types import EventKind, LoadRecord, VariantDetail, VariantEvent
from server.errors import ServeError


class FakeVariants:
    """Knobs: error, which each change raises, and delay_s, which it takes."""

    has_host_tier = True

    def __init__(self) -> None:
        self.feed = EventFeed()
        self.calls: list[tuple[str, str]] = []
        self.ttls: dict[str, float] = {}
        self.asked_for: list[str | None] = []  # whose use of a variant was asked for
        self.error: ServeError | None = None
        self.delay_s = 0.0

    def detail(self, name: str, tenant: str | None = None) -> VariantDetail:
        self.asked_for.append(tenant)
        loads = (LoadRecord(20.0, "device", 0.25), LoadRecord(10.0, "host", 1.5, "it broke"))
        return VariantDetail(5000, 3, 12.5, loads)

    async def capacity(self, names: Sequence[str]) -> dict[str, Any]:
        return {"asked": list(names), "fits": True}

    async def load(self, name: str) -> None:
        await asyncio.sleep(self.delay_s)
        self._note("load", name)

    async def prefetch(self, name: str) -> None:
        self._note("prefetch", name)

    async def unload(self, name: str, *, force: bool = False) -> None:
        self._note("force" if force else "unload", name)

    def expire_after(self, ttls: Mapping[str, float]) -> None:
        self.ttls = dict(ttls)

    def tell(self, kind: EventKind, name: str) -> None:
        self.feed.publish(VariantEvent(kind, name, name[0] * 64, time.time()))

    def events(
        self, may_see: Callable[[str], bool], keep_alive_s: float
    ) -> AsyncGenerator[VariantEvent | None]:
        return self.feed.read(may_see, keep_alive_s)

    def _note(self, action: str, name: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((action, name))
