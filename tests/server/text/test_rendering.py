"""Chat templates are stopped when they have written too much, not after."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.text.rendering import render_template
from tests.tiny import CHAT_TEMPLATE, make_tokenizer

MESSAGES = [{"role": "user", "content": "x" * 100}]
NESTED = "{% for a in range(N) %}{% for b in range(N) %}"
LOOP = NESTED + "{{ messages[0].content }}{% endfor %}{% endfor %}"
ENDLESS = LOOP.replace("N", "99999")  # 10 ** 12 characters
LONG = LOOP.replace("N", "99")


def write(template: str, max_chars: int, **changes: Any) -> str:
    options = {"add_generation_prompt": False, "continue_final_message": False} | changes
    return render_template(tokenizer(template), MESSAGES, template, max_chars, **options)


def tokenizer(template: str) -> PreTrainedTokenizerBase:
    return make_tokenizer(320, chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        f"{{% set text %}}{LONG}{{% endset %}}{{{{ text }}}}",
        f"{{% macro text() %}}{LONG}{{% endmacro %}}{{{{ text() }}}}",
        f"{{% filter upper %}}{LONG}{{% endfilter %}}",
    ],
    ids=["text", "set", "macro", "filter"],
)
def test_template_that_writes_too_much_is_stopped_at_its_bound(template: str) -> None:
    with pytest.raises(InvalidRequest, match="writes more than 1000 characters"):
        write(template, 1000)


def test_template_within_its_bound_writes_what_transformers_writes() -> None:
    whole = tokenizer(CHAT_TEMPLATE).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert write(CHAT_TEMPLATE, len(whole), add_generation_prompt=True) == whole
    with pytest.raises(InvalidRequest):
        write(CHAT_TEMPLATE, len(whole) - 1, add_generation_prompt=True)


def test_bound_of_one_text_is_not_the_next_ones() -> None:
    with pytest.raises(InvalidRequest):
        write(CHAT_TEMPLATE, 10)
    assert write(CHAT_TEMPLATE, 1000)
    assert tokenizer(CHAT_TEMPLATE).apply_chat_template(MESSAGES * 20, tokenize=False)
