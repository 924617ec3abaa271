"""Events of variants, to readers that may be slow: each has a bounded buffer of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from server.engine.life_types import VariantEvent
from server.errors import QueueFull

MAX_PENDING = 1000  # events of one reader
MAX_READERS = 256


@dataclass(eq=False)
class _Reader:
    """Filled by any thread, emptied on its event loop."""

    loop: asyncio.AbstractEventLoop
    may_see: Callable[[str], bool]
    pending: deque[VariantEvent] = field(default_factory=deque)
    n_missed: int = 0
    came: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.came.set)


class EventFeed:
    """Any thread may publish."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._readers: set[_Reader] = set()
        self._lock = threading.Lock()
        self._clock = clock
        self.closed = False

    def __len__(self) -> int:
        return len(self._readers)

    def publish(self, event: VariantEvent) -> None:
        """Give an event to all who read now; who has not taken the last ones misses the oldest."""
        with self._lock:
            for reader in [one for one in self._readers if one.may_see(event.name)]:
                if len(reader.pending) == MAX_PENDING:
                    reader.pending.popleft()
                    reader.n_missed += 1
                reader.pending.append(event)
                reader.wake()

    def close(self) -> None:
        """No more events: readers get what there is, and end."""
        with self._lock:
            self.closed = True
            for reader in self._readers:
                reader.wake()

    async def read(
        self, may_see: Callable[[str], bool], keep_alive_s: float
    ) -> AsyncGenerator[VariantEvent | None]:
        """See `VariantControl.events`; `may_see` is called by any thread."""
        reader = _Reader(asyncio.get_running_loop(), may_see)
        with self._lock:
            if len(self._readers) >= MAX_READERS:
                raise QueueFull(
                    f"{MAX_READERS} others read events already. Try again.", retry_after_s=30
                )
            self._readers.add(reader)
        try:
            yield None  # from now on nothing is missed
            while True:
                events, is_last = self._taken(reader)
                for event in events:
                    yield event
                if is_last:
                    return
                if not events and not await _came(reader, keep_alive_s):
                    yield None
        finally:
            with self._lock:
                self._readers.discard(reader)

    def _taken(self, reader: _Reader) -> tuple[list[VariantEvent], bool]:
        """What a reader has not had yet, and whether that is all there will be."""
        with self._lock:
            reader.came.clear()
            events, n_missed = list(reader.pending), reader.n_missed
            reader.pending.clear()
            reader.n_missed = 0
            is_last = self.closed
        if n_missed:
            missed = VariantEvent("missed", "", None, self._clock(), n_missed=n_missed)
            events.insert(0, missed)
        return events, is_last


async def _came(reader: _Reader, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await reader.came.wait()
    except TimeoutError:
        return False
    return True
