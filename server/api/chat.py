"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.body import parse_body
from server.api.context import api_of
from server.api.generation import GenerationResponse
from server.api.logprobs import entries
from server.api.prompts import Prompt, render_messages
from server.api.reply import Choice
from server.api.sampling import output_budget, sampling_params
from server.api.schemas import ChatRequest
from server.engine.types import (
    EngineClient,
    OutputChunk,
    SamplingParams,
    TokenLogprob,
    VariantHandle,
)

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    body = await parse_body(request, ChatRequest)
    return GenerationResponse(request, api_of(request), ChatReply(body))


class ChatReply:
    """The chat format; see `Reply`."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    n_prompts = 1

    def __init__(self, body: ChatRequest) -> None:
        self.body = body
        has_newer = body.max_completion_tokens is not None
        output = "max_completion_tokens" if has_newer else "max_tokens"
        self.field_names: Mapping[str, str] = {"prompt": "messages", "max_tokens": output}

    async def prompts(
        self, engine: EngineClient, variant: VariantHandle, tenant: str
    ) -> list[Prompt]:
        return [await render_messages(engine, variant, self.body, tenant=tenant)]

    def params(
        self, prompt: Prompt, variant: VariantHandle, max_model_len: int, child: int
    ) -> SamplingParams:
        default = variant.defaults.get("max_new_tokens")  # None: the rest of the context
        asked = self.body.output_limit
        return sampling_params(
            self.body,
            variant.defaults,
            max_tokens=output_budget(len(prompt.ids), asked, default, max_model_len),
            child=child,
            logprobs=(self.body.top_logprobs or 0) if self.body.logprobs else None,
        )

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def piece(self, choice: Choice, chunk: OutputChunk) -> dict[str, Any] | None:
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return None
        return {
            "index": choice.index,
            "delta": {"content": chunk.text} if chunk.text else {},
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }

    def whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": entries(tokens, self.body.top_logprobs or 0), "refusal": None}
