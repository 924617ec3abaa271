"""Plain data that crosses between the HTTP layer and the engine. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

from server.engine.life_types import VariantControl
from server.fleet.names import ServedNames
from server.tenants.principal import ANYBODY, NOBODY, Principal

FinishReason = Literal["stop", "length", "abort", "error"]
# In the order of a variant's life: on disk, being made ready there, in host memory, on its way to
# the device, in device memory; the last two may come at any time.
VariantState = Literal[
    "registered",
    "fetching",
    "verifying",
    "host",
    "loading",
    "ready",
    "failed",
    "quarantined",
]
IN_USE: tuple[VariantState, ...] = ("fetching", "verifying", "host", "loading", "ready")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    The HTTP edge bounds each value (`server.api.schemas`). The engine refuses what depends on the
    model or on the prompt (`server.engine.limits`).
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy; the edge rounds what is nearly 0
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


class TokenLogprob(NamedTuple):
    """A token's log probability at one position, and the best alternatives there, best first.

    A tuple, because the engine's thread makes up to 21 of them for each token.

    logprob  None for a prompt's first token
    top      alternatives, which have no `top` of their own

    The engine knows ids only; `TextOutput` adds the words:

    token    what it adds to the text: "" for a part of a character, the character for the part that
             completes it; of a token without a place in the text its name (`</s>`)
    raw      its own bytes, also where they are a part of a character
    n_chars  how many characters of the text are its own: 0 for a name
    """

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    token: str = ""
    raw: bytes = b""
    n_chars: int = 0


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """What one engine step added to one request.

    The engine's thread makes it from ids. `TextOutput` adds the texts on the event loop.

    text       what may be shown now (text that might become a stop string is held back), so it
               can be empty although token_ids is not
    token_ids  empty if only the prompt was to be scored
    logprobs   of the tokens whose text is settled now: those of a character that is split over
               tokens come together
    may_stop   whether a stop string may end the text here (`min_tokens` are there)
    queue_s    how long the request waited in the engine's queue until it began
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # on the first chunk only
    finish_reason: FinishReason | None = None  # on the last chunk only
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    n_cached_tokens: int = 0
    may_stop: bool = True
    queue_s: float = 0.0

    @classmethod
    def joined(cls, chunks: Sequence[OutputChunk]) -> OutputChunk:
        """Return several that followed each other as one."""
        first, last = chunks[0], chunks[-1]
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
            logprobs=tuple(chain.from_iterable(chunk.logprobs for chunk in chunks)),
            prompt_logprobs=first.prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            n_cached_tokens=last.n_cached_tokens,
            queue_s=last.queue_s,
        )


class Generation(Protocol):
    """A running generation as its reader sees it. Event loop only."""

    @property
    def error(self) -> Exception | None:
        """Why it ended early; what `take` gave before still counts."""
        ...

    @property
    def n_prompt_computed(self) -> int:
        """Tokens of the prompt that have been worked on, those found in the cache included."""
        ...

    def take(self) -> Sequence[OutputChunk]:
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
    host_bytes: int = 0  # host bytes of what was decoded, kept for its coming back
    reconstructed_bytes: int = 0  # device bytes of a hot variant's weights, more
    mode: str = "apply"
    codec: str = ""
    error: str | None = None  # why it failed, safe to show
    fidelity: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False  # it stays resident

    def is_named(self, model: str) -> bool:
        """Whether a request's `model` means this one: a variant also answers to `BASE:NAME`."""
        long_name = self.name if self.parent is None else f"{self.parent}:{self.name}"
        return model in (self.name, long_name)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's counts, which gauges are read from.

    kernel_state  "compiled", "compiling" or "uncompiled": see `server.ops.kernels.KernelState`
    """

    n_running: int
    n_waiting: int
    kv_block_tokens: int
    n_kv_blocks: int
    n_free_kv_blocks: int
    n_preemptions: int
    n_prefix_queried: int
    n_prefix_hit: int
    base_bytes: int
    n_static_steps: int
    n_eager_decode_steps: int
    kernel_state: str


@dataclass(frozen=True, slots=True)
class TextWorkerStats:
    """A snapshot of the text workers.

    n_kills  workers that were ended since the start, by reason
    """

    n_busy: int
    n_waiting: int  # tasks
    n_kills: dict[str, int]


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What one tenant holds in the engine now.

    n_kv_blocks          that its running requests hold, shared ones once
    n_resident_variants  that count for it, with
    resident_bytes       of device memory; see `server.deltas.slots`
    """

    n_kv_blocks: int = 0
    n_resident_variants: int = 0
    resident_bytes: int = 0

    def __add__(self, other: TenantUse) -> TenantUse:
        """Of both together, each with what is its own."""
        return TenantUse(
            self.n_kv_blocks + other.n_kv_blocks,
            self.n_resident_variants + other.n_resident_variants,
            self.resident_bytes + other.resident_bytes,
        )


class Ticket(Protocol):
    """The permits of one admitted request, one for each sequence; see `EngineClient.admit`.

    As a context manager it gives back, when it is left, the permits that no generation has taken.
    A generation gives back its own when the engine is done with it.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


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
    def chars_per_token(self) -> int: ...  # the most characters one token can stand for
    @property
    def defaults(self) -> dict[str, Any]: ...  # its generation_config: temperature, top_p, ...


class EngineClient(Protocol):
    """The engine as the HTTP layer sees it. Every coroutine may be cancelled.

    variants  what operators do with variants: see `server.engine.life_types`
    """

    base_name: str
    max_model_len: int

    @property
    def variants(self) -> VariantControl: ...

    @property
    def names(self) -> ServedNames: ...

    def models(self) -> Sequence[ModelInfo]: ...

    def model(self, name: str) -> ModelInfo | None:
        """What a request's `model` means, as listed; None: no model has that name."""
        ...

    def check_open(self, principal: Principal = ANYBODY) -> None:
        """Refuse what no request of this tenant can change. Raises QueueFull, Draining, EngineDead.

        It costs nothing, so that the HTTP edge can ask before it reads a body.
        """
        ...

    def admit(self, n_sequences: int, principal: Principal = ANYBODY) -> Ticket:
        """Take permits for a request of so many sequences (prompts times choices).

        Raises QueueFull with the measured time to wait, Draining, EngineDead, and InvalidRequest
        if that many never fit. A full server is full for tenants that have their share of it.
        """
        ...

    def drain(self) -> None:
        """Admit nobody any more; who has a ticket goes on."""
        ...

    async def open(self, model: str, principal: Principal = ANYBODY) -> VariantHandle:
        """Resolve a name; the first time, check that the variant does not answer as the base does.

        Raises ModelNotFound, DeltaBroken, DeltaUnusable, and what a request of the principal would.
        """
        ...

    async def verify(self, model: str) -> dict[str, Any]:
        """Replay the variant's certificate and return what came of it: `server.engine.replay`.

        A variant that is found wanting is refused from then on, one that was is served again.
        Raises as `open` does, and InvalidRequest where there is no certificate.
        """
        ...

    async def encode(
        self,
        variant: VariantHandle,
        text: str,
        *,
        add_special_tokens: bool = True,
        tenant: str = NOBODY,
    ) -> list[int]:
        """Tokenise with the variant's tokenizer, the special tokens that it adds included; of the
        text workers the tenant has its share.

        Raises InvalidRequest, TextLimit, DeltaUnusable (in quarantine), QueueFull.
        """
        ...

    async def decode(
        self, variant: VariantHandle, token_ids: Sequence[int], *, is_whole: bool = True
    ) -> str:
        """Ids -> text, special tokens included; without `is_whole` a character at the end that the
        ids only begin is left out.
        """
        ...

    async def token_texts(self, variant: VariantHandle, token_ids: Sequence[int]) -> list[str]:
        """What each of the ids adds to their text."""
        ...

    async def render_chat(
        self,
        variant: VariantHandle,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tenant: str = NOBODY,
    ) -> list[int]:
        """Chat template -> token ids, in a text worker. Raises as `encode` does."""
        ...

    def generate(
        self,
        variant: VariantHandle,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        on_output: Callable[[], None],
        ticket: Ticket | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        principal: Principal = ANYBODY,
        priority: int = 0,
    ) -> Generation:
        """Queue the request; `on_output` is called on the event loop when there is something new.

        Whoever asks must `close` what is returned. The generation takes a permit of `ticket`;
        without one it is admitted here. `deadline` is a time of `time.monotonic`. Requests share
        cached prefixes only with those of the same variant, tenant and `cache_salt`. The lower
        `priority` is, the sooner it is served, within what the principal may ask.

        Raises InvalidRequest (see `server.engine.limits`), Draining, EngineDead, and without a
        ticket QueueFull; the error of a running one may be DeltaUnusable, GenerationFailed,
        DeadlineExceeded, Draining, EngineDead.
        """
        ...

    def rescan(self) -> None:
        """Read the deltas directory again; returns when names are up to date."""
        ...

    async def pin(self, pinned: Mapping[Principal, Collection[str]]) -> None:
        """Load the variants that each tenant names, once kernels are compiled, and keep them
        resident; those pinned before are so no more. Returns before they are loaded.

        Raises ConfigError: a name that no variant has, more variants than slots. What cannot be
        opened, or has no room by its bytes, is told by the log.
        """
        ...

    def is_alive(self) -> bool: ...  # the loop has a recent heartbeat
    def is_ready(self) -> bool: ...  # base loaded, not draining, not dead
