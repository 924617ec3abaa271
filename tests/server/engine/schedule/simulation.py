"""The real scheduler, queue and KV blocks on a clock that the test moves, without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

from server.deltas.slots import Slot
from server.engine.request import Request, Status
from server.engine.schedule.kv_blocks import KVBlockPool
from server.engine.schedule.pacing import PrefillPacer
from server.engine.schedule.queue import Policy, make_queue
from server.engine.schedule.scheduler import Scheduler
from server.engine.types import SamplingParams
from server.engine.variant import BASE_KEY, Variant
from server.tenants.principal import Principal

STEP_S = 0.05


@dataclass
class Spent:
    """Tokens computed for one tenant, recomputed ones not counted."""

    n_input: int = 0
    n_output: int = 0

    @property
    def weighted(self) -> int:
        return self.n_input + 2 * self.n_output


@dataclass
class Simulation:
    """A server without a model: every step takes `STEP_S`."""

    policy: Policy = "fair"
    max_num_seqs: int = 8
    max_variants: int = 8
    n_kv_blocks: int = 1000
    max_batch_tokens: int = 256
    now: float = 1000.0
    spent: dict[str, Spent] = field(default_factory=dict)
    _ids: Any = field(default_factory=count)

    def __post_init__(self) -> None:
        self.queue = make_queue(self.policy, lambda: self.now)
        self.scheduler = Scheduler(
            KVBlockPool(self.n_kv_blocks + 1, 16),
            self.queue,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            max_variants=self.max_variants,
            long_prefill_tokens=self.max_batch_tokens,
            pacer=PrefillPacer(0),
            acquire=lambda request: Slot(0, request.variant.key, 0),
            let_go=lambda request: None,
            wipe=lambda kv_blocks: None,
            clock=lambda: self.now,
        )

    def submit(
        self,
        principal: Principal,
        n_prompt: int = 16,
        n_output: int = 16,
        variant: str = BASE_KEY,
        priority: int = 0,
    ) -> Request:
        number = next(self._ids)
        request = Request(
            f"r{number}",
            cast(Variant, SimpleNamespace(key=variant, name=variant)),
            [number * 10_000 + i for i in range(n_prompt)],
            SamplingParams(max_tokens=n_output),
            deliver=lambda event: None,
            principal=principal,
            priority=priority,
            queued_at=self.now,
        )
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        for item in self.scheduler.schedule():
            request, spent = (
                item.request,
                self.spent.setdefault(item.request.principal.tenant, Spent()),
            )
            finishes = item.finishes_known_tokens
            n_before, request.n_computed = request.n_computed, request.n_computed + item.n_tokens
            request.unproven = True
            if request.n_preemptions == 0:
                n_prompt = len(request.prompt_ids)
                spent.n_input += max(0, min(request.n_computed, n_prompt) - n_before)
            if finishes:
                self.scheduler.computed(request)
                request.tokens.append(0)
                spent.n_output += 1
                if request.n_output == request.params.max_tokens:
                    self.scheduler.remove(request)
        self.now += STEP_S

    def run(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.step()

    def steps_until(self, *requests: Request, most: int = 10_000) -> int:
        """Step until all have ended; return how many steps that took."""
        for n_steps in range(most):
            if all(request.status is Status.FINISHED for request in requests):
                return n_steps
            self.step()
        raise AssertionError(f"they had not ended after {most} steps")

    def steps_until_started(self, request: Request, most: int = 1000) -> int:
        for n_steps in range(most):
            if request.started_at is not None:
                return n_steps
            self.step()
        raise AssertionError(f"it had not started after {most} steps")

    def assert_idle(self) -> None:
        """Nothing is left of anybody."""
        assert not self.scheduler.running
        assert len(self.queue) == 0 == len(list(self.queue))
        assert self.scheduler.kv_blocks.n_free == self.n_kv_blocks

    def n_running(self, principal: Principal) -> int:
        return sum(r.principal.tenant == principal.tenant for r in self.scheduler.running)


class Backlog:
    """Keeps `n_open` requests of one tenant in the server."""

    def __init__(
        self, simulation: Simulation, principal: Principal, n_open: int, **shape: Any
    ) -> None:
        self.simulation, self.principal = simulation, principal
        self.n_open, self.shape = n_open, shape
        self.requests: list[Request] = []
        self._open: list[Request] = []

    def top_up(self) -> None:
        self._open = [request for request in self._open if request.status is not Status.FINISHED]
        for _ in range(self.n_open - len(self._open)):
            request = self.simulation.submit(self.principal, **self.shape)
            self._open.append(request)
            self.requests.append(request)


def run_with(simulation: Simulation, n_steps: int, *backlogs: Backlog) -> None:
    """Step, with the backlogs kept."""
    for _ in range(n_steps):
        for backlog in backlogs:
            backlog.top_up()
        simulation.step()
