"""The generation requests being answered: to count them, to wait for them, and to end them.

One `OpenRequests` per server, used on the event loop only. Who may come in is the engine's
decision (`EngineClient.admit`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from server.errors import ServeError


class Endable(Protocol):
    """Something running that can be told to end with an error."""

    def fail(self, error: ServeError) -> None: ...


class OpenRequest:
    """One request being answered: the place to tell it that it must end now.

    work is the task that does it; output, once there is one, ends in a more orderly way.
    """

    def __init__(self) -> None:
        self.work: asyncio.Task[None] | None = None
        self.output: Endable | None = None
        self.error: ServeError | None = None

    def fail(self, error: ServeError) -> None:
        """End this request with `error`, once."""
        if self.error is not None:
            return
        self.error = error
        if self.output is not None:
            self.output.fail(error)
        elif self.work is not None:
            self.work.cancel()


class OpenRequests:
    """Knows every generation request from its admission to the end of its answer."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def enter(self) -> Iterator[OpenRequest]:
        """Count a request for the duration."""
        request = OpenRequest()
        self._open.add(request)
        self._idle.clear()
        try:
            yield request
        finally:
            self._open.discard(request)
            if not self._open:
                self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until none is left; False when some are still there after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def fail_all(self, error: ServeError) -> None:
        """End every request with `error`."""
        for request in tuple(self._open):
            request.fail(error)
