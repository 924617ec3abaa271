"""First come, first served, whoever it is from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

from server.engine.request import Request
from server.engine.schedule.no_shares import NoShares


class FcfsQueue(NoShares):
    """See `server.engine.schedule.queue.RequestQueue`."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Request, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting)

    def add(self, request: Request) -> None:
        self._waiting[request] = None

    def start(self, request: Request) -> None:
        del self._waiting[request]

    def put_back(self, request: Request) -> None:
        self._waiting[request] = None
        self._waiting.move_to_end(request, last=False)

    def end(self, request: Request) -> None:
        self._waiting.pop(request, None)

    def candidates(self) -> Iterator[Request]:
        return iter(tuple(self._waiting))

    def gives_room(self, request: Request, running: Sequence[Request], n: int) -> Request | None:
        return None

    def gives_blocks(
        self, request: Request, running: Sequence[Request], batch: Collection[Request]
    ) -> Request:
        return youngest_after(request, running, batch)


def youngest_after(
    request: Request, running: Sequence[Request], batch: Collection[Request]
) -> Request:
    """Return who began last after `request` and is not in the step yet, else itself: who began
    first always goes on.
    """
    younger = running[running.index(request) :]
    return next((other for other in reversed(younger) if other not in batch), request)
