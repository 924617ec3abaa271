"""Request -> token ids. Text that cannot fit whatever its tokens are is refused before tokenising;
the rest is for the engine to refuse (`server.engine.limits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.schemas import ChatInput
from server.engine.types import EngineClient, VariantHandle
from server.errors import ContextTooLong


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
    tenant: str,
    add_special_tokens: bool = True,
) -> Prompt:
    """Return the prompt's token ids. Raises ContextTooLong."""
    if not isinstance(prompt, str):
        return Prompt(prompt)
    check_length(len(prompt), engine, variant, "prompt")
    ids = await engine.encode(variant, prompt, add_special_tokens=add_special_tokens, tenant=tenant)
    return Prompt(ids, prompt)


async def render_messages(
    engine: EngineClient, variant: VariantHandle, chat: ChatInput, *, tenant: str
) -> Prompt:
    """Return the conversation's token ids. Raises ContextTooLong, InvalidRequest (template)."""
    n_chars = sum(len(message.content or "") for message in chat.messages)
    check_length(n_chars, engine, variant, "messages")
    ids = await engine.render_chat(
        variant,
        [message.as_dict() for message in chat.messages],
        add_generation_prompt=chat.generation_prompt,
        continue_final_message=bool(chat.continue_final_message),
        add_special_tokens=bool(chat.add_special_tokens),
        tenant=tenant,
    )
    return Prompt(ids)


def check_length(n_chars: int, engine: EngineClient, variant: VariantHandle, param: str) -> None:
    """Refuse text that is too long whatever its tokens are: it is not worth the time that it takes
    to tokenise. Raises ContextTooLong.
    """
    n_tokens = engine.max_model_len
    if n_chars > n_tokens * variant.chars_per_token:
        excess = f"the prompt has {n_chars} characters, which so few tokens cannot hold."
        raise ContextTooLong.by(n_tokens, f"{excess} Shorten the prompt.", param=param)
