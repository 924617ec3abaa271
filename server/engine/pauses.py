"""Notices when this whole process stood still: a paused container, a stalled machine, a debugger.

An engine that gave no sign of life meanwhile is not dead. Whoever watches it compares the watcher's
own clock first: it ticks on the event loop, and a tick that comes much too late says that nobody
ran.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.5


class PauseWatch:
    """Ticks on the running event loop between `start` and `stop`.

    longest_s  a tick this late means a pause; a busy event loop is late by less
    """

    def __init__(self, longest_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._longest_s = longest_s
        self._now = now
        self._last_tick: float | None = None  # None: not started
        self._resumed: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Tick from now on; inside the event loop."""
        self._last_tick = self._now()
        self._schedule()

    def stop(self) -> None:
        """Tick no more."""
        self._last_tick = None
        if self._timer is not None:
            self._timer.cancel()

    def tick(self) -> None:
        """Look at the clock: note that a pause has ended if it has moved too far."""
        now = self._now()
        if self._last_tick is not None:
            if now - self._last_tick > TICK_S + self._longest_s:
                self._resumed = now
            self._last_tick = now

    def resumed_within(self, seconds: float) -> bool:
        """Whether a pause has ended no longer ago than that."""
        self.tick()  # whoever asks may run before the timer does
        return self._resumed is not None and self._now() - self._resumed < seconds

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._on_timer)

    def _on_timer(self) -> None:
        self.tick()
        self._schedule()
