"""Run the generations of one request side by side and merge what they produce.

Each generation is pumped by a task of its own. Together they may be `ROOM` events ahead of the
reader; then they wait, so that a slow reader holds a bounded number of events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from server.engine.types import OutputDelta
from server.errors import GenerationFailed, ServeError

ROOM = 4  # events per generation

Event = tuple[int, OutputDelta]


class Fanout:
    """Async context manager; leaving it aborts every generation that still runs."""

    def __init__(self, streams: Sequence[AsyncIterator[OutputDelta]]) -> None:
        self._streams = streams
        self._open = len(streams)
        self._queue: asyncio.Queue[Event | int | BaseException] = asyncio.Queue()
        self._room = asyncio.Semaphore(ROOM * len(streams))
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._pump(index, stream))
            for index, stream in enumerate(self._streams)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fail(self, error: ServeError) -> None:
        """End the merged stream with `error`, after what is already there."""
        self._queue.put_nowait(error)

    async def events(self, idle_s: float | None = None) -> AsyncIterator[Event | None]:
        """Yield (index, delta) as they come; None after `idle_s` seconds without one.

        Raises what the first failing generation raised.
        """
        while self._open:
            item = await self._next(idle_s)
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, int):
                self._open -= 1
                continue
            if item is not None:
                self._room.release()
            yield item

    async def _next(self, idle_s: float | None) -> Event | int | BaseException | None:
        with suppress(asyncio.QueueEmpty):
            return self._queue.get_nowait()
        try:
            async with asyncio.timeout(idle_s):
                return await self._queue.get()
        except TimeoutError:
            return None

    async def _pump(self, index: int, stream: AsyncIterator[OutputDelta]) -> None:
        try:
            await self._forward(index, stream)
        except Exception as error:
            self._queue.put_nowait(error)
        finally:
            # An abandoned generator is only finalised by the garbage collector; the engine must
            # hear of it now.
            close: Any = getattr(stream, "aclose", None)
            if close is not None:
                await close()

    async def _forward(self, index: int, stream: AsyncIterator[OutputDelta]) -> None:
        async for delta in stream:
            await self._room.acquire()
            self._queue.put_nowait((index, delta))
            if delta.finish_reason is not None:
                self._queue.put_nowait(index)
                return
        raise GenerationFailed("The generation ended without a result. Try again.")
