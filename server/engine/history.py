"""What happened to variants: their last loads, and events of it by name."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from server.deltas.loads import Happening
from server.engine.events import EventFeed
from server.engine.life_types import EventKind, LoadRecord, Tier, VariantEvent

MAX_LOADS_KEPT = 20  # of one digest

Named = Iterable[tuple[str, str]]  # names and digests


class VariantHistory:
    """The loader's watcher. Kept by key, told by name: several names may have one digest.

    named  the names that a key has now
    timed  is told how long each tier took
    """

    def __init__(self, named: Callable[[str], Named]) -> None:
        self.feed = EventFeed()
        self._named = named
        self.timed: Callable[[Tier, float], None] = lambda tier, seconds: None
        self._loads: dict[str, deque[LoadRecord]] = {}

    def __len__(self) -> int:
        return len(self._loads)

    def __call__(self, happening: Happening) -> None:
        """Engine thread."""
        self._record(happening)
        if happening.kind == "device":  # "ready" follows
            return
        for name, digest in self._named(happening.key):
            self.tell(happening.kind, name, digest, happening.seconds, happening.reason)

    def tell(
        self,
        kind: EventKind,
        name: str,
        digest: str | None,
        seconds: float | None = None,
        reason: str = "",
    ) -> None:
        """Any thread."""
        self.feed.publish(VariantEvent(kind, name, digest, time.time(), seconds, reason))

    def loads(self, key: str) -> tuple[LoadRecord, ...]:
        """The last loads of a digest, newest first. Any thread."""
        return tuple(reversed(list(self._loads.get(key, ()))))

    def keep(self, keys: Collection[str]) -> None:
        """Forget the loads of all others. Engine thread."""
        for key in [key for key in self._loads if key not in keys]:
            del self._loads[key]

    def _record(self, happening: Happening) -> None:
        seconds = happening.seconds
        match happening.kind:
            case "host" | "device" as tier if seconds is not None:
                self.timed(tier, seconds)
                self._add(happening.key, LoadRecord(time.time(), tier, seconds))
            case "failed":
                record = LoadRecord(time.time(), "device", seconds or 0.0, happening.reason)
                self._add(happening.key, record)

    def _add(self, key: str, record: LoadRecord) -> None:
        if key not in self._loads:
            self._loads[key] = deque(maxlen=MAX_LOADS_KEPT)
        self._loads[key].append(record)
