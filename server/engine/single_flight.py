"""Work that several ask for at once is done once, for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Runs blocking work in a pool, one piece for each key at a time. For one event loop.

    Who asks while the work for a key is under way gets its result, or its error. Nothing is kept:
    who asks later has it done anew. Callers may be cancelled; the work goes on for the others.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._under_way: dict[str, asyncio.Future[T]] = {}

    async def run(self, key: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, or what the work for this key that is under way will."""
        flight = self._under_way.get(key)
        if flight is None:
            flight = asyncio.get_running_loop().run_in_executor(self._pool, work)
            self._under_way[key] = flight
            flight.add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(flight)
