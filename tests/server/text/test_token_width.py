"""The most characters of a token, against texts that are tokenised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from server.text.token_width import USUAL_CHARS, max_chars_per_token
from tests.tokenizer_kinds import KINDS, TEXTS, tokenizer_of

CHARS = st.text(st.sampled_from("ab  \n.é😊e\u0301ﬁ火"), max_size=60)


def copy_of(kind: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_of(kind).to_str())


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.sampled_from(TEXTS), CHARS))
@settings(max_examples=60, deadline=None)
def test_text_never_has_more_characters_than_its_tokens_can_stand_for(kind: str, text: str) -> None:
    backend = tokenizer_of(kind)
    n_tokens = len(backend.encode(text, add_special_tokens=False).ids)
    # A text of nothing but what a tokenizer leaves out has no tokens; it is short.
    assert len(text) <= max(n_tokens, 1) * max_chars_per_token(backend)


@given(text=CHARS)
@settings(max_examples=60, deadline=None)
def test_composed_characters_are_allowed_for(text: str) -> None:
    backend = copy_of("byte-level")
    backend.normalizer = normalizers.NFKC()
    n_tokens = len(backend.encode(text, add_special_tokens=False).ids)
    assert len(text) <= n_tokens * max_chars_per_token(backend)


def test_byte_level_tokenizer_has_its_longest_token() -> None:
    backend = copy_of("byte-level")
    longest = max(map(len, backend.get_vocab()))
    assert max_chars_per_token(backend) == longest < USUAL_CHARS
    backend.add_tokens([AddedToken("y" * 300, normalized=False)])
    assert max_chars_per_token(backend) == 300


def test_tokenizer_that_may_leave_out_text_has_a_usual_bound() -> None:
    backend = copy_of("byte-level")
    backend.add_tokens([AddedToken("<turn>", rstrip=True, normalized=False)])
    assert max_chars_per_token(backend) == USUAL_CHARS
    assert max_chars_per_token(tokenizer_of("wordpiece")) == USUAL_CHARS
    replaced = copy_of("byte-level")
    replaced.normalizer = normalizers.Replace("  ", " ")
    assert max_chars_per_token(replaced) == USUAL_CHARS
