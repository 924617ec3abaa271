"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.body import parse_body
from server.api.context import api_of
from server.api.generation import GenerationResponse
from server.api.logprobs import parallel_lists, prompt_in_text
from server.api.prompts import Prompt, encode_prompt
from server.api.reply import Choice
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
        self.field_names: Mapping[str, str] = {}

    @property
    def n_prompts(self) -> int:
        return len(self.body.prompt)

    async def prompts(
        self, engine: EngineClient, variant: VariantHandle, tenant: str
    ) -> list[Prompt]:
        special = self.body.add_special_tokens is not False
        prompts = [
            await encode_prompt(engine, variant, prompt, tenant=tenant, add_special_tokens=special)
            for prompt in self.body.prompt
        ]
        if not self.body.echo:
            return prompts
        is_whole = self.body.max_tokens == 0
        texts = (_with_text(engine, variant, prompt, is_whole=is_whole) for prompt in prompts)
        return list(await asyncio.gather(*texts))

    def params(
        self, prompt: Prompt, variant: VariantHandle, max_model_len: int, child: int
    ) -> SamplingParams:
        asked = self.body.output_limit  # 0: echo only, so the prompt may fill the context
        default = variant.defaults.get("max_new_tokens", DEFAULT_MAX_TOKENS)
        max_tokens = output_budget(len(prompt.ids), asked, default, max_model_len)
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
        text, prompt_logprobs = chunk.text, chunk.prompt_logprobs
        if self.body.echo and choice.n_chunks == 1:
            text = (choice.prompt.text or "") + text
        if not text and not prompt_logprobs and not chunk.logprobs and chunk.finish_reason is None:
            return None
        return self._choice(choice, text, prompt_logprobs, chunk.logprobs)

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        if self.body.echo:
            text = (choice.prompt.text or "") + text
        return self._choice(choice, text, choice.prompt_logprobs, choice.logprobs)

    def _choice(
        self,
        choice: Choice,
        text: str,
        of_prompt: Sequence[TokenLogprob],
        of_output: Sequence[TokenLogprob],
    ) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            prompt = prompt_in_text(of_prompt, choice.prompt.text or "")
            logprobs = parallel_lists(choice, [*prompt, *of_output])
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


async def _with_text(
    engine: EngineClient, variant: VariantHandle, prompt: Prompt, *, is_whole: bool
) -> Prompt:
    """Return the prompt with its text; a character that it only begins comes with the output."""
    if prompt.text is not None:
        return prompt
    return Prompt(prompt.ids, await engine.decode(variant, prompt.ids, is_whole=is_whole))
