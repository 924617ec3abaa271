"""Variants whose own text files ended several workers are refused for a while, before any work."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

MAX_KILLS = 3
WINDOW_S = 600.0


class Quarantine:
    """Counts ended workers by key. Thread-safe.

    A key with `MAX_KILLS` of them within `WINDOW_S` is refused until the first is that long ago.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kills: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def record(self, key: str) -> None:
        """A worker was ended by work for this key."""
        with self._lock:
            kills = self._kills.setdefault(key, deque(maxlen=MAX_KILLS))
            kills.append(self._clock())

    def remaining_s(self, key: str) -> int:
        """For how long the key is still refused; 0: it is not."""
        with self._lock:
            kills = self._kills.get(key)
            if kills is None:
                return 0
            left_s = kills[0] + WINDOW_S - self._clock()
            if len(kills) == MAX_KILLS and left_s > 0:
                return math.ceil(left_s)
            if kills[-1] + WINDOW_S < self._clock():
                del self._kills[key]
            return 0

    def reason(self, key: str) -> str | None:
        """What `/v1/deltas` says of the key; None if it is not refused."""
        left_s = self.remaining_s(key)
        if not left_s:
            return None
        return (
            f"its chat template or tokenizer ran into the limits of text workers {MAX_KILLS} times;"
            f" it is tried again in {left_s} s; correct its text files and compress it again"
        )
