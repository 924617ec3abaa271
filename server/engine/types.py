"""Plain data that crosses between the HTTP layer and the engine. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort", "error"]
VariantState = Literal["registered", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Bounds are checked at the edge (`server.api`)."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # None: off; k: the chosen token and the k best
    prompt_logprobs: bool = False  # with `logprobs`: also for the prompt's tokens


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative at one position."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The token at one position. `logprob` is None for a prompt's first token."""

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one engine step added to one request.

    text is what may be shown now (text that might become a stop string is held back), so it
    can be empty although token_ids is not. The last one has a finish_reason.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # on the first event only
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    n_cached_tokens: int = 0

    @classmethod
    def joined(cls, deltas: Sequence[OutputDelta]) -> OutputDelta:
        """Return several that followed each other as one."""
        first, last = deltas[0], deltas[-1]
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
            logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
            prompt_logprobs=first.prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            n_cached_tokens=last.n_cached_tokens,
        )


class Generation(Protocol):
    """A running generation as its reader sees it. Event loop only."""

    @property
    def error(self) -> Exception | None:
        """Why it ended early; what `take` gave before still counts."""
        ...

    def take(self) -> Sequence[OutputDelta]:
        """Return what came since the last call, oldest first."""
        ...

    def close(self) -> None:
        """Abort it unless it has ended; nothing comes any more."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One entry of ``GET /v1/models``."""

    name: str
    parent: str | None  # the base's name, None for the base itself
    digest: str | None  # sha256 of the artifact, None for the base
    state: VariantState
    created_s: int  # unix time of registration
    max_model_len: int
    n_bytes: int = 0  # artifact bytes on disk
    resident_bytes: int = 0  # device bytes held now
    reconstructed_bytes: int = 0  # device bytes of a hot variant's weights, more
    mode: str = "apply"
    codec: str = ""
    error: str | None = None  # why it failed, safe to show
    fidelity: dict[str, Any] = field(default_factory=dict)


class VariantHandle(Protocol):
    """A served model pinned to one digest, opened for one request."""

    @property
    def name(self) -> str: ...  # as served
    @property
    def digest(self) -> str | None: ...  # None for the base
    @property
    def fingerprint(self) -> str: ...  # base identity + delta digest, shortened
    @property
    def vocab_size(self) -> int: ...  # ids below this are valid
    @property
    def defaults(self) -> dict[str, Any]: ...  # its generation_config: temperature, top_p, ...


class EngineClient(Protocol):
    """The engine as the HTTP layer sees it. Every coroutine may be cancelled."""

    base_name: str
    max_model_len: int

    def models(self) -> Sequence[ModelInfo]: ...

    async def open(self, model: str) -> VariantHandle:
        """Resolve a name and begin loading. Raises ModelNotFound, DeltaUnusable, Draining."""
        ...

    async def encode(self, variant: VariantHandle, text: str) -> list[int]:
        """Tokenise with the variant's tokenizer, its special-token defaults included."""
        ...

    async def decode(self, variant: VariantHandle, token_ids: Sequence[int]) -> str: ...

    async def render_chat(
        self,
        variant: VariantHandle,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Chat template -> token ids, in the sandbox, with a deadline. Raises InvalidRequest."""
        ...

    def generate(
        self,
        variant: VariantHandle,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        on_output: Callable[[], None],
        deadline_s: float | None = None,
        cache_salt: str = "",
    ) -> Generation:
        """Queue the request; `on_output` is called on the event loop when there is something new.

        Whoever asks must `close` what is returned. Requests share cached prefixes only with those
        of the same variant and `cache_salt`.

        Raises InvalidRequest (too long), QueueFull, Draining, EngineDead; the error of a running
        one may be DeltaUnusable, GenerationFailed, DeadlineExceeded, Draining, EngineDead.
        """
        ...

    def rescan(self) -> None:
        """Read the deltas directory again; returns when names are up to date."""
        ...

    def is_alive(self) -> bool: ...  # the loop has a recent heartbeat
    def is_ready(self) -> bool: ...  # base loaded, not draining, not dead
