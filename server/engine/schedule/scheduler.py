"""Which tokens run in the next engine step.

Continuous batching: every running request decodes one token; what the `PrefillPacer` allows beside
goes to prefill chunks, oldest request first. One long prompt is computed at a time: until it is
done half of each step's allowance is its own, shorter prompts share the other half and overtake
later long ones. The `RequestQueue` says whose turn it is, and who is preempted when KV blocks or
places run out: a preempted request's KV blocks are freed, and it will be recomputed. A waiting
request whose variant is being read from disk is passed over, never waited for. One that is passed
over for another reason is overtaken for `MAX_OVERTAKEN_S` at most: where too many variants are
mixed already, no later request is admitted any more; where every slot is held, no later request
takes another hold, so that one comes free, and where a tenant's own bound is reached, none of its.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.deltas.slots import Slot
from server.engine.request import Request, Status
from server.engine.schedule.kv_blocks import KVBlockPool
from server.engine.schedule.pacing import Allowance, PrefillPacer
from server.engine.schedule.queue import RequestQueue
from server.engine.schedule.scheduled import Scheduled, remaining
from server.engine.variant import BASE_KEY

MAX_OVERTAKEN_S = 2.0
LONG_PREFILL_SHARE = 0.5  # of a step's prefill, for the long prompt while others wait
RETRY_S = 0.1  # until those that found no place are tried again, if their turn may come with time


class Missing(enum.Enum):
    """Why a request cannot have its variant's slot now."""

    LOADING = "loading"
    NO_ROOM = "no room"
    OVER_BOUND = "over its tenant's bound"  # which is that tenant's matter: nobody makes way


Acquire = Callable[[Request], Slot | Missing]


class Verdict(enum.Enum):
    """Whether a candidate starts in this step."""

    NOW = "now"
    NOT_NOW = "not now"
    NOBODY_LATER = "nobody later"  # neither this one nor any after it


@dataclass(slots=True)
class _Turn:
    """What is known while the candidates of one step are tried.

    variants       of the requests that run
    may_hold       whether a candidate may take another hold of a slot
    full           tenants whose candidates may not, since one of theirs waits for its own room
    first_blocked  the first that found no place for its variant
    stuck          tenants for whom nobody gave way, with or without a place for a variant
    gave_way       tenants of requests that were preempted for others
    """

    now: float
    variants: set[str]
    long_runs: bool
    may_hold: bool = True
    full: set[str] = field(default_factory=set)
    first_blocked: Request | None = None
    stuck: set[tuple[str, bool]] = field(default_factory=set)
    gave_way: set[str] = field(default_factory=set)


class Scheduler:
    """Queues and KV block accounting. Engine thread only."""

    def __init__(
        self,
        kv_blocks: KVBlockPool,
        waiting: RequestQueue,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_variants: int,
        long_prefill_tokens: int,
        pacer: PrefillPacer,
        acquire: Acquire,
        let_go: Callable[[Request], None],
        wipe: Callable[[list[int]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv_blocks = kv_blocks
        self.waiting = waiting
        self.running: list[Request] = []
        self.max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_variants = max_variants
        self._long_prefill_tokens = long_prefill_tokens
        self._pacer = pacer
        self._acquire, self._let_go = acquire, let_go
        self._wipe = wipe
        self._clock = clock
        self.n_preemptions = 0
        self._nobody_fits = False
        self._tried_at = 0.0

    def add(self, request: Request) -> None:
        self.waiting.add(request)
        self.changed()

    def changed(self) -> None:
        """Something has come or gone that may let a waiting request in."""
        self._nobody_fits = False

    @property
    def may_admit(self) -> bool:
        """Whether a request that waits could join the next step, as far as is known: not if none
        could when it was last tried, and nothing has changed.
        """
        if self._nobody_fits and self.waiting.shifts:
            return bool(self.waiting) and self._clock() - self._tried_at > RETRY_S
        return bool(self.waiting) and not self._nobody_fits

    def has_claim(self) -> bool:
        """Whether who is next may take the place of a request that runs."""
        first = next(self.waiting.candidates(), None)
        return first is not None and bool(
            self.waiting.gives_way(first, self.running, variant=False)
        )

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's chunks and make sure their KV blocks exist."""
        before = len(self.waiting), self.n_preemptions
        batch: list[Scheduled] = []
        # Decodes are single tokens and must not wait behind prompts.
        self._extend(batch, [r for r in self.running if remaining(r) == 1], None)
        prefills = [r for r in self.running if remaining(r) > 1]
        allowance = self._pacer.allowance(
            (s.request.n_computed for s in batch),
            self._max_batch_tokens - len(batch),
            min(len(prefills) + len(self.waiting), self.max_num_seqs - len(batch)),
        )
        long = [r for r in prefills if self._is_long(remaining(r))]
        if long and (len(prefills) > len(long) or self.waiting):
            allowance.keep(LONG_PREFILL_SHARE)
        self._extend(batch, [r for r in prefills if r not in long], allowance)
        if self.n_preemptions == before[1]:  # else whoever was put back would return at once
            self._admit(batch, allowance, bool(long))
        allowance.give_back()
        self._extend(batch, long, allowance)
        nobody_moved = before == (len(self.waiting), self.n_preemptions)
        self._nobody_fits = nobody_moved and all(item.is_decode for item in batch)
        self._tried_at = self._clock()
        return batch

    def _is_long(self, n_tokens: int) -> bool:
        return n_tokens > self._long_prefill_tokens

    def _extend(
        self, batch: list[Scheduled], requests: list[Request], allowance: Allowance | None
    ) -> None:
        """Add a chunk of each running request; its decode token if there is no allowance."""
        for request in requests:
            if request.status is not Status.RUNNING:
                continue  # preempted by an earlier iteration
            if allowance is None:
                n_tokens = min(1, self._max_batch_tokens - len(batch))
            else:
                n_tokens = allowance.grant(request.n_computed, remaining(request))
            if n_tokens == 0:
                return
            if self._make_room(request, request.n_computed + n_tokens, batch):
                self._take(batch, request, n_tokens)

    def _take(self, batch: list[Scheduled], request: Request, n_tokens: int) -> None:
        """Add a chunk; its tenant pays for a prompt's token once, however often it is computed."""
        batch.append(Scheduled(request, n_tokens))
        end = min(request.n_computed + n_tokens, len(request.prompt_ids))
        if (n_new := end - max(request.n_computed, request.n_charged)) > 0:
            self.waiting.charge(request, n_new, 0)
            request.n_charged = end

    def _make_room(self, request: Request, n_tokens: int, batch: list[Scheduled]) -> bool:
        """Grow the request's KV blocks; False if it is preempted itself."""
        while not self.kv_blocks.grow(request.kv_blocks, n_tokens):
            chosen = {item.request for item in batch}
            victim = self.waiting.gives_blocks(request, self.running, chosen)
            self._preempt(victim, batch)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, batch: list[Scheduled]) -> None:
        batch[:] = [item for item in batch if item.request is not request]
        self.running.remove(request)
        self._release(request)
        request.n_preemptions += 1
        request.status = Status.WAITING
        self.waiting.put_back(request)
        self.n_preemptions += 1

    def _admit(self, batch: list[Scheduled], allowance: Allowance, long_runs: bool) -> None:
        """Start those that wait, in the queue's order, as far as there is room."""
        variants = {request.variant.key for request in self.running}
        turn = _Turn(self._clock(), variants, long_runs)
        for request in self.waiting.candidates():
            if request.principal.tenant in turn.gave_way:
                return
            is_full = len(self.running) >= self.max_num_seqs
            is_new = request.variant.key not in turn.variants
            no_variant = is_new and len(turn.variants) >= self._max_variants
            way = self._way_for(request, turn, variant=no_variant) if is_full or no_variant else []
            if is_full and not way:
                return
            match self._may_start(request, turn, is_blocked=no_variant and not way):
                case Verdict.NOBODY_LATER:
                    return
                case Verdict.NOT_NOW:
                    continue
            if not self._start(request, way, batch, allowance, turn):
                return

    def _way_for(self, request: Request, turn: _Turn, *, variant: bool) -> list[Request]:
        """Who gives way to a request; a tenant for whom nobody did is not tried twice."""
        tried = request.principal.tenant, variant
        if tried in turn.stuck:
            return []
        way = self.waiting.gives_way(request, self.running, variant=variant)
        if not way:
            turn.stuck.add(tried)
        return way

    def _may_start(self, request: Request, turn: _Turn, *, is_blocked: bool) -> Verdict:
        """Say whether a request has what it needs beside KV blocks.

        is_blocked  the step has no place for its variant
        """
        overdue = turn.now - request.queued_at > MAX_OVERTAKEN_S
        missing = self._hold_slot(request, turn)
        if missing is not None:
            if missing is Missing.NO_ROOM and turn.may_hold:
                turn.may_hold = not (self._makes_slot(request) or overdue)
            if overdue and missing is Missing.OVER_BOUND:
                turn.full.add(request.principal.tenant)
            return Verdict.NOT_NOW
        if is_blocked:
            turn.first_blocked = turn.first_blocked or request
            return Verdict.NOBODY_LATER if overdue else Verdict.NOT_NOW
        blocked = turn.first_blocked
        if blocked is not None and not self.waiting.may_overtake(request, blocked):
            return Verdict.NOBODY_LATER
        if turn.long_runs and self._has_long_prefill(request):
            return Verdict.NOT_NOW
        return Verdict.NOW

    def _makes_slot(self, request: Request) -> bool:
        """Whether others that wait have let a slot go for a request's variant. The loader takes
        it after this step; until then nobody is to hold it again.
        """
        holders = self.waiting.lets_go(request, self.running)
        for holder in holders:
            self._let_go(holder)
        return bool(holders)

    def _start(
        self,
        request: Request,
        way: list[Request],
        batch: list[Scheduled],
        allowance: Allowance,
        turn: _Turn,
    ) -> bool:
        """Start a request in place of those that give way; False if it cannot have KV blocks."""
        self._reuse_prefix(request)
        is_long = self._is_long(remaining(request))
        n_tokens = allowance.grant(request.n_computed, remaining(request))
        for other in way if n_tokens else ():
            self._put_aside(other, batch, turn)
        if n_tokens == 0 or not self._find_room(request, n_tokens, batch, turn):
            self._release(request)
            return False
        self.waiting.start(request)
        self.running.append(request)
        request.status = Status.RUNNING
        if request.started_at is None:
            request.started_at = turn.now
        self._take(batch, request, n_tokens)
        turn.variants.add(request.variant.key)
        turn.long_runs = turn.long_runs or is_long
        turn.stuck.clear()
        return True

    def _find_room(
        self, request: Request, n_tokens: int, batch: list[Scheduled], turn: _Turn
    ) -> bool:
        """Grow the KV blocks of a request that is to start: of a preempted one for all that is
        known of it, else it would soon be preempted again.
        """
        n_tokens += request.n_computed
        needed = len(request.tokens) if request.n_preemptions else n_tokens
        n_blocks = self.kv_blocks.needed(needed) - len(request.kv_blocks)
        while n_blocks > self.kv_blocks.n_free:
            other = self.waiting.gives_room(request, self.running, n_blocks)
            if other is None:
                return False
            self._put_aside(other, batch, turn)
        return self.kv_blocks.grow(request.kv_blocks, n_tokens)

    def _put_aside(self, request: Request, batch: list[Scheduled], turn: _Turn) -> None:
        """Preempt a request for one that is to start."""
        turn.gave_way.add(request.principal.tenant)
        self._preempt(request, batch)
        turn.variants = {other.variant.key for other in self.running}

    def _has_long_prefill(self, request: Request) -> bool:
        """Whether much of a waiting request is left to compute beyond the known prefix."""
        if not self._is_long(len(request.tokens)):
            return False
        known = 0
        if not request.params.prompt_logprobs:
            known = self.kv_blocks.n_known(request.cache_key, request.tokens)
        return self._is_long(len(request.tokens) - known)

    def _reuse_prefix(self, request: Request) -> None:
        """Begin with the KV blocks of the longest known prefix. Prompt logprobs need every row."""
        if request.params.prompt_logprobs:
            return
        request.kv_blocks = self.kv_blocks.match(request.cache_key, request.tokens)
        request.n_settled_kv_blocks = len(request.kv_blocks)
        request.n_computed = len(request.kv_blocks) * self.kv_blocks.block_tokens
        if request.started_at is None:
            request.n_cached_tokens = request.n_computed

    def computed(self, request: Request) -> None:
        """Finite logits came from all of the request's keys and values: others may reuse them."""
        request.unproven = False
        if request.params.max_tokens:
            self.waiting.charge(request, 0, 1)
        n_full = request.n_computed // self.kv_blocks.block_tokens
        if n_full > request.n_settled_kv_blocks:
            request.n_settled_kv_blocks = self.kv_blocks.remember(
                request.cache_key,
                request.tokens,
                request.kv_blocks,
                request.n_settled_kv_blocks,
                n_full,
            )

    def _hold_slot(self, request: Request, turn: _Turn) -> Missing | None:
        """Give the request its variant's slot, held to its end. Says why if that cannot be."""
        if request.slot is not None or request.variant.key == BASE_KEY:
            return None
        if request.principal.tenant in turn.full:
            return Missing.OVER_BOUND
        answer = self._acquire(request) if turn.may_hold else Missing.NO_ROOM
        if isinstance(answer, Missing):
            return answer
        request.slot = answer
        return None

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its KV blocks go back."""
        if request in self.running:
            self.running.remove(request)
        self.waiting.end(request)
        self._release(request)
        request.status = Status.FINISHED
        self.changed()

    def _release(self, request: Request) -> None:
        """Give the KV blocks back; nobody may find a NaN in them (padding is read, and 0 * NaN)."""
        if request.unproven:
            self._wipe(self.kv_blocks.private(request.kv_blocks))
            request.unproven = False
        self.kv_blocks.release(request.kv_blocks)
        request.kv_blocks = []  # never used again: KV block tables know a list by its identity
        request.n_computed = request.n_settled_kv_blocks = 0
