"""Chat templates, bounded while they write.

A text that is too long is refused when it becomes so, not when it is whole: a loop over one long
message would make gigabytes of it. jinja2 joins what a template yields by a function of the
environment, which is replaced by one that counts. What macros and blocks write goes through it
too, once they have ended: a list of the same text many times over is small until it is joined. The
rest of what a template may use (a constant of 90 MB is made when it is compiled) is left to the
limits of the text worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from server.errors import ContextTooLong


def render_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    template: str,
    max_chars: int,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """Return what the template writes. Raises ContextTooLong for more than `max_chars`, and
    whatever the template raises.
    """
    with _bounded(template, max_chars):
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    return text


@contextmanager
def _bounded(template: str, max_chars: int) -> Iterator[None]:
    environment = _compile_jinja_template(template).environment  # kept by its text
    environment.concat = _joining(max_chars)
    try:
        yield
    finally:
        del environment.concat  # the class has the usual one


def _joining(max_chars: int) -> Callable[[Iterable[str]], str]:
    def join(parts: Iterable[str]) -> str:
        taken, n_chars = [], 0
        for part in parts:
            n_chars += len(part)
            if n_chars > max_chars:
                raise ContextTooLong(
                    f"The chat template writes more than {max_chars} characters of these messages, "
                    "which cannot fit. Shorten the messages.",
                    param="messages",
                )
            taken.append(part)
        return "".join(taken)

    return join
