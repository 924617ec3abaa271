"""Text -> token ids with one tokenizer: prompts, and conversations through a chat template.

What comes from the content of a message never becomes a control token (`control_tokens`). The
template can still test, trim, split and change the content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from server.errors import ContextTooLong, InvalidRequest
from server.text.control_tokens import (
    ControlTokens,
    ControlTokensByTemplate,
    UnmarkableToken,
    encode_marked,
)
from server.text.rendering import render_template

DEVELOPER = "developer"
Messages = Sequence[Mapping[str, Any]]
# A long text is refused by its beginning: this many characters for each token that fits. Common
# tokens have 3 to 5. What follows a text can change the tokens at its end, but not half of them.
PROBE_CHARS_PER_TOKEN = 16
PROBE_MARGIN = 2


@dataclass(frozen=True, slots=True)
class Conversation:
    """How a conversation is rendered.

    template            instead of the tokenizer's own
    add_special_tokens  whether the tokenizer's own are added to those of the template
    literal_specials    whether control tokens in the content are text
    """

    messages: Messages
    template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    literal_specials: bool = True


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """What may fit: a text of more characters than `n_chars` cannot, whatever its tokens are."""

    n_tokens: int
    n_chars: int


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids, with the special tokens that this tokenizer adds (if they are wanted). A text that
    begins with the BOS token itself gets no second one.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    bos = tokenizer.bos_token
    if add_special_tokens and bos and text.startswith(bos):
        own = tokenizer.encode(text, add_special_tokens=False)
        if ids[1 : 1 + len(own)] == own and ids[0] == own[0]:
            del ids[0]
    return ids


def encode_within(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    limit: LengthLimit,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """`encode` for long texts: one that is far too long is refused, by its beginning if possible.

    Raises InvalidRequest.
    """
    check_fits(tokenizer, text, limit, "prompt")
    ids = encode(tokenizer, text, add_special_tokens=add_special_tokens)
    return _not_far_too_many(ids, limit, "prompt")


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    limit: LengthLimit,
    controls: ControlTokensByTemplate | None = None,
) -> list[int]:
    """Render the chat template and tokenise. Raises InvalidRequest if either cannot be.

    controls  this tokenizer's; who renders several conversations keeps them
    """
    if not (conversation.template or tokenizer.chat_template):
        raise InvalidRequest(
            "this model has no chat template; use /v1/completions", param="messages"
        )
    control: ControlTokens | None = None
    try:
        template = tokenizer.get_chat_template(conversation.template)
        messages = _known_roles(conversation.messages, template)
        if conversation.literal_specials:
            control = (controls or ControlTokensByTemplate(tokenizer)).of(template)
            messages = [_marked(control, message) for message in messages]
        text = render_template(
            tokenizer,
            messages,
            template,
            limit.n_chars,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
        )
    except (MemoryError, InvalidRequest):
        raise
    except Exception as error:  # a template may raise anything, jinja2's own errors included
        raise InvalidRequest(
            f"the chat template refused these messages: {_first_line(error)}", param="messages"
        ) from error
    check_fits(tokenizer, text, limit, "messages")
    if control is None:
        ids = encode(tokenizer, text, add_special_tokens=conversation.add_special_tokens)
    else:
        ids = _encode_marked(tokenizer, text, control, conversation.add_special_tokens)
    return _not_far_too_many(ids, limit, "messages")


def check_fits(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: LengthLimit, param: str
) -> None:
    """Refuse what cannot fit before all of it is tokenised. Raises InvalidRequest."""
    if len(text) > limit.n_chars:
        raise too_long(len(text), limit, param)
    n_probe = limit.n_tokens * PROBE_CHARS_PER_TOKEN
    if len(text) <= 2 * n_probe:  # the probe would be no saving
        return
    n_found = len(tokenizer.encode(text[:n_probe], add_special_tokens=False))
    if n_found > max_tokens_told(limit.n_tokens):
        excess = f"the first {n_probe} of the prompt's {len(text)} characters alone have {n_found}."
        raise ContextTooLong.by(limit.n_tokens, f"{excess} Shorten the prompt.", param=param)


def _not_far_too_many(ids: list[int], limit: LengthLimit, param: str) -> list[int]:
    """Return the ids, if they are no more than the engine shall hear of. Raises InvalidRequest."""
    if len(ids) > max_tokens_told(limit.n_tokens):
        excess = f"the prompt has {len(ids)} tokens."
        raise ContextTooLong.by(limit.n_tokens, f"{excess} Shorten the prompt.", param=param)
    return ids


def max_tokens_told(max_model_len: int) -> int:
    """The most token ids that texts become, or that become a text: somewhat more than can be
    served, so that who counts tokens learns by how much a text is too long.
    """
    return PROBE_MARGIN * max_model_len


def too_long(n_chars: int, limit: LengthLimit, param: str) -> ContextTooLong:
    """Return the refusal of a text that is too long whatever its tokens are."""
    excess = f"the prompt has {n_chars} characters, which so few tokens cannot hold."
    return ContextTooLong.by(limit.n_tokens, f"{excess} Shorten the prompt.", param=param)


def _known_roles(messages: Messages, template: str) -> list[dict[str, Any]]:
    """Return the messages with `developer`, the newer name, as `system` where the template does not
    know it.
    """
    if DEVELOPER in template:
        return [dict(message) for message in messages]
    return [
        dict(message) | ({"role": "system"} if message["role"] == DEVELOPER else {})
        for message in messages
    ]


def _marked(control: ControlTokens, message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its control tokens marked. A role is one of a few words."""
    marked: dict[str, Any] = control.mark(message)
    return marked | {"role": message["role"]}


def _encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, control: ControlTokens, add_special_tokens: bool
) -> list[int]:
    try:
        ids = encode_marked(tokenizer, text, control)
    except UnmarkableToken as error:
        raise InvalidRequest(_first_line(error), param="messages") from error
    if not add_special_tokens:
        return ids
    before, after = _added_ids(tokenizer)
    has_bos = bool(before) and ids[: len(before)] == before
    return [*([] if has_bos else before), *ids, *after]


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after a text."""
    own: list[int] = tokenizer.encode("a", add_special_tokens=False)
    whole: list[int] = tokenizer.encode("a", add_special_tokens=True)
    for at in range(len(whole) - len(own) + 1):
        if whole[at : at + len(own)] == own:
            return whole[:at], whole[at + len(own) :]
    return [], []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
