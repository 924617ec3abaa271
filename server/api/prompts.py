"""Request -> token ids. Text that cannot fit whatever its tokens are is refused before tokenising;
the rest is for the engine to refuse (`server.engine.limits`).
"""

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
    engine: EngineClient,
    variant: VariantHandle,
    prompt: str | list[int],
    *,
    add_special_tokens: bool = True,
) -> Prompt:
    """Return the prompt's token ids. Raises InvalidRequest: too long."""
    if not isinstance(prompt, str):
        return Prompt(prompt)
    check_length(len(prompt), engine.max_model_len, "prompt")
    ids = await engine.encode(variant, prompt, add_special_tokens=add_special_tokens)
    return Prompt(ids, prompt)


async def render_messages(engine: EngineClient, variant: VariantHandle, chat: ChatInput) -> Prompt:
    """Return the conversation's token ids. Raises InvalidRequest: too long, template refuses."""
    n_chars = sum(len(message.content or "") for message in chat.messages)
    check_length(n_chars, engine.max_model_len, "messages")
    ids = await engine.render_chat(
        variant,
        [message.as_dict() for message in chat.messages],
        add_generation_prompt=chat.generation_prompt,
        continue_final_message=bool(chat.continue_final_message),
        add_special_tokens=bool(chat.add_special_tokens),
    )
    return Prompt(ids)


def check_length(n_chars: int, max_model_len: int, param: str) -> None:
    """Refuse text that is too long whatever its tokens are. Raises InvalidRequest."""
    if n_chars > max_model_len * MAX_CHARS_PER_TOKEN:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens; {n_chars} characters "
            "cannot fit. Shorten the text.",
            param=param,
        )
