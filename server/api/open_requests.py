"""The generation requests being answered: to count them, to wait for them, and to end them.

One `OpenRequests` per server, used on the event loop only. Who may come in is the engine's
decision (`EngineClient.admit`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from server.errors import ServeError


class Endable(Protocol):
    """Something running that can be told to end with an error."""

    def fail(self, error: ServeError) -> None: ...


class OpenRequest:
    """One request being answered: the place to tell it that it must end now.

    work is the task that does it; output, once there is one, ends in a more orderly way.
    """

    def __init__(self, work: asyncio.Task[Any]) -> None:
        self.output: Endable | None = None
        self._work = work
        self._error: ServeError | None = None
        self._is_cancelled = False

    def fail(self, error: ServeError) -> None:
        """End this request with `error`, once."""
        if self._error is not None:
            return
        self._error = error
        if self.output is not None:
            self.output.fail(error)
        else:
            self._is_cancelled = True
            self._work.cancel()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise the error that the work was cancelled for; who else cancels it is heard too."""
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_cancelled or self._work.uncancel():
                raise
            assert self._error is not None
            raise self._error from None


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
        """Count the request that the present task answers, for the duration."""
        work = asyncio.current_task()
        assert work is not None, "requests are answered by tasks"
        request = OpenRequest(work)
        self._open.add(request)
        self._idle.clear()
        try:
            with request.told():
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
