"""Who may still come in: a count of open requests, and why new ones are refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from server.errors import Draining, EngineDead, QueueFull

MAX_RETRY_S = 30


class Admission:
    """May be used from any thread.

    max_waiting  requests that may wait beside the `max_running` that run
    """

    def __init__(self, max_waiting: int, max_running: int) -> None:
        self._max_waiting, self._limit = max_waiting, max_waiting + max_running
        self._lock = threading.Lock()
        self._queue_wait_s = 1.0  # moving average, for Retry-After
        self.n_open = 0  # let in and not left
        self.draining = False
        self.dead = False

    def enter(self, let_in: Callable[[], None]) -> None:
        """Count a request and call `let_in`. Raises QueueFull, Draining or EngineDead."""
        with self._lock:
            if self.dead:
                raise EngineDead("the engine has stopped; the server is restarting")
            if self.draining:
                raise Draining("the server is shutting down", retry_after_s=5)
            if self.n_open >= self._limit:
                wait_s = min(MAX_RETRY_S, max(1, math.ceil(self._queue_wait_s)))
                raise QueueFull(
                    f"the queue is full ({self._max_waiting} requests wait); "
                    f"try again in {wait_s} s",
                    retry_after_s=wait_s,
                )
            self.n_open += 1
            # Inside the lock: whoever ends the engine empties its inbox after taking it.
            let_in()

    def leave(self, waited_s: float | None) -> None:
        """A request ended; it had waited so long until it ran, None: it never did."""
        with self._lock:
            self.n_open -= 1
            if waited_s is not None:
                self._queue_wait_s = 0.9 * self._queue_wait_s + 0.1 * waited_s

    def drain(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self.draining = True

    def die(self) -> None:
        """Nobody who is in will be answered."""
        with self._lock:
            self.dead = True
