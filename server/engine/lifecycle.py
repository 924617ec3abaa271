"""How requests end: their events, and whom what they held goes back to. Engine thread only."""

from __future__ import annotations

import time

from server.engine.observer import Observer
from server.engine.request import Event, Request, Status
from server.engine.residents import Residents
from server.engine.schedule.admission import Admission
from server.engine.schedule.scheduler import Scheduler
from server.engine.step.lookahead import Lookahead
from server.errors import DeadlineExceeded, ServeError

Events = list[tuple[Request, Event]]


class RequestLifecycle:
    """All open requests, and the events of a step until they are published.

    A request that ends while a step in flight has a row of it keeps its KV blocks and slot until
    that step has been read: `close` says it has ended, `release` gives them back.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        residents: Residents,
        lookahead: Lookahead,
        admission: Admission,
        observer: Observer | None,
    ) -> None:
        self._scheduler = scheduler
        self._residents = residents
        self._lookahead = lookahead
        self._admission = admission
        self._observer = observer
        self._events: Events = []

    def open_requests(self) -> list[Request]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    def waiting_for(self, key: str) -> list[Request]:
        """Requests that cannot begin before the variant of this key has a slot."""
        waiting = self._scheduler.waiting
        return [r for r in waiting if r.variant.key == key and r.slot is None]

    def take_events(self) -> Events:
        """What is to be published; it is forgotten here."""
        events, self._events = self._events, []
        return events

    def emit(self, request: Request, event: Event) -> None:
        self._events.append((request, event))

    def fail(self, request: Request, error: ServeError) -> None:
        """End a request with an error, unless it has ended already."""
        if request.status is Status.FINISHED:
            return
        request.finish_reason = "error"
        self.emit(request, error)
        self.close(request)

    def abort(self, request: Request) -> None:
        """Its client wants no more of it: no event follows."""
        if request.status is not Status.FINISHED:
            request.finish_reason = "abort"
            self.close(request)

    def close(self, request: Request) -> None:
        """End a request; what it holds goes back once no step in flight has a row of it."""
        if not self._lookahead.keeps(request):
            self.release(request)

    def release(self, request: Request) -> None:
        """KV blocks and slot go back."""
        self._scheduler.remove(request)
        if request.slot is None:
            key = request.variant.key
            self._residents.forget(key, waits=bool(self.waiting_for(key)))
        self._residents.release(request)
        started_at = request.started_at
        waited_s = None if started_at is None else started_at - request.queued_at
        self._admission.leave(waited_s, request.principal)
        if self._observer is not None:
            self._observer.on_finished(request)

    def expire(self) -> None:
        """Fail the requests whose deadline has passed."""
        now = time.monotonic()
        for request in self.open_requests():
            if request.deadline is not None and now > request.deadline:
                self.fail(request, self._too_late(request))

    def _too_late(self, request: Request) -> ServeError:
        why = self._residents.why_waiting(request)
        return why or DeadlineExceeded("the request ran out of its time")
