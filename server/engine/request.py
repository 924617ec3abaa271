"""One generation inside the engine: WAITING -> RUNNING -> FINISHED (and back on preemption)."""

from __future__ import annotations

import enum
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.deltas.slots import Slot
from server.engine.types import FinishReason, OutputChunk, SamplingParams, TokenLogprob
from server.engine.variant import Variant
from server.errors import GenerationFailed, ServeError
from server.tenants.principal import ANYBODY, Principal

log = logging.getLogger(__name__)


Event = OutputChunk | ServeError  # what a request hears of the engine; a chunk has no text yet


class Status(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Everything the engine knows about one generation.

    tokens      prompt, then output
    n_computed  tokens whose keys and values are in the cache
    n_prompt_computed  the most of the prompt's that ever were there; it stays when they go
    slot        held from its start (or the arrival of its delta) to the end, unless it waits and a
                queue lets it go for another tenant's; None for the base
    n_settled_kv_blocks  leading KV blocks that are findable by others, or never will be
    cache_salt  only requests of the same salt find each other's KV blocks: who shares none cannot
                tell by its time to the first token what others have sent
    n_charged   leading prompt tokens that its tenant has been charged for
    n_cached_tokens  prompt tokens whose keys and values were already there when it started
    noise_key   with a position, all that is random about a draw: the seed, or a random number
    unproven    its KV blocks hold keys and values that no finite logits have come from yet
    deliver     takes each event; called by whoever `publish` hands the step's events to
    deadline    time.monotonic() at which it fails; None: never
    queued_at   when the engine got it, which is later than when it arrived over HTTP
    started_at  when its first chunk was scheduled
    """

    request_id: str
    variant: Variant
    prompt_ids: list[int]
    params: SamplingParams
    deliver: Callable[[Event], None]
    deadline: float | None = None
    cache_salt: str = ""
    principal: Principal = ANYBODY
    priority: int = 0
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list)
    noise_key: int = field(init=False)
    kv_blocks: list[int] = field(default_factory=list)
    n_computed: int = 0
    n_prompt_computed: int = 0
    slot: Slot | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    n_preemptions: int = 0
    unproven: bool = False
    n_settled_kv_blocks: int = 0
    n_charged: int = 0
    n_cached_tokens: int = 0
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)
        seed = self.params.seed
        self.noise_key = secrets.randbits(64) if seed is None else seed

    @property
    def cache_key(self) -> str:
        """What requests must share to share KV blocks, beside the tokens: the delta's digest and
        mode, which determine keys and values, the tenant, and the caller's salt, which is last,
        because it alone may hold line ends.
        """
        return f"{self.variant.key}\n{self.principal.tenant}\n{self.cache_salt}"

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.prompt_ids)

    def advance(self, n_tokens: int) -> None:
        """So many more tokens have their keys and values in the cache."""
        self.n_computed += n_tokens
        if self.n_prompt_computed < len(self.prompt_ids):
            n_prompt = min(self.n_computed, len(self.prompt_ids))
            self.n_prompt_computed = max(self.n_prompt_computed, n_prompt)

    @property
    def queue_s(self) -> float:
        """How long it waited; 0 while it waits."""
        return 0.0 if self.started_at is None else self.started_at - self.queued_at

    @property
    def slot_index(self) -> int:
        return -1 if self.slot is None else self.slot.index


def as_serve_error(error: Exception) -> ServeError:
    """Return what clients may hear of an exception in one request's share of a step."""
    if isinstance(error, ServeError):
        return error
    log.exception("an exception ended one request", exc_info=error)
    return GenerationFailed("this request failed inside the engine; other requests go on")
