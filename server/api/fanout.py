"""Run the generations of one request side by side and join what they produce.

The engine calls back once per step; the reader wakes up at most once for it, however many choices
got a token, and takes everything there is. A reader that is slow gets more at once; what waits for
it is bounded by the generations themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from server.engine.types import Generation, OutputChunk
from server.errors import ServeError
from server.metrics.timer import SequenceTimer


class Timed:
    """A generation, the timer of what its caller sees, and what it has used.

    began_s   when the engine got it, by `time.monotonic`
    queue_s   how long the engine's queue held it; None until something came of it
    first_at  when its first token came, by `time.monotonic`; None: none has come
    """

    def __init__(self, generation: Generation, timer: SequenceTimer) -> None:
        self._generation = generation
        self._timer = timer
        self.open = True
        self.began_s = time.monotonic()
        self.n_tokens = 0
        self.n_cached = 0
        self.n_prompt_computed = 0  # known when it is closed
        self.queue_s: float | None = None
        self.first_at: float | None = None
        self.finish_reason: str | None = None

    def take(self) -> Sequence[OutputChunk]:
        """Return what is new. Sets `open` to False with the last."""
        chunks = self._generation.take()
        for chunk in chunks:
            self._count(chunk)
            if chunk.finish_reason is not None:
                self.open = False
                self._finish(chunk.finish_reason)
        return chunks

    def _count(self, chunk: OutputChunk) -> None:
        n_tokens = len(chunk.token_ids)
        self._timer.tokens(n_tokens, chunk.n_cached_tokens)
        if self.first_at is None and n_tokens:
            self.first_at = time.monotonic()
        self.n_tokens += n_tokens
        self.n_cached = max(self.n_cached, chunk.n_cached_tokens)
        self.queue_s = chunk.queue_s

    def _finish(self, reason: str) -> None:
        self.finish_reason = self.finish_reason or reason
        self._timer.finish(reason)

    @property
    def error(self) -> Exception | None:
        return self._generation.error

    def close(self) -> None:
        """Abort it unless it has ended. What came and nobody took was computed all the same."""
        for chunk in self._generation.take():
            self._count(chunk)
        self._finish("abort" if self.error is None else "error")
        self.n_prompt_computed = self._generation.n_prompt_computed
        self._generation.close()


class Fanout:
    """Context manager; leaving it aborts every generation that still runs."""

    def __init__(self, begins: Sequence[Callable[[Callable[[], None]], Timed]]) -> None:
        """Each of `begins` is given what to call when there is output."""
        self._begins = begins
        self._running: list[Timed] = []
        self._error: Exception | None = None
        self._news = False
        self._reader: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        try:
            for begin in self._begins:
                self._running.append(begin(self._wake))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def is_open(self) -> bool:
        """Whether any generation has not given its last output."""
        return any(timed.open for timed in self._running)

    def fail(self, error: ServeError) -> None:
        """End the joined output with `error`, after what is already there."""
        self._error = self._error or error
        self._wake()

    async def batches(
        self, idle_s: float | None = None
    ) -> AsyncIterator[list[tuple[int, OutputChunk]]]:
        """Yield the chunks that came since the last time, each with the index of its generation; an
        empty list after `idle_s` seconds of nothing.

        Raises, after what came before it, what the first failing generation ended with.
        """
        while self.is_open:
            await self._wait(idle_s)
            batch = [
                (index, chunk)
                for index, timed in enumerate(self._running)
                if timed.open
                for chunk in timed.take()
            ]
            error = self._error or next((t.error for t in self._running if t.error), None)
            if batch or error is None:
                yield batch
            if error is not None:
                raise error

    async def _wait(self, idle_s: float | None) -> None:
        """Wait for news, or for `idle_s` seconds."""
        if not self._news:
            loop = asyncio.get_running_loop()
            self._reader = loop.create_future()
            timer = None if idle_s is None else loop.call_later(idle_s, self._wake)
            try:
                await self._reader
            finally:
                self._reader = None
                if timer is not None:
                    timer.cancel()
        self._news = False

    def _wake(self) -> None:
        self._news = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _close(self) -> None:
        for timed in self._running:
            timed.close()
