"""Which tokens run in the next engine step.

Continuous batching: every running request decodes one token; what is left of the token budget goes
to prefill chunks, oldest request first. When pages run out the youngest request is preempted: its
pages are freed and it will be recomputed. A waiting request whose variant is not resident is passed
over, never waited for; one that is passed over only because too many variants are mixed already
stops later arrivals from overtaking it after `MAX_OVERTAKEN_S`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.deltas.slots import Slot
from server.engine.pages import PagePool
from server.engine.request import Request, Status

MAX_OVERTAKEN_S = 2.0
# What `acquire` answers: a slot, "none needed" for the base, or not now.
Acquire = Callable[[Request], "Slot | bool"]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`n_tokens` of `request`, from its n_computed on."""

    request: Request
    n_tokens: int

    @property
    def finishes_known_tokens(self) -> bool:
        """Whether the chunk reaches the last known token, so that a new one can be sampled."""
        return self.request.n_computed + self.n_tokens == len(self.request.tokens)


class Scheduler:
    """Queues and page accounting. Engine thread only."""

    def __init__(
        self,
        pages: PagePool,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_variants: int,
        acquire: Acquire,
    ) -> None:
        self.pages = pages
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_variants = max_variants
        self._acquire = acquire
        self.n_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's chunks and make sure their pages exist."""
        batch = self._schedule_running()
        budget = self._max_batch_tokens - sum(s.n_tokens for s in batch)
        self._admit(batch, budget)
        return batch

    def _schedule_running(self) -> list[Scheduled]:
        batch: list[Scheduled] = []
        budget = self._max_batch_tokens
        # Decodes are single tokens and must not wait behind prompts.
        for request in sorted(self.running, key=_remaining_is_many):
            if request.status is not Status.RUNNING:
                continue  # preempted by an earlier iteration
            n_tokens = min(len(request.tokens) - request.n_computed, budget)
            if n_tokens == 0:
                break
            if not self._make_room(request, request.n_computed + n_tokens, batch):
                continue
            batch.append(Scheduled(request, n_tokens))
            budget -= n_tokens
        return batch

    def _make_room(self, request: Request, n_tokens: int, batch: list[Scheduled]) -> bool:
        """Grow the request's pages, preempting the youngest others not yet in the batch."""
        chosen = {id(s.request) for s in batch}
        while not self.pages.grow(request.pages, n_tokens):
            victims = [r for r in self.running if id(r) not in chosen]
            victim = victims[-1] if victims else request
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pages.release(request.pages)
        request.n_computed = 0
        request.n_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.n_preemptions += 1

    def _admit(self, batch: list[Scheduled], budget: int) -> None:
        variants = {r.variant.key for r in self.running}
        now = time.monotonic()
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_num_seqs:
                return
            fresh = request.variant.key not in variants
            if fresh and len(variants) >= self._max_variants:
                if now - request.arrived > MAX_OVERTAKEN_S:
                    return
                continue
            n_tokens = min(len(request.tokens), budget)
            if self.pages.needed(n_tokens) > self.pages.n_free:
                return
            if request.slot is None:
                slot = self._acquire(request)
                if slot is False:
                    continue
                request.slot = None if slot is True else slot
            self.pages.grow(request.pages, n_tokens)
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            if request.admitted is None:
                request.admitted = now
            variants.add(request.variant.key)
            batch.append(Scheduled(request, n_tokens))
            budget -= n_tokens

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages go back."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pages.release(request.pages)
        request.status = Status.FINISHED


def _remaining_is_many(request: Request) -> bool:
    return len(request.tokens) - request.n_computed > 1
