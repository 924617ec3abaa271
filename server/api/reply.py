"""What the two generation endpoints have in common when they answer: ids, usage, collected text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.api.names import Opened
from server.api.prompts import Prompt
from server.api.schemas import GenerationRequest
from server.engine.types import (
    EngineClient,
    OutputChunk,
    SamplingParams,
    TokenLogprob,
    VariantHandle,
)

MIN_LOGPROB = -9999.0  # vLLM's: JSON has no -inf


@dataclass(slots=True)
class Choice:
    """One choice while it grows; text_offset is where its next token starts in the text."""

    index: int
    prompt: Prompt
    n_tokens: int = 0
    n_cached: int = 0
    text_offset: int = 0
    n_chunks: int = 0
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def count(self, chunk: OutputChunk) -> None:
        """Add what every kind of answer needs."""
        self.n_chunks += 1
        self.n_tokens += len(chunk.token_ids)
        self.n_cached = max(self.n_cached, chunk.n_cached_tokens)
        self.finish_reason = chunk.finish_reason
        self.stop_reason = chunk.stop_reason

    def collect(self, chunk: OutputChunk) -> None:
        """Add what an answer in one piece needs."""
        self.count(chunk)
        self.text.append(chunk.text)
        self.logprobs.extend(chunk.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or chunk.prompt_logprobs


class Reply(Protocol):
    """How one endpoint reads its request and words its answer."""

    id_prefix: str
    object: str
    chunk_object: str

    @property
    def body(self) -> GenerationRequest: ...

    @property
    def n_prompts(self) -> int: ...

    @property
    def field_names(self) -> Mapping[str, str]:
        """What this endpoint calls the fields that the engine calls `prompt` and `max_tokens`,
        where it calls them otherwise.
        """
        ...

    async def prompts(
        self, engine: EngineClient, variant: VariantHandle, tenant: str
    ) -> list[Prompt]: ...

    def params(
        self, prompt: Prompt, variant: VariantHandle, max_model_len: int, child: int
    ) -> SamplingParams: ...

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """Return what a stream says of a choice before its first token."""
        ...

    def piece(self, choice: Choice, chunk: OutputChunk) -> dict[str, Any] | None:
        """Return one streamed piece of a choice; None if there is nothing to show."""
        ...

    def whole(self, choice: Choice) -> dict[str, Any]:
        """Return a finished choice."""
        ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """The part of an answer that is the same in each of its pieces."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, prefix: str, kind: str, model: Opened) -> Envelope:
        """Return the envelope of a new answer."""
        return cls(
            f"{prefix}-{uuid.uuid4().hex}",
            kind,
            int(time.time()),
            model.shown,
            model.variant.fingerprint,
        )

    def wrap(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, *, with_usage: bool
    ) -> dict[str, Any]:
        """Return one piece; with_usage keeps the key even when it is null, as OpenAI does."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.system_fingerprint,
        }
        if with_usage:
            body["usage"] = usage
        return body


def usage_of(choices: list[Choice], n: int) -> dict[str, Any]:
    """Return token counts; a prompt counts once however many choices it has."""
    firsts = choices[::n]
    n_prompt = sum(len(choice.prompt.ids) for choice in firsts)
    n_output = sum(choice.n_tokens for choice in choices)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_output,
        "total_tokens": n_prompt + n_output,
        "prompt_tokens_details": {"cached_tokens": sum(choice.n_cached for choice in firsts)},
    }


def clamp(logprob: float | None) -> float:
    """Return a logprob that JSON can hold; a token that nothing predicted has 0."""
    return 0.0 if logprob is None else max(logprob, MIN_LOGPROB)
