"""Who is in the house: admission before any work, draining, and ending what runs.

One gate per server, used on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from server.errors import Draining, InvalidRequest, QueueFull, ServeError


class Endable(Protocol):
    """Something running that can be told to end with an error."""

    def fail(self, error: ServeError) -> None: ...


class Ticket:
    """One admitted request: the place to tell it that it must end now.

    work is the task that does it; output, once there is one, ends in a more orderly way.
    """

    def __init__(self, n_sequences: int) -> None:
        self.n_sequences = n_sequences
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


class Gate:
    """Counts sequences (a request with n choices counts n times) against a capacity."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tickets: set[Ticket] = set()
        self._n_sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def n_requests(self) -> int:
        """Requests now inside."""
        return len(self._tickets)

    @contextmanager
    def admit(self, n_sequences: int) -> Iterator[Ticket]:
        """Let a request in for the duration. Raises Draining, QueueFull, InvalidRequest."""
        if self.draining:
            raise Draining("The server is shutting down. Try again.", retry_after_s=5)
        if n_sequences > self._capacity:
            raise InvalidRequest(
                f"The request asks for {n_sequences} sequences (prompts times n); this server "
                f"takes at most {self._capacity} at once.",
                param="n",
            )
        if self._n_sequences + n_sequences > self._capacity:
            raise QueueFull("The server is at its limit of waiting requests. Try again.")
        ticket = Ticket(n_sequences)
        self._tickets.add(ticket)
        self._n_sequences += n_sequences
        self._idle.clear()
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
            self._n_sequences -= n_sequences
            if not self._tickets:
                self._idle.set()

    def drain(self) -> None:
        """Let nobody in from now on."""
        self.draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until all have left; False when some are still there after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def fail_all(self, error: ServeError) -> None:
        """End every request inside with `error`."""
        for ticket in tuple(self._tickets):
            ticket.fail(error)
