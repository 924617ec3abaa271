"""One generation inside the engine: WAITING -> RUNNING -> FINISHED (and back on preemption)."""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server.deltas.slots import Slot
from server.engine.types import FinishReason, SamplingParams
from server.engine.variant import Variant
from server.errors import GenerationFailed, ServeError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log probability and the best alternatives, best first, as ids.

    `logprob` is None for a prompt's first token.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step added to one request. The engine knows ids only; text comes later.

    token_id       None if only the prompt was to be scored
    may_stop       whether a stop string may end the text here (`min_tokens` are there)
    finish_reason  set on the last one, as far as ids and lengths can tell
    stop_reason    the stop token that ended it
    """

    token_id: int | None
    score: TokenScore | None = None
    prompt_scores: tuple[TokenScore, ...] = ()  # on the first event only
    may_stop: bool = True
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    n_cached_tokens: int = 0


Event = StepOutput | ServeError


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
    slot        held from admission (or the arrival of its delta) to the end; None for the base
    n_settled_kv_blocks  leading KV blocks that are findable by others, or never will be
    cache_salt  only requests of the same salt find each other's KV blocks: who shares none cannot
                tell by its time to the first token what others have sent
    n_cached_tokens  prompt tokens whose keys and values were already there at admission
    unproven    its KV blocks hold keys and values that no finite logits have come from yet
    deliver     takes each event; called by whoever `publish` hands the step's events to
    """

    request_id: str
    variant: Variant
    prompt_ids: list[int]
    params: SamplingParams
    deliver: Callable[[Event], None]
    deadline: float | None = None  # time.monotonic()
    cache_salt: str = ""
    status: Status = Status.WAITING
    tokens: list[int] = field(default_factory=list)
    kv_blocks: list[int] = field(default_factory=list)
    n_computed: int = 0
    slot: Slot | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)
    n_preemptions: int = 0
    unproven: bool = False
    n_settled_kv_blocks: int = 0
    n_cached_tokens: int = 0
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)

    @property
    def cache_key(self) -> str:
        """What requests must share to share KV blocks, beside the tokens: the delta's digest and
        mode, which determine keys and values, and the caller's salt.
        """
        return f"{self.variant.key}\n{self.cache_salt}"

    @property
    def n_output(self) -> int:
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def slot_index(self) -> int:
        return -1 if self.slot is None else self.slot.index


def as_serve_error(error: Exception) -> ServeError:
    """Return what clients may hear of an exception in one request's share of a step."""
    if isinstance(error, ServeError):
        return error
    log.exception("a request failed", exc_info=error)
    return GenerationFailed("this request failed inside the engine; other requests go on")
