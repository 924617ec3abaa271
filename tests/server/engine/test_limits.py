"""What the engine refuses whoever asks: foreign ids, and prompts and budgets that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.limits import check_request
from server.engine.types import SamplingParams
from server.errors import InvalidRequest

VOCAB = 320
LONGEST = 16


def refused(prompt: list[int], **params: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(prompt, **params)
    return caught.value


def check(prompt: list[int], **params: Any) -> None:
    chosen = SamplingParams(**({"max_tokens": 1} | params))
    check_request(prompt, chosen, vocab_size=VOCAB, max_model_len=LONGEST)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([0, VOCAB], {}, "prompt"),
        ([5], {"logit_bias": ((VOCAB, 1.0),)}, "logit_bias"),
        ([5], {"stop_token_ids": (-1,)}, "stop_token_ids"),
        ([5], {"stop_token_ids": (2, VOCAB)}, "stop_token_ids"),
        ([5], {"min_tokens": 2}, "min_tokens"),
        ([5] * 10, {"max_tokens": 7}, "max_tokens"),
        ([5] * LONGEST, {}, "prompt"),
        ([5] * (LONGEST + 1), {"max_tokens": 0}, "prompt"),
    ],
)
def test_request_that_cannot_be_is_refused_by_field(
    prompt: list[int], params: dict[str, Any], field: str
) -> None:
    assert refused(prompt, **params).param == field


def test_length_beyond_the_context_names_all_numbers() -> None:
    message = refused([5] * 10, max_tokens=7).message
    assert "maximum context length is 16 tokens" in message  # what clients look for
    assert "17 tokens (10 in the prompt, 7 in the completion)" in message
    assert "the prompt has 16 tokens" in refused([5] * 16).message


@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LONGEST), st.integers(0, LONGEST + 2)
)
def test_request_of_known_ids_is_taken_exactly_if_it_fits(prompt: list[int], n: int) -> None:
    if len(prompt) + n <= LONGEST:
        check(prompt, max_tokens=n, min_tokens=n, stop_token_ids=(0, VOCAB - 1))
    else:
        refused(prompt, max_tokens=n)
