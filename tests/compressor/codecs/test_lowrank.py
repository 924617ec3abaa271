from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.codecs import LowRankTerm, lowrank_from_factors
from compressor.codecs.lowrank import LOWRANK_BITS
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import Residual, TensorSource, Transposed
from compressor.encoders.svd import factors, spectrum
from compressor.errors import (
    Corrupt,
    InputError,
    NonFinite,
    UnsupportedTensor,
    UnsupportedVersion,
    WrongShape,
)
from tests.compressor.codec_oracles import (
    ODD_SHAPES,
    SHAPES,
    check_term,
    encode,
    payload,
    random_matrix,
)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.sampled_from(LOWRANK_BITS), st.floats(0, 3000), st.integers(0, 99))
def test_lowrank_any_plan_agrees_with_element_loop_and_size(shape, bits, budget, seed) -> None:
    codec = make_encoder("lowrank", bits=bits)
    params = codec.fit(shape, budget)
    terms = encode(codec, random_matrix(shape, seed), params)
    assert payload(terms) == codec.size_bytes(shape, params)
    check_term(terms[0])


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 1000])
def test_factors_equal_truncated_svd(shape, rank: int) -> None:
    matrix = random_matrix(shape)
    rank = min(rank, *shape)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    a, b = factors("w", TensorSource(matrix), rank)
    assert (a.shape, b.shape) == ((rank, shape[1]), (rank, shape[0]))
    error = (b.T.double() @ a.double() - expected).norm()
    assert float(error) < 2e-6 * float(s[0]) * rank**0.5
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_spectrum_streamed_strips_equal_torch_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.encoders.svd._STRIP", 100)
    matrix = random_matrix((203, 17))
    sigma, right = spectrum("w", TensorSource(matrix))
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrix.double()), rtol=1e-9, atol=0)
    torch.testing.assert_close(right.T @ right, torch.eye(17, dtype=torch.float64))
    a, b = factors("w", TensorSource(matrix), 17)
    torch.testing.assert_close(b.T @ a, matrix, rtol=1e-4, atol=1e-8)


def test_spectrum_low_rank_matrix_reports_noise_as_zero() -> None:
    matrix = random_matrix((40, 3)) @ random_matrix((3, 20), 1)
    sigma, _ = spectrum("w", TensorSource(matrix))
    assert int((sigma > 0).sum()) == 3
    a, b = factors("w", TensorSource(matrix), 10)
    torch.testing.assert_close(b.T @ a, matrix, rtol=1e-4, atol=1e-11)
    assert not a[3:].any()


def test_spectrum_nan_raises_naming_the_tensor() -> None:
    matrix = random_matrix((5, 5))
    matrix[3, 3] = float("nan")
    with pytest.raises(UnsupportedTensor, match="w: "):
        spectrum("w", TensorSource(matrix))


def test_lowrank_from_factors_32_bit_is_exact() -> None:
    a, b = random_matrix((4, 9)), random_matrix((4, 6), 1)
    term = lowrank_from_factors(a, b, bits=32)
    assert torch.equal(term.a, a)
    assert torch.equal(term.b, b)
    assert term.shape == (6, 9)
    assert term.rank == 4
    check_term(term)


def test_lowrank_from_factors_default_is_half_precision() -> None:
    a, b = random_matrix((4, 9), scale=1e-7), random_matrix((4, 6), 1, scale=300.0)
    term = lowrank_from_factors(a, b)
    assert {part.dtype for part in term.tensors().values()} == {torch.float16}
    torch.testing.assert_close(term.a, a, rtol=2**-11, atol=0)
    torch.testing.assert_close(term.b, b, rtol=2**-11, atol=0)


def test_lowrank_from_factors_rank_beyond_the_matrix_is_kept() -> None:
    term = lowrank_from_factors(random_matrix((8, 3)), random_matrix((8, 2), 1))
    assert term.rank == 8
    check_term(term)


@pytest.mark.parametrize(
    ("a", "b", "bits"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), 16),
        (torch.ones(3), torch.ones(3, 3), 16),
        (torch.ones(0, 3), torch.ones(0, 3), 16),
        (torch.ones(2, 3), torch.ones(2, 3), 5),
        (torch.full((2, 3), float("nan")), torch.ones(2, 3), 16),
    ],
)
def test_lowrank_from_factors_unusable_input_raises(a, b, bits) -> None:
    with pytest.raises(InputError):
        lowrank_from_factors(a, b, bits)


def _parts(bits: int) -> tuple[dict, dict]:
    term = lowrank_from_factors(random_matrix((3, 7)), random_matrix((3, 5), 1), bits)
    return term.params(), {name: part.clone() for name, part in term.tensors().items()}


@pytest.mark.parametrize(("bits", "part"), [(32, "a"), (16, "b"), (4, "a_scales"), (2, "b_scales")])
def test_lowrank_from_parts_non_finite_raises(bits: int, part: str) -> None:
    params, parts = _parts(bits)
    parts[part].view(-1)[1] = float("inf")
    with pytest.raises(NonFinite):
        LowRankTerm.from_parts((5, 7), params, parts)


def test_lowrank_from_parts_contradictions_raise() -> None:
    params, parts = _parts(4)
    make = LowRankTerm.from_parts
    for wrong, error in [
        ({"rank": 0}, WrongShape),
        ({"rank": 4}, WrongShape),
        ({"rank": 1.0}, Corrupt),
        ({"bits": 6}, UnsupportedVersion),
        ({"bits": 16}, Corrupt),
        ({"unit_b": float("nan")}, NonFinite),
    ]:
        with pytest.raises(error):
            make((5, 7), params | wrong, parts)
    with pytest.raises(WrongShape):
        make((5, 8), params, parts)
    damaged = parts["a"].clone()
    damaged[-1] |= 0xF0  # 21 codes of 4 bits: the last half byte is padding
    with pytest.raises(Corrupt, match="padding"):
        make((5, 7), params, parts | {"a": damaged})


def test_sources_transposed_and_residual_read_what_they_say() -> None:
    matrix = random_matrix((6, 9))
    head = lowrank_from_factors(random_matrix((2, 9)), random_matrix((2, 6), 1))
    rest = Residual(TensorSource(matrix), head)
    assert rest.shape == (6, 9)
    expected = (matrix - head.to_dense())[1:5, 2:8]
    torch.testing.assert_close(rest.block(1, 5, 2, 8), expected)
    assert torch.equal(Transposed(TensorSource(matrix)).block(2, 8, 1, 5), matrix[1:5, 2:8].T)
    source = TensorSource(matrix)
    source.block(0, 6, 0, 9).zero_()
    assert matrix.any()
