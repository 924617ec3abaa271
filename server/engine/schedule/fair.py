"""Fair shares between tenants: tokens decide the order; places and KV blocks are shared, too.

The tenant that was served least for its weight is next (`counters`), its own requests in the order
they came. What is shared is counted in tokens, but held as places among the running requests, as
places for variants in a step and as KV blocks, for as long as an output is. So a tenant that comes
to a server full of another's long outputs would wait for one of them to end. Four rules:

- **A place is taken back, not kept free.** While every place is held, a waiting request of a tenant
  that holds fewer than its share, and was served no more, takes the place of the youngest request
  of the tenant that holds most for its weight; it still holds no more than that one after it, so
  that nothing goes to and fro. Places kept free would idle on every step, and the first burst would
  use them up. A preempted request finds its KV blocks again in the prefix cache when it returns,
  and computes the tokens of its last one twice; so one that is in its prefill goes last of all.
- **KV blocks** go by the same measure. A running request that needs one takes it from whoever holds
  most for its weight, the youngest first, and from its own tenant if that is the one. Who began
  first of all goes on whatever it holds, so that a request larger than its tenant's share ends.
- **Variants** (deficits as in DLPM, arXiv 2501.14312): while a step mixes as many variants as it
  may, a request whose variant is in it overtakes one whose is not, as long as its tenant is no more
  than `QUANTUM_TOKENS` ahead; a tenant below its share has all requests of one variant preempted,
  the variant that fewest run of. Below that limit one variant more costs a step half a percent
  (benchmarks/RESULTS.md), and nobody waits for the sake of it.

- **Slots** of requests that wait (they hold them, so that a variant that was loaded for them stays)
  go back in the same way, from the end of the queue of the tenant whose requests hold most.

With one tenant nobody takes anything from anybody else: who comes first is served first.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from server.engine.request import Request
from server.engine.schedule.counters import Standing, TokenCounters
from server.engine.schedule.fcfs import youngest_after
from server.engine.schedule.scheduled import remaining

QUANTUM_TOKENS = 1024.0  # input tokens of weight 1


class FairQueue:
    """See `server.engine.schedule.queue.RequestQueue`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = TokenCounters(clock)
        self.charge = self.counters.charge  # once for each token: no call more than that
        self._n_waiting = 0

    def __len__(self) -> int:
        return self._n_waiting

    def __iter__(self) -> Iterator[Request]:
        return (request for standing in self.counters for request in standing.waiting)

    @property
    def shifts(self) -> bool:
        return self.counters.n_open > 1

    def add(self, request: Request) -> None:
        self.counters.arrive(request.principal).waiting[request] = None
        self._n_waiting += 1

    def start(self, request: Request) -> None:
        standing = self._standing(request)
        del standing.waiting[request]
        standing.n_running += 1
        self._n_waiting -= 1
        self.counters.leave_queue(standing)

    def put_back(self, request: Request) -> None:
        standing = self._standing(request)
        standing.waiting[request] = None
        standing.waiting.move_to_end(request, last=False)
        standing.n_running -= 1
        self._n_waiting += 1

    def end(self, request: Request) -> None:
        standing = self._standing(request)
        if request in standing.waiting:
            del standing.waiting[request]
            self._n_waiting -= 1
            self.counters.leave_queue(standing)
        else:
            standing.n_running -= 1

    def candidates(self) -> Iterator[Request]:
        """The least served tenant's first; what a candidate's start costs its tenant counts for the
        next one.
        """
        self.counters.tick()
        waiting = [standing for standing in self.counters if standing.waiting]
        heap = [
            (*_turn(standing), index, standing, iter(tuple(standing.waiting)))
            for index, standing in enumerate(waiting)
        ]
        heapq.heapify(heap)
        while heap:
            *_, index, standing, requests = heap[0]
            request = next(requests, None)
            if request is None:
                heapq.heappop(heap)
                continue
            yield request
            heapq.heapreplace(heap, (*_turn(standing), index, standing, requests))

    def may_overtake(self, request: Request, blocked: Request) -> bool:
        ahead = self._standing(request).served - self._standing(blocked).served
        return ahead <= QUANTUM_TOKENS * self.counters.unit

    # -- who gives way ---------------------------------------------------------------------------

    def gives_way(
        self, request: Request, running: Sequence[Request], *, variant: bool
    ) -> list[Request]:
        own = self._standing(request)
        if self.counters.n_open < 2:
            return []
        if variant:
            return self._variant_that_gives_way(own, running)
        most = max(self.counters, key=lambda standing: standing.level)
        if not _may_take(own, most, 1):
            return []
        theirs = [other for other in running if other.principal.tenant == most.tenant]
        return [_youngest([other for other in theirs if remaining(other) == 1] or theirs)]

    def _variant_that_gives_way(self, own: Standing, running: Sequence[Request]) -> list[Request]:
        """Return all running requests of the variant that fewest run of, if that can be had."""
        by_variant: dict[str, list[Request]] = defaultdict(list)
        for other in running:
            by_variant[other.variant.key].append(other)
        oldest = _oldest(running)
        for group in sorted(by_variant.values(), key=len):
            if oldest in group:
                continue
            tenants = Counter(other.principal.tenant for other in group)
            if all(_may_take(own, self.counters.of(name), n) for name, n in tenants.items()):
                return group
        return []

    def gives_room(self, request: Request, running: Sequence[Request], n: int) -> Request | None:
        own, held = self._standing(request), self._kv_blocks_held(running)
        most = self._most(held)
        if most is None or most is own or own.served > most.served:
            return None
        other = _youngest(other for other in running if other.principal.tenant == most.tenant)
        left = (held[most.tenant] - len(other.kv_blocks)) / most.weight
        wanted = held[own.tenant] + len(request.kv_blocks) + n
        return other if left >= wanted / own.weight else None

    def lets_go(self, request: Request, running: Sequence[Request]) -> list[Request]:
        own = self._standing(request)
        if self.counters.n_open < 2:
            return []
        held: dict[str, set[str]] = {own.tenant: set()}
        for other in (*running, *self):
            if other.slot is not None:
                held.setdefault(other.principal.tenant, set()).add(other.variant.key)
        levels = {name: len(keys) / self.counters.of(name).weight for name, keys in held.items()}
        most = self.counters.of(max(levels, key=lambda name: levels[name]))
        left, wanted = len(held[most.tenant]) - 1, len(held[own.tenant]) + 1
        if own.served > most.served or left / most.weight < wanted / own.weight:
            return []
        in_use = {other.variant.key for other in running}
        for last in reversed(most.waiting):
            if last.slot is not None and last.variant.key not in in_use:
                holders = [r for r in self if r.slot is last.slot]
                if all(holder.principal.tenant == most.tenant for holder in holders):
                    return holders
        return []

    def gives_blocks(
        self, request: Request, running: Sequence[Request], batch: Collection[Request]
    ) -> Request:
        own, oldest = self._standing(request), _oldest(running)
        most = self._most(self._kv_blocks_held(running))
        if most is not None and most is not own:
            theirs = [r for r in running if r.principal.tenant == most.tenant and r is not oldest]
            if theirs:
                return _youngest(theirs)
        ours = [other for other in running if other.principal.tenant == own.tenant]
        victim = youngest_after(request, ours, batch)
        if victim is request is oldest and len(running) > 1:
            return _youngest(other for other in running if other is not request)
        return victim

    def _standing(self, request: Request) -> Standing:
        return self.counters.of(request.principal.tenant)

    def _kv_blocks_held(self, running: Sequence[Request]) -> Counter[str]:
        held: Counter[str] = Counter()
        for request in running:
            held[request.principal.tenant] += len(request.kv_blocks)
        return held

    def _most(self, held: Counter[str]) -> Standing | None:
        """Whoever holds most for its weight."""
        standings = map(self.counters.of, held)
        return max(standings, key=lambda s: held[s.tenant] / s.weight, default=None)


def _turn(standing: Standing) -> tuple[float, float]:
    """Who is served next; of equals, who has less running."""
    return standing.served, standing.level


def _may_take(own: Standing, other: Standing, n: int) -> bool:
    """Whether a tenant may have one place more for `n` of the other's: it was served no more, and
    still holds no more than the other does then.
    """
    if own is other or own.served > other.served:
        return False
    return (other.n_running - n) / other.weight >= (own.n_running + 1) / own.weight


def _youngest(requests: Iterable[Request]) -> Request:
    """Return who began last, the time before a preemption counted."""
    return max(enumerate(requests), key=lambda pair: (began(pair[1]), pair[0]))[1]


def _oldest(running: Sequence[Request]) -> Request | None:
    return min(running, key=began, default=None)


def began(request: Request) -> float:
    """When a running request ran for the first time."""
    assert request.started_at is not None, "it runs"
    return request.started_at
