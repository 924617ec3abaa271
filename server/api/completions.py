"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.body import parse_body
from server.api.context import api_of
from server.api.generation import GenerationResponse
from server.api.prompts import Prompt, encode_prompt
from server.api.reply import Choice, clamp
from server.api.sampling import output_budget, sampling_params
from server.api.schemas import CompletionRequest
from server.engine.types import (
    EngineClient,
    OutputChunk,
    SamplingParams,
    TokenLogprob,
    VariantHandle,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    body = await parse_body(request, CompletionRequest)
    return GenerationResponse(request, api_of(request), CompletionReply(body))


class CompletionReply:
    """The completions format; see `Reply`."""

    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest) -> None:
        self.body = body

    @property
    def n_prompts(self) -> int:
        return len(self.body.prompt)

    async def prompts(self, engine: EngineClient, variant: VariantHandle) -> list[Prompt]:
        prompts = [await encode_prompt(engine, variant, prompt) for prompt in self.body.prompt]
        if not self.body.echo:
            return prompts
        return list(await asyncio.gather(*(_with_text(engine, variant, p) for p in prompts)))

    def params(
        self, prompt: Prompt, variant: VariantHandle, max_model_len: int, child: int
    ) -> SamplingParams:
        asked = self.body.output_limit  # 0: echo only, so the prompt may fill the context
        max_tokens = output_budget(len(prompt.ids), asked, DEFAULT_MAX_TOKENS, max_model_len)
        return sampling_params(
            self.body,
            variant.defaults,
            max_tokens=max_tokens,
            child=child,
            logprobs=self.body.logprobs,
            prompt_logprobs=bool(self.body.echo) and self.body.logprobs is not None,
        )

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        return []

    def piece(self, choice: Choice, chunk: OutputChunk) -> dict[str, Any] | None:
        text, tokens = chunk.text, chunk.logprobs
        if self.body.echo and choice.n_chunks == 1:
            text = (choice.prompt.text or "") + text
            tokens = chunk.prompt_logprobs + tokens
        if not text and not tokens and chunk.finish_reason is None:
            return None
        return self._choice(choice, text, tokens)

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        if self.body.echo:
            text = (choice.prompt.text or "") + text
        return self._choice(choice, text, (*choice.prompt_logprobs, *choice.logprobs))

    def _choice(self, choice: Choice, text: str, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        logprobs = None if self.body.logprobs is None else _logprobs(choice, tokens)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


async def _with_text(engine: EngineClient, variant: VariantHandle, prompt: Prompt) -> Prompt:
    if prompt.text is not None:
        return prompt
    return Prompt(prompt.ids, await engine.decode(variant, prompt.ids))


def _logprobs(choice: Choice, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return OpenAI's four parallel lists."""
    offsets = []
    for token in tokens:
        offsets.append(choice.text_offset)
        choice.text_offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [None if t.logprob is None else clamp(t.logprob) for t in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> dict[str, float] | None:
    """Return the best alternatives and the token itself; None for a prompt's first token."""
    if token.logprob is None:
        return None
    best: dict[str, float] = {}
    for item in token.top:  # best first; tokens that print alike share a key, the best one wins
        best.setdefault(item.token, clamp(item.logprob))
    best.setdefault(token.token, clamp(token.logprob))
    return best
