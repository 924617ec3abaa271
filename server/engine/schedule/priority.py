"""The most urgent first, within one urgency who came first: vLLM's policy of the same name.

A low `priority` is urgent. When KV blocks run out the least urgent running request gives way, of
several the one that began last; a place is never taken from one that runs. Urgent requests can
hold up others for as long as they come: a tenant's `max_priority` says how urgent its may be.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from itertools import count

from server.engine.request import Request
from server.engine.schedule.no_shares import NoShares

Place = tuple[int, int]  # (priority, turn): turns of preempted requests are before all others


class PriorityQueue(NoShares):
    """See `server.engine.schedule.queue.RequestQueue`."""

    def __init__(self) -> None:
        self._places: dict[Request, Place] = {}
        self._order: list[tuple[Place, Request]] = []
        self._turns = count(1)
        self._early_turns = count(0, -1)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._places)

    def add(self, request: Request) -> None:
        self._insert(request, next(self._turns))

    def put_back(self, request: Request) -> None:
        self._insert(request, next(self._early_turns))

    def _insert(self, request: Request, turn: int) -> None:
        place = self._places[request] = (request.priority, turn)
        insort(self._order, (place, request))  # turns differ: requests are never compared

    def start(self, request: Request) -> None:
        self._order.remove((self._places.pop(request), request))

    def end(self, request: Request) -> None:
        if request in self._places:
            self.start(request)

    def candidates(self) -> Iterator[Request]:
        return iter([request for _, request in self._order])

    def gives_room(self, request: Request, running: Sequence[Request], n: int) -> Request | None:
        """A less urgent one, so that it does not hold the KV blocks until its end."""
        last = max(enumerate(running), key=lambda pair: (pair[1].priority, pair[0]), default=None)
        return last[1] if last is not None and last[1].priority > request.priority else None

    def gives_blocks(
        self, request: Request, running: Sequence[Request], batch: Collection[Request]
    ) -> Request:
        at = running.index(request)
        others = [
            (other.priority, index, other)
            for index, other in enumerate(running)
            if other not in batch or other.priority > request.priority
        ]
        priority, index, last = max(others, key=lambda item: item[:2])
        return last if (priority, index) > (request.priority, at) else request
