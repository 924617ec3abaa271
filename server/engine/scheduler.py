"""Which tokens run in the next engine step.

Continuous batching: every running request decodes one token; what is left of the token budget goes
to prefill chunks, oldest request first. When pages run out the youngest request is preempted: its
pages are freed and it will be recomputed. A waiting request whose variant is being read from disk
is passed over, never waited for. One that is passed over for another reason is overtaken for
`MAX_OVERTAKEN_S` at most: where too many variants are mixed already, no later request is admitted
any more; where every slot is held, no later request takes another hold, so that one comes free.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.deltas.slots import Slot
from server.engine.pages import PagePool
from server.engine.request import Request, Status
from server.engine.variant import BASE_KEY

MAX_OVERTAKEN_S = 2.0


class Missing(enum.Enum):
    """Why a request cannot have its variant's slot now."""

    LOADING = "loading"
    NO_ROOM = "no room"


Acquire = Callable[[Request], Slot | Missing]


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
        wipe: Callable[[list[int]], None],
    ) -> None:
        self.pages = pages
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_variants = max_variants
        self._acquire = acquire
        self._wipe = wipe
        self.n_preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's chunks and make sure their pages exist."""
        n_preemptions = self.n_preemptions
        batch = self._schedule_running()
        if self.n_preemptions == n_preemptions:  # else whoever was put back would return at once
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
        self._release(request)
        request.n_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.n_preemptions += 1

    def _admit(self, batch: list[Scheduled], budget: int) -> None:
        variants = {r.variant.key for r in self.running}
        now = time.monotonic()
        may_hold = True
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._max_num_seqs:
                return
            overdue = now - request.arrived > MAX_OVERTAKEN_S
            missing = self._hold_slot(request, may_hold)
            if missing is not None:
                may_hold = may_hold and not (missing is Missing.NO_ROOM and overdue)
                continue
            if request.variant.key not in variants and len(variants) >= self._max_variants:
                if overdue:
                    return
                continue
            self._reuse_prefix(request)
            n_tokens = min(len(request.tokens) - request.n_computed, budget)
            if not self.pages.grow(request.pages, request.n_computed + n_tokens):
                self._release(request)
                return
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            if request.admitted is None:
                request.admitted = now
            variants.add(request.variant.key)
            batch.append(Scheduled(request, n_tokens))
            budget -= n_tokens

    def _reuse_prefix(self, request: Request) -> None:
        """Begin with the pages of the longest known prefix. Prompt logprobs need every row."""
        if request.params.prompt_logprobs:
            return
        request.pages = self.pages.match(request.cache_key, request.tokens)
        request.n_settled_pages = len(request.pages)
        request.n_computed = len(request.pages) * self.pages.page_tokens
        if request.admitted is None:
            request.n_cached_tokens = request.n_computed

    def computed(self, request: Request) -> None:
        """Finite logits came from all of the request's keys and values: others may reuse them."""
        request.unproven = False
        n_full = request.n_computed // self.pages.page_tokens
        if n_full > request.n_settled_pages:
            request.n_settled_pages = self.pages.remember(
                request.cache_key, request.tokens, request.pages, request.n_settled_pages, n_full
            )

    def _hold_slot(self, request: Request, may_hold: bool) -> Missing | None:
        """Give the request its variant's slot, held to its end. Says why if that cannot be."""
        if request.slot is not None or request.variant.key == BASE_KEY:
            return None
        answer = self._acquire(request) if may_hold else Missing.NO_ROOM
        if isinstance(answer, Missing):
            return answer
        request.slot = answer
        return None

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages go back."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)
        request.status = Status.FINISHED

    def _release(self, request: Request) -> None:
        """Give the pages back; nobody may find a NaN in them (padding is read, and 0 * NaN)."""
        if request.unproven:
            self._wipe(self.pages.private(request.pages))
            request.unproven = False
        self.pages.release(request.pages)
        request.n_computed = request.n_settled_pages = 0


def _remaining_is_many(request: Request) -> bool:
    return len(request.tokens) - request.n_computed > 1
