"""Answers that wait to be read: a bound on how long, and on how many bytes of all connections.

A stream writes as its reader reads, and has a bound of its own (`server.api.sse`). An answer in one
piece is written at once: the transport keeps what the client does not take, and closing the
connection waits for it. uvicorn has no limit to that. One look at all connections a second is
cheaper than a timer for each answer, most of which have left before it would be set.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from server.api.sse import STALL_S

log = logging.getLogger(__name__)
CHECK_S = 1.0
MIN_TAKEN_BYTES = 16 << 10  # of an answer in every `STALL_S`; all of it where it is less
MAX_UNSENT_BYTES = 256 << 20
SMALL_BYTES = 64 << 10  # what a stream that its reader keeps up with may have on the way


class Connection(Protocol):
    """What is looked at of a connection; uvicorn's protocols are such."""

    transport: Any
    cycle: Any


@dataclass(slots=True)
class _Waiting:
    """When an answer had how many bytes left."""

    n_bytes: int
    since: float
    first_seen: float


class UnsentWatch:
    """Look at all connections with `check`, about once in `CHECK_S`.

    on_total  is told the bytes that wait, of all connections
    """

    def __init__(
        self,
        on_total: Callable[[int], None] = lambda _: None,
        *,
        stall_s: float = STALL_S,
        max_bytes: int = MAX_UNSENT_BYTES,
    ) -> None:
        self._on_total = on_total
        self._stall_s = stall_s
        self._max_bytes = max_bytes
        self._waiting: dict[Connection, _Waiting] = {}
        self._next_check = 0.0

    def tick(self, connections: Iterable[Connection]) -> None:
        """Check if it is time to."""
        now = asyncio.get_running_loop().time()
        if now >= self._next_check:
            self._next_check = now + CHECK_S
            self.check(connections, now)

    def check(self, connections: Iterable[Connection], now: float) -> None:
        """Hang up on who takes nothing; then, while too much waits in all, on who has waited
        longest.
        """
        sizes = {one: size for one in list(connections) if (size := _n_unsent(one))}
        self._waiting = {one: self._seen(one, sizes[one], now) for one in sizes}
        for one in [o for o, w in self._waiting.items() if now - w.since >= self._stall_s]:
            self._hang_up(one, sizes, "its client takes nothing of it")
        oldest_first = sorted(self._waiting, key=lambda one: self._waiting[one].first_seen)
        for one in oldest_first:
            if sum(sizes.values()) <= self._max_bytes:
                break
            self._hang_up(one, sizes, "too many bytes wait in all")
        self._on_total(sum(sizes.values()))

    def _seen(self, one: Connection, size: int, now: float) -> _Waiting:
        before = self._waiting.get(one)
        if before is None:
            return _Waiting(size, now, now)
        if size > before.n_bytes or size <= before.n_bytes - MIN_TAKEN_BYTES:
            return _Waiting(size, now, before.first_seen)
        return before

    def _hang_up(self, one: Connection, sizes: dict[Connection, int], why: str) -> None:
        log.warning("the server drops an answer with %d bytes unsent: %s", sizes.pop(one), why)
        del self._waiting[one]
        one.transport.abort()


def _n_unsent(one: Connection) -> int:
    """Bytes that wait for the client and that nothing else watches."""
    transport, cycle = one.transport, one.cycle
    if transport is None:
        return 0
    n_bytes: int = transport.get_write_buffer_size()
    is_answering = cycle is not None and not cycle.response_complete
    if is_answering and n_bytes <= SMALL_BYTES and not transport.is_closing():
        return 0
    return n_bytes
