"""What each tenant was served of late: the virtual token counter (Sheng et al., OSDI 2024).

A token of a prompt counts 1, a new token 2 (it takes a step of its own, and its keys and values
stay), both divided by the tenant's weight. What was found in the prefix cache is not computed and
counts nothing. Counts are halved every `HALF_LIFE_S`, so that old days are no debt. A tenant that
comes back is lifted to the least served of those that wait: who asked for nothing has saved nothing
up. One that is gone is forgotten when what it was served has faded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.engine.request import Request
from server.tenants.principal import Principal

HALF_LIFE_S = 60.0
INPUT_COST = 1.0
OUTPUT_COST = 2.0
MAX_HALF_LIVES = 30.0  # between two times that all counts are halved in fact
FORGOTTEN_TOKENS = 1.0  # less than this is nothing


@dataclass(slots=True, eq=False)
class Standing:
    """One tenant: what waits, how much runs, and what it was served.

    served  tokens divided by the weight, in the counters' present unit
    """

    tenant: str
    weight: float = 1.0
    served: float = 0.0
    n_running: int = 0
    waiting: OrderedDict[Request, None] = field(default_factory=OrderedDict)

    @property
    def is_open(self) -> bool:
        return self.n_running > 0 or bool(self.waiting)

    @property
    def level(self) -> float:
        """Running requests for its weight."""
        return self.n_running / self.weight


class TokenCounters:
    """The standings of all tenants. Engine thread only.

    Instead of halving all counts all the time, what is added grows: `unit` doubles every
    `HALF_LIFE_S`, and only ratios and differences in units mean anything.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._standings: dict[str, Standing] = {}
        self._last_to_wait: Standing | None = None
        self.unit = 1.0

    def __iter__(self) -> Iterator[Standing]:
        return iter(self._standings.values())

    @property
    def n_open(self) -> int:
        """Tenants with a request that waits or runs."""
        return sum(standing.is_open for standing in self)

    def tick(self) -> None:
        """Let time pass for all counts."""
        half_lives = (self._clock() - self._since) / HALF_LIFE_S
        if half_lives > MAX_HALF_LIVES:
            for standing in self:
                standing.served *= 2.0**-half_lives  # 0.0 after a night
            self._since += half_lives * HALF_LIFE_S
            half_lives = 0.0
        self.unit = 2.0**half_lives

    def of(self, tenant: str) -> Standing:
        """The standing of a tenant that has an open request."""
        return self._standings[tenant]

    def arrive(self, principal: Principal) -> Standing:
        """Return the standing of a tenant that is about to have one more request waiting."""
        self.tick()
        standing = self._standings.get(principal.tenant)
        if standing is None:
            self._forget_faded()
            standing = self._standings[principal.tenant] = Standing(principal.tenant)
        standing.weight = principal.weight
        if not standing.waiting:
            standing.served = max(standing.served, self._least_served())
        return standing

    def leave_queue(self, standing: Standing) -> None:
        """One request of the tenant waits no more."""
        if not standing.waiting:
            self._last_to_wait = standing

    def charge(self, request: Request, n_input: int, n_output: int) -> None:
        """So many tokens are computed for the request."""
        standing = self._standings[request.principal.tenant]
        cost = INPUT_COST * n_input + OUTPUT_COST * n_output
        standing.served += cost * self.unit / standing.weight

    def _least_served(self) -> float:
        """Of the tenants that wait, or of the last that did."""
        waiting = [standing.served for standing in self if standing.waiting]
        if waiting:
            return min(waiting)
        return 0.0 if self._last_to_wait is None else self._last_to_wait.served

    def _forget_faded(self) -> None:
        for standing in list(self):
            is_least = standing.served * standing.weight < FORGOTTEN_TOKENS * self.unit
            if is_least and not standing.is_open:
                del self._standings[standing.tenant]
