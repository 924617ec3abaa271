"""Request -> token ids, with every refusal that is possible before and after tokenising."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.schemas import ChatInput
from server.engine.types import EngineClient, VariantHandle
from server.errors import InvalidRequest

# No tokenizer in use has a longer token (the longest are runs of 128 blanks, in Llama 3 and Qwen),
# so a longer text cannot fit and is not worth the time it takes to tokenise.
MAX_CHARS_PER_TOKEN = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the engine takes it; text is the caller's own, None when ids were given."""

    ids: Sequence[int]
    text: str | None = None


async def encode_prompt(
    engine: EngineClient, variant: VariantHandle, prompt: str | list[int]
) -> Prompt:
    """Return the prompt's token ids. Raises InvalidRequest: too long, unknown ids, nothing left."""
    if isinstance(prompt, str):
        check_length(len(prompt), engine.max_model_len, "prompt")
        ids = await engine.encode(variant, prompt)
        if not ids:
            raise InvalidRequest("The prompt has no tokens.", param="prompt")
        return Prompt(ids, prompt)
    if max(prompt) >= variant.vocab_size:
        raise InvalidRequest(
            "The prompt holds a token id that this model does not have: ids are below "
            f"{variant.vocab_size}.",
            param="prompt",
        )
    return Prompt(prompt)


async def render_messages(engine: EngineClient, variant: VariantHandle, chat: ChatInput) -> Prompt:
    """Return the conversation's token ids. Raises InvalidRequest: too long, template refuses."""
    n_chars = sum(len(message.content or "") for message in chat.messages)
    check_length(n_chars, engine.max_model_len, "messages")
    ids = await engine.render_chat(
        variant,
        [message.as_dict() for message in chat.messages],
        add_generation_prompt=chat.generation_prompt,
        continue_final_message=bool(chat.continue_final_message),
    )
    if not ids:
        raise InvalidRequest("The messages have no tokens.", param="messages")
    return Prompt(ids)


def check_length(n_chars: int, max_model_len: int, param: str) -> None:
    """Refuse text that is too long whatever its tokens are. Raises InvalidRequest."""
    if n_chars > max_model_len * MAX_CHARS_PER_TOKEN:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens; {n_chars} characters "
            "cannot fit. Shorten the text.",
            param=param,
        )
