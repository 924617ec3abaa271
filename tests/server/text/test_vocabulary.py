"""What ids are beside text, against the tokenizers' own tables."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

from server.text.vocabulary import Vocabulary, byte_letters
from tests.tiny import EOS
from tests.tokenizer_kinds import KINDS, TEXTS, WITH_BYTES, tokenizer_of


def test_byte_letters_are_the_librarys_alphabet_and_its_order() -> None:
    letters = byte_letters()
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\x00\t !~", "é€😊", "\x7f\xa0\xad\u0100"):
        ((word, _),) = splitter.pre_tokenize_str(text)
        assert word == "".join(letters[byte] for byte in text.encode())


@pytest.mark.parametrize("kind", ["byte-level", *WITH_BYTES])
def test_token_bytes_of_a_text_join_to_its_bytes(kind: str) -> None:
    backend = tokenizer_of(kind)
    vocabulary = Vocabulary.of(backend)
    for text in TEXTS:
        joined = b""
        for token_id in backend.encode(text, add_special_tokens=False).ids:
            own = vocabulary.token_bytes(token_id)
            joined += vocabulary.name(token_id).replace("▁", " ").encode() if own is None else own
        assert joined in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_anchor_is_an_ordinary_token_with_text(kind: str) -> None:
    backend = tokenizer_of(kind)
    vocabulary = Vocabulary.of(backend)
    assert vocabulary.anchor is not None
    assert backend.decode([vocabulary.anchor]).isalpha()
    assert vocabulary.anchor not in vocabulary.byte_of


def test_shown_are_tokens_but_for_special_ones_if_they_are_skipped() -> None:
    backend = tokenizer_of("llama")
    vocabulary, eos = Vocabulary.of(backend), backend.token_to_id(EOS)
    assert vocabulary.is_shown(eos, skip_special_tokens=False)
    assert not vocabulary.is_shown(eos, skip_special_tokens=True)
    past = backend.get_vocab_size()
    assert not vocabulary.is_shown(past, skip_special_tokens=False)
    assert (vocabulary.name(past), vocabulary.name(eos)) == ("", EOS)


def test_only_byte_level_decoders_are_read_as_bytes() -> None:
    assert [kind for kind in KINDS if Vocabulary.of(tokenizer_of(kind)).is_byte_level] == [
        "byte-level"
    ]
    assert [kind for kind in KINDS if Vocabulary.of(tokenizer_of(kind)).byte_of] == [*WITH_BYTES]
