"""Who is next: the requests that wait, behind the one interface of every policy.

    fair      the tenant that was served least for its weight (`fair`); the default
    priority  the most urgent, then who came first (`priority`)
    fcfs      who came first (`fcfs`)

The scheduler knows what fits into a step; the queue knows whose turn it is: the order of those that
wait, who may overtake whom, and which running request gives way when places or KV blocks run out.
Engine thread only, but for the length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, Protocol

from server.engine.request import Request
from server.engine.schedule.fair import FairQueue
from server.engine.schedule.fcfs import FcfsQueue
from server.engine.schedule.priority import PriorityQueue

Policy = Literal["fair", "priority", "fcfs"]


class RequestQueue(Protocol):
    """The requests that wait. Those that run stay known to it, until they end."""

    def __len__(self) -> int:
        """How many wait. Any thread."""
        ...

    def __iter__(self) -> Iterator[Request]:
        """Those that wait, in any order."""
        ...

    @property
    def shifts(self) -> bool:
        """Whether the order, or who gives way, may change while nobody comes or goes."""
        ...

    def add(self, request: Request) -> None:
        """A new request waits."""
        ...

    def start(self, request: Request) -> None:
        """One that waited runs from now on."""
        ...

    def put_back(self, request: Request) -> None:
        """One that ran was preempted: it is the first of its kind to return."""
        ...

    def end(self, request: Request) -> None:
        """A request has ended, wherever it was."""
        ...

    def charge(self, request: Request, n_input: int, n_output: int) -> None:
        """So many tokens are computed for it: of its prompt, and new ones."""
        ...

    def candidates(self) -> Iterator[Request]:
        """Those that wait, the next first. Each may be started, and others preempted, before the
        next is asked for; whoever is put back meanwhile is not among them.
        """
        ...

    def may_overtake(self, request: Request, blocked: Request) -> bool:
        """Whether a candidate may start while an earlier one finds no place for its variant."""
        ...

    def gives_way(
        self, request: Request, running: Sequence[Request], *, variant: bool
    ) -> list[Request]:
        """Who is to be preempted so that one that waits has a place, and with `variant` a place
        among the variants of a step; nobody: it has to wait.
        """
        ...

    def gives_room(self, request: Request, running: Sequence[Request], n: int) -> Request | None:
        """Who is to be preempted so that one that waits has `n` KV blocks; None: it has to wait."""
        ...

    def lets_go(self, request: Request, running: Sequence[Request]) -> list[Request]:
        """Who is to give back the slot of a variant while they wait, so that the variant of one
        that finds no room has one; nobody: it has to wait.
        """
        ...

    def gives_blocks(
        self, request: Request, running: Sequence[Request], batch: Collection[Request]
    ) -> Request:
        """Who is to be preempted, `request` itself perhaps, so that it can go on; it runs and KV
        blocks have run out.

        batch  those that are in the step already
        """
        ...


def make_queue(policy: Policy, clock: Callable[[], float]) -> RequestQueue:
    """Return an empty queue."""
    match policy:
        case "fair":
            return FairQueue(clock)
        case "priority":
            return PriorityQueue()
        case "fcfs":
            return FcfsQueue()
