"""The one place that decides who may come in: a count of sequences, and why new ones are refused.

The HTTP edge asks first (`check`, before it reads a body), then takes an `AdmissionTicket` for all
sequences of a request, whose permits its generations take with them into the engine.

One tenant may fill the server. To others it is not full then: each is let in up to its share of the
capacity, by weight among those that have something open, and whoever is beyond its share is refused
until it is not. So k tenants of equal weight that come one after another, each with a flood, have
at most 1 + 1/2 + ... + 1/k times the capacity open, for a while; what waits is small (token ids),
and a fair queue lets nobody wait for another's flood.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from server.errors import Draining, EngineDead, InvalidRequest, QueueFull
from server.tenants.principal import ANYBODY, Principal

MIN_RETRY_S = 1
MAX_RETRY_S = 96  # with a quarter of it more still what OpenAI's clients wait for: 120 s
DRAINING_RETRY_S = 5
NEWEST_WEIGHT = 0.1  # of a wait in the moving average


@dataclass(slots=True)
class _Held:
    """Permits of one tenant, and what its sequences waited of late."""

    n_open: int = 0
    weight: float = 1.0
    queue_wait_s: float | None = None


class Admission:
    """Counts sequences against a capacity. May be used from any thread.

    max_waiting  sequences that may wait beside the `max_running` that run
    n_open       permits taken and not given back
    draining     nobody new comes in; who has a ticket goes on
    stopped      nobody comes in, with or without a ticket
    dead         nobody who is in will be answered
    """

    def __init__(self, max_waiting: int, max_running: int) -> None:
        self._capacity = max_waiting + max_running
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}  # by tenant, of those that hold any
        self._queue_wait_s: float | None = None  # moving average of those that have left
        self.n_open = 0
        self.draining = False
        self.stopped = False
        self.dead = False

    def check(self, principal: Principal = ANYBODY) -> None:
        """Refuse what one sequence more would be refused for. Raises as `admit`."""
        with self._lock:
            self._check(1, principal)

    def admit(self, n_sequences: int, principal: Principal = ANYBODY) -> AdmissionTicket:
        """Take permits. Raises QueueFull, Draining, EngineDead, InvalidRequest."""
        if n_sequences > self._capacity:
            raise InvalidRequest(
                f"The request asks for {n_sequences} sequences (prompts times n); this server "
                f"takes at most {self._capacity} at once.",
                param="n",
            )
        with self._lock:
            self._check(n_sequences, principal)
            held = self._held.setdefault(principal.tenant, _Held())
            held.weight = principal.weight
            held.n_open += n_sequences
            self.n_open += n_sequences
        return AdmissionTicket(self, n_sequences, principal)

    def _check(self, n_sequences: int, principal: Principal) -> None:
        if self.dead:
            raise EngineDead("The engine has stopped; the server restarts.")
        if self.draining:
            raise _draining()
        is_full = self.n_open + n_sequences > self._capacity
        if is_full and not self._is_within_share(n_sequences, principal):
            raise QueueFull(
                "The server is at its limit of waiting requests. Try again.",
                retry_after_s=self._retry_after_s(principal),
            )

    def _retry_after_s(self, principal: Principal) -> int:
        """Whole seconds after which a refused client may try again: what its tenant has waited, or
        all tenants if it has no sequence that ended.
        """
        held = self._held.get(principal.tenant)
        own_wait_s = None if held is None else held.queue_wait_s
        wait_s = self._queue_wait_s if own_wait_s is None else own_wait_s
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(wait_s or 0.0)))

    def _is_within_share(self, n_sequences: int, principal: Principal) -> bool:
        """Whether the tenant has no more than its share of the capacity with so many more."""
        own = self._held.get(principal.tenant, _Held())
        others = sum(held.weight for held in self._held.values() if held is not own)
        share = self._capacity * principal.weight / (principal.weight + others)
        return own.n_open + n_sequences <= max(1.0, share)

    def hand_over(self, enqueue: Callable[[], None]) -> None:
        """Call `enqueue` for a sequence that has a permit. Raises Draining, EngineDead."""
        with self._lock:
            if self.dead:
                raise EngineDead("The engine has stopped; the server restarts.")
            if self.stopped:
                raise _draining()
            # Inside the lock: whoever ends the engine empties its inbox after taking it.
            enqueue()

    def leave(self, waited_s: float | None, principal: Principal = ANYBODY) -> None:
        """A sequence ended; it had waited so long until it ran, None: it never did."""
        with self._lock:
            if waited_s is not None:
                held = self._held[principal.tenant]
                held.queue_wait_s = _moved(held.queue_wait_s, waited_s)
                self._queue_wait_s = _moved(self._queue_wait_s, waited_s)
            self._give_back(1, principal)

    def give_back(self, n_permits: int, principal: Principal) -> None:
        """Take back permits that no sequence has used."""
        with self._lock:
            self._give_back(n_permits, principal)

    def _give_back(self, n_permits: int, principal: Principal) -> None:
        if n_permits:
            self.n_open -= n_permits
            held = self._held[principal.tenant]
            held.n_open -= n_permits
            if held.n_open == 0:
                del self._held[principal.tenant]

    def drain(self) -> None:
        """Admit nobody any more; who has a ticket goes on."""
        with self._lock:
            self.draining = True

    def stop(self) -> None:
        """Let nobody into the engine any more, ticket or not."""
        with self._lock:
            self.draining = self.stopped = True

    def die(self) -> None:
        """Nobody who is in will be answered."""
        with self._lock:
            self.dead = True


class AdmissionTicket:
    """The permits of one admitted request; see `server.engine.types.Ticket`. For one thread."""

    def __init__(self, admission: Admission, n_permits: int, principal: Principal) -> None:
        self._admission = admission
        self._n_permits = n_permits
        self._principal = principal

    def hand_over(self, enqueue: Callable[[], None]) -> None:
        """Call `enqueue` for a sequence, which takes a permit with it. Raises Draining, EngineDead.

        Whoever takes the sequence calls `Admission.leave` when it has ended.
        """
        if self._n_permits == 0:
            raise RuntimeError("the ticket has no permit left for this sequence")
        self._admission.hand_over(enqueue)
        self._n_permits -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back the permits that no sequence has taken."""
        n_permits, self._n_permits = self._n_permits, 0
        self._admission.give_back(n_permits, self._principal)


def _moved(average: float | None, newest: float) -> float:
    """Return a moving average with one value more."""
    return newest if average is None else average + NEWEST_WEIGHT * (newest - average)


def _draining() -> Draining:
    return Draining("The server is shutting down. Try again.", retry_after_s=DRAINING_RETRY_S)
