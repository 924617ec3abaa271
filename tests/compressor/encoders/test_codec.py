"""The registry and the encoders' options."""

from __future__ import annotations

import json

import pytest
import torch

from compressor.codecs import (
    BlockDiagTerm,
    DenseRows,
    ImpartQtTerm,
    ImpartTerm,
    LowRankTerm,
    RowsTerm,
    TensorDelta,
    Term,
    term_class,
)
from compressor.encoders.codec import make_encoder
from compressor.errors import InputError, UnsupportedVersion, WrongShape
from tests.compressor.codec_oracles import encode, payload, random_matrix

CODECS = ("blockdiag", "impart", "impart-qt", "lowrank")


def test_term_class_known_codec_is_its_class() -> None:
    assert term_class("blockdiag") is BlockDiagTerm
    assert term_class("lowrank") is LowRankTerm
    assert term_class("rows") is RowsTerm
    assert term_class("impart") is ImpartTerm
    assert term_class("impart-qt") is ImpartQtTerm


@pytest.mark.parametrize("codec", ["", "dense", "BlockDiag", "x" * 1000])
def test_term_class_unknown_codec_raises_unsupported_version(codec: str) -> None:
    with pytest.raises(UnsupportedVersion) as caught:
        term_class(codec)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("codec", CODECS)
def test_make_encoder_options_rebuild_the_same_codec(codec: str) -> None:
    encoder = make_encoder(codec)
    options = json.loads(json.dumps(encoder.options()))
    assert make_encoder(codec, **options) == encoder
    assert encoder.name == codec


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("zip", {}),
        ("blockdiag", {"beta": 0.6}),
        ("blockdiag", {"bits": 5}),
        ("blockdiag", {"bits": "4"}),
        ("blockdiag", {"head_fraction": 1.0}),
        ("blockdiag", {"head_fraction": -0.1}),
        ("blockdiag", {"head_fraction": float("nan")}),
        ("blockdiag", {"head_fraction": "half"}),
        ("blockdiag", {"head_bits": 32}),
        ("blockdiag", {"divisor_slack": 1}),
        ("impart", {"beta": 1.0}),
        ("impart", {"C": 0}),
        ("impart", {"C": float("inf")}),
        ("impart", {"block_rows": 0}),
        ("impart", {"block_rows": 1.5}),
        ("impart-qt", {"beta": -0.1}),
        ("impart-qt", {"C": float("nan")}),
        ("impart-qt", {"block_rows": 5000}),
        ("lowrank", {"bits": 64}),
    ],
)
def test_make_encoder_unusable_option_raises_input_error(codec: str, options: dict) -> None:
    with pytest.raises(InputError):
        make_encoder(codec, **options)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(64, 64), (300, 20), (31, 77), (1, 1)])
def test_plan_any_budget_is_json_complete_and_near_the_budget(codec: str, shape) -> None:
    encoder = make_encoder(codec)
    smallest = encoder.size_bytes(shape, encoder.fit(shape, 0))
    for ratio in (4, 16, 64, 1000):
        budget = shape[0] * shape[1] * 2 / ratio
        params = encoder.fit(shape, budget)
        assert json.loads(json.dumps(params)) == params
        size = encoder.size_bytes(shape, params)
        assert size >= smallest
        terms = encode(encoder, random_matrix(shape), params)
        assert all(isinstance(term, Term) for term in terms)
        assert payload(terms) == size
        if shape == (64, 64) and ratio == 4:
            assert size == pytest.approx(budget, rel=0.35)


@pytest.mark.parametrize("codec", CODECS)
def test_terms_of_every_codec_are_immutable(codec: str) -> None:
    encoder = make_encoder(codec)
    (term,) = encode(encoder, random_matrix((16, 16)), encoder.fit((16, 16), 200))
    with pytest.raises(AttributeError):
        term.shape = (1, 1)  # type: ignore[misc]


def test_tensor_delta_merge_adds_terms_and_replaces_exact_rows() -> None:
    base, dense = random_matrix((6, 4), 1, 1.0), random_matrix((6, 4))
    encoder = make_encoder("lowrank", bits=32)
    terms = encode(encoder, dense, {"bits": 32, "rank": 4})
    rows = torch.full((2, 4), 7.0, dtype=torch.bfloat16)
    delta = TensorDelta("w", (8, 4), (6, 4), False, terms, DenseRows(6, rows))
    merged = delta.reconstruct(base)
    torch.testing.assert_close(merged[:6], base + dense)
    assert torch.equal(merged[6:], rows.float())
    with pytest.raises(WrongShape):
        delta.reconstruct(base[:5])
