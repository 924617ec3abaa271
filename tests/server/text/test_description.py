"""A described tokenizer decodes as the tokenizer itself, and hostile descriptions are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.text.description import Undescribed, describe, described, likeness
from server.text.text_stream import text_stream
from server.text.vocabulary import Vocabulary
from tests.tiny import EOS
from tests.tokenizer_kinds import KINDS, TEXTS, tokenizer_of


def whole(backend: Tokenizer, **fields: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **fields)


def through_json(backend: Tokenizer, n_rows: int = 1 << 20) -> Any:
    record, blob = describe(whole(backend, eos_token=EOS), n_rows)
    return described(json.loads(json.dumps(record)), blob)


@pytest.mark.parametrize("kind", KINDS)
def test_described_tokenizer_is_the_same_vocabulary(kind: str) -> None:
    backend = tokenizer_of(kind)
    own, got = Vocabulary.of(backend), through_json(backend)
    vocabulary = got.vocabulary
    assert got.eos_token_id == backend.token_to_id(EOS)
    assert (vocabulary.byte_of, vocabulary.anchor) == (own.byte_of, own.anchor)
    assert vocabulary.is_byte_level == own.is_byte_level
    for token_id in range(-1, backend.get_vocab_size() + 2):
        assert vocabulary.name(token_id) == (own.name(token_id) if token_id >= 0 else "")
        if token_id >= 0:
            assert vocabulary.token_bytes(token_id) == own.token_bytes(token_id)
            for skip in (False, True):
                shown = own.is_shown(token_id, skip_special_tokens=skip)
                assert vocabulary.is_shown(token_id, skip_special_tokens=skip) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_described_tokenizer_decodes_the_same(kind: str) -> None:
    backend = tokenizer_of(kind)
    vocabulary = through_json(backend).vocabulary
    for text in TEXTS:
        ids = backend.encode(text).ids
        assert vocabulary.decode(ids) == backend.decode(ids, skip_special_tokens=False)
        stream = text_stream(vocabulary, skip_special_tokens=True)
        pieces = [piece for i in ids for piece in stream.push(i)] + stream.flush()
        assert "".join(pieces) == backend.decode(ids)


def test_gaps_and_empty_tokens_are_kept_apart() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "": 2, "b": 5}, unk_token="a"))
    record, blob = describe(whole(backend), 1 << 20)
    vocabulary = described(record, blob).vocabulary
    shown = [i for i in range(8) if vocabulary.is_shown(i, skip_special_tokens=False)]
    assert shown == [0, 2, 5]
    assert vocabulary.decode([0, 1, 2, 5]) == backend.decode([0, 1, 2, 5]) == "a  b"


def test_ids_past_the_models_rows_are_left_out() -> None:
    vocabulary = through_json(tokenizer_of("byte-level"), n_rows=10).vocabulary
    assert vocabulary.name(9)
    assert not vocabulary.name(10)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Replace(Regex("(a+)+$"), "x"),
        decoders.Replace("a", "a" * 1000),
        decoders.Strip(" ", 0, 3),
        decoders.Strip(" ", 1 << 30, 0),
        decoders.Sequence([decoders.Fuse()] * 17),
    ],
)
def test_decoder_of_unbounded_work_is_refused_by_both_sides(decoder: decoders.Decoder) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    record, blob = describe(whole(backend), 10)
    with pytest.raises(Undescribed):
        described(record | {"decoder": json.loads(decoder.__getstate__())}, blob)
    backend.decoder = decoder
    with pytest.raises(Undescribed):
        describe(whole(backend), 10)


@pytest.mark.parametrize(
    "change",
    [
        {"n_ids": 1 << 30},
        {"n_ids": -1},
        {"n_ids": "many"},
        {"n_ids": 1 << 20},
        {"decoder": {"type": "Other"}},
        {"decoder": {}},
        {"decoder": [1]},
        {"special": [None]},
        {"byte_of": 3},
        {"anchor": "x"},
        {"eos": []},
    ],
)
def test_description_that_no_worker_would_send_is_refused(change: dict[str, Any]) -> None:
    record, blob = describe(whole(tokenizer_of("llama")), 1 << 20)
    with pytest.raises(Undescribed):
        described(record | change, blob)


def test_wrong_ends_of_tokens_are_read_without_harm() -> None:
    record, blob = describe(whole(tokenizer_of("byte-level")), 4)
    vocabulary = described(record, b"\xff" * 16 + blob[16:]).vocabulary
    assert [vocabulary.name(i)[:0] for i in range(5)] == [""] * 5


def test_likeness_is_of_what_tokenising_and_rendering_read() -> None:
    backend = tokenizer_of("byte-level")
    one = likeness(whole(backend, eos_token=EOS, padding_side="left", model_max_length=3))
    assert likeness(whole(backend, eos_token=EOS, chat_template="x")) == one
    assert likeness(whole(backend, eos_token=EOS, bos_token=EOS)) != one
    assert likeness(whole(tokenizer_of("llama"), eos_token=EOS)) != one
