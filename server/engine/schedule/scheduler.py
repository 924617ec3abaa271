"""Which tokens run in the next engine step.

Continuous batching: every running request decodes one token; what the `PrefillPacer` allows beside
goes to prefill chunks, oldest request first. One long prompt is computed at a time: until it is
done half of each step's allowance is its own, shorter prompts share the other half and overtake
later long ones. When KV blocks run out the youngest request is preempted: its KV blocks are freed
and it will be recomputed. A waiting request whose variant is being read from disk is passed over,
never waited for. One that is passed over for another reason is overtaken for `MAX_OVERTAKEN_S` at
most: where too many variants are mixed already, no later request is admitted any more; where every
slot is held, no later request takes another hold, so that one comes free.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.deltas.slots import Slot
from server.engine.request import Request, Status
from server.engine.schedule.kv_blocks import KVBlockPool
from server.engine.schedule.pacing import Allowance, PrefillPacer, StepLoad
from server.engine.variant import BASE_KEY

MAX_OVERTAKEN_S = 2.0
LONG_PREFILL_SHARE = 0.5  # of a step's prefill, for the long prompt while others wait


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
    """Queues and KV block accounting. Engine thread only."""

    def __init__(
        self,
        kv_blocks: KVBlockPool,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_variants: int,
        long_prefill_tokens: int,
        pacer: PrefillPacer,
        acquire: Acquire,
        wipe: Callable[[list[int]], None],
    ) -> None:
        self.kv_blocks = kv_blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_variants = max_variants
        self._long_prefill_tokens = long_prefill_tokens
        self._pacer = pacer
        self._acquire = acquire
        self._wipe = wipe
        self.n_preemptions = 0
        self._nobody_fits = False

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.changed()

    def changed(self) -> None:
        """Something has come or gone that may let a waiting request in."""
        self._nobody_fits = False

    @property
    def may_admit(self) -> bool:
        """Whether a request that waits could join the next step, as far as is known: not if none
        could when it was last tried, and nothing has changed.
        """
        return bool(self.waiting) and not self._nobody_fits

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's chunks and make sure their KV blocks exist."""
        n_preemptions, n_waiting = self.n_preemptions, len(self.waiting)
        batch: list[Scheduled] = []
        # Decodes are single tokens and must not wait behind prompts.
        self._extend(batch, [r for r in self.running if _remaining(r) == 1], None)
        prefills = [r for r in self.running if _remaining(r) > 1]
        allowance = self._pacer.allowance(
            (s.request.n_computed for s in batch),
            self._max_batch_tokens - len(batch),
            min(len(prefills) + len(self.waiting), self.max_num_seqs - len(batch)),
        )
        long = [r for r in prefills if self._is_long(_remaining(r))]
        if long and (len(prefills) > len(long) or self.waiting):
            allowance.keep(LONG_PREFILL_SHARE)
        self._extend(batch, [r for r in prefills if r not in long], allowance)
        if self.n_preemptions == n_preemptions:  # else whoever was put back would return at once
            self._admit(batch, allowance, bool(long))
        allowance.give_back()
        self._extend(batch, long, allowance)
        self._nobody_fits = len(self.waiting) == n_waiting and all(map(_is_decode, batch))
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
                n_tokens = allowance.grant(request.n_computed, _remaining(request))
            if n_tokens == 0:
                return
            if self._make_room(request, request.n_computed + n_tokens, batch):
                batch.append(Scheduled(request, n_tokens))

    def _make_room(self, request: Request, n_tokens: int, batch: list[Scheduled]) -> bool:
        """Grow the request's KV blocks, preempting the youngest others not yet in the batch."""
        chosen = {id(s.request) for s in batch}
        while not self.kv_blocks.grow(request.kv_blocks, n_tokens):
            younger = self.running[self.running.index(request) :]
            victim = next((r for r in reversed(younger) if id(r) not in chosen), request)
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

    def _admit(self, batch: list[Scheduled], allowance: Allowance, long_runs: bool) -> None:
        variants = {r.variant.key for r in self.running}
        now = time.monotonic()
        may_hold = True
        for request in list(self.waiting):
            if len(self.running) >= self.max_num_seqs:
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
            if long_runs and self._has_long_prefill(request):
                continue
            self._reuse_prefix(request)
            is_long = self._is_long(_remaining(request))
            n_tokens = allowance.grant(request.n_computed, _remaining(request))
            if n_tokens == 0 or not self.kv_blocks.grow(
                request.kv_blocks, request.n_computed + n_tokens
            ):
                self._release(request)
                return
            self.waiting.remove(request)
            self.running.append(request)
            request.status = Status.RUNNING
            if request.admitted is None:
                request.admitted = now
            variants.add(request.variant.key)
            batch.append(Scheduled(request, n_tokens))
            long_runs = long_runs or is_long

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
        if request.admitted is None:
            request.n_cached_tokens = request.n_computed

    def computed(self, request: Request) -> None:
        """Finite logits came from all of the request's keys and values: others may reuse them."""
        request.unproven = False
        n_full = request.n_computed // self.kv_blocks.block_tokens
        if n_full > request.n_settled_kv_blocks:
            request.n_settled_kv_blocks = self.kv_blocks.remember(
                request.cache_key,
                request.tokens,
                request.kv_blocks,
                request.n_settled_kv_blocks,
                n_full,
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
        """Take a request out, wherever it is; its KV blocks go back."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
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


def _remaining(request: Request) -> int:
    return len(request.tokens) - request.n_computed


def _is_decode(item: Scheduled) -> bool:
    return item.n_tokens == 1 and item.request.n_computed > 0


def load_of(batch: Sequence[Scheduled]) -> StepLoad:
    """What a batch has to compute; ask before it is accounted for."""
    decodes = [s.request.n_computed for s in batch if _is_decode(s)]
    load = StepLoad(len(decodes), sum(decodes))
    for item in batch:
        if not _is_decode(item):
            load = load.with_chunk(item.request.n_computed, item.n_tokens)
    return load
