from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.codecs import BlockDiagTerm, LowRankTerm
from compressor.codecs.blockdiag import BLOCKDIAG_BITS, SCALE_BITS, load_scales
from compressor.codecs.partition import partition
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource
from compressor.errors import Corrupt, NonFinite, UnsupportedTensor, UnsupportedVersion, WrongShape
from tests.compressor.codec_oracles import (
    SHAPES,
    check_term,
    cuts,
    encode,
    payload,
    random_matrix,
)


class RecordingSource:
    """Remembers which elements were read."""

    def __init__(self, matrix: Tensor) -> None:
        self._source = TensorSource(matrix)
        self.shape = self._source.shape
        self.read = torch.zeros(matrix.shape, dtype=torch.bool)
        self.largest = 0

    def block(self, row_start: int, row_end: int, col_start: int, col_end: int) -> Tensor:
        self.read[row_start:row_end, col_start:col_end] = True
        self.largest = max(self.largest, (row_end - row_start) * (col_end - col_start))
        return self._source.block(row_start, row_end, col_start, col_end)


def make(
    shape: tuple[int, int], n_blocks: int, bits: int, seed: int = 0, scale_bits: int = 16
) -> BlockDiagTerm:
    params = {"n_blocks": n_blocks, "bits": bits, "scale_bits": scale_bits}
    (term,) = encode(make_encoder("blockdiag"), random_matrix(shape, seed), params)
    assert isinstance(term, BlockDiagTerm)
    return term


@given(st.integers(1, 60), st.integers(1, 60))
def test_partition_any_size_equals_array_split(size: int, parts: int) -> None:
    parts = min(parts, size)
    starts = partition(size, parts)
    assert [range(a, b) for a, b in itertools.pairwise(starts)] == cuts(size, parts)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.integers(1, 40),
    st.sampled_from(BLOCKDIAG_BITS),
    st.integers(0, 99),
    st.sampled_from(SCALE_BITS),
)
def test_blockdiag_any_shape_agrees_with_element_loop(
    shape, n_blocks, bits, seed, scale_bits
) -> None:
    term = make(shape, min(n_blocks, *shape), bits, seed, scale_bits)
    check_term(term)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 40), st.sampled_from(BLOCKDIAG_BITS))
def test_blockdiag_code_blocks_any_shape_hold_the_diagonal_of_to_dense(
    shape, n_blocks, bits
) -> None:
    n_blocks = min(n_blocks, *shape)
    term = make(shape, n_blocks, bits)
    dense = term.to_dense()
    codes, scales = term.code_blocks()
    rows, cols = cuts(shape[0], n_blocks), cuts(shape[1], n_blocks)
    assert codes.shape == (n_blocks, max(map(len, rows)), max(map(len, cols)))
    assert scales.shape == codes.shape[:2]
    centre = 0.0 if bits == 16 else (2**bits - 1) / 2
    for block, (r, c) in enumerate(zip(rows, cols, strict=True)):
        for i, j in itertools.product(range(len(r)), range(len(c))):
            scale = float(load_scales(scales[block, i : i + 1], term.unit))
            value = (float(codes[block, i, j]) - centre) * scale
            assert value == pytest.approx(float(dense[r.start + i, c.start + j]), rel=1e-6)
        assert not codes[block, len(r) :].any()
        assert not codes[block, :, len(c) :].any()
        assert not scales[block, len(r) :].any()


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-3), (8, 0.015), (4, 0.12), (2, 0.4)])
def test_blockdiag_encode_keeps_diagonal_rescaled_by_inverse_share(bits, tolerance) -> None:
    shape, s = (50, 31), 4
    matrix = random_matrix(shape)
    dense = make(shape, s, bits).to_dense()
    expected = torch.zeros(shape)
    for r, c in zip(cuts(50, s), cuts(31, s), strict=True):
        block = slice(r.start, r.stop), slice(c.start, c.stop)
        expected[block] = matrix[block] * (31 / len(c))
    assert float((dense - expected).norm() / expected.norm()) < tolerance
    assert not dense[expected == 0].any()


def test_blockdiag_one_byte_scales_are_within_half_a_step_of_the_exact() -> None:
    exact, coarse = make((40, 30), 3, 2), make((40, 30), 3, 2, scale_bits=8)
    assert torch.equal(exact.codes, coarse.codes)
    assert coarse.tensors()["scales"].dtype == torch.uint8
    ratio = (coarse.scales / exact.scales).double().log2()
    assert float(ratio.abs().max()) < 0.5 / 16 + 1e-3
    assert payload((exact,)) - payload((coarse,)) == 40


def test_blockdiag_stored_before_one_byte_scales_still_reads() -> None:
    """Artifacts of format 1 without `scale_bits` hold float16."""
    term = make((11, 9), 2, 4)
    assert "scale_bits" not in term.params()
    check_term(BlockDiagTerm.from_parts((11, 9), term.params(), term.tensors()))


@pytest.mark.parametrize(("bits", "scale_bits"), [(2, 8), (4, 16), (16, 16)])
def test_blockdiag_rescaled_is_exactly_the_multiple_and_stored_as_such(bits, scale_bits) -> None:
    term = make((11, 9), 2, bits, scale_bits=scale_bits)
    for factor in (0.25, 2.0):
        rescaled = term.rescaled(factor)
        assert torch.equal(rescaled.to_dense(), term.to_dense() * factor)
        check_term(rescaled)


def test_blockdiag_one_block_of_16_bits_is_the_matrix() -> None:
    matrix = random_matrix((9, 14))
    torch.testing.assert_close(make((9, 14), 1, 16).to_dense(), matrix, rtol=2**-11, atol=0)


@pytest.mark.parametrize("bits", BLOCKDIAG_BITS)
def test_blockdiag_encode_without_head_reads_only_the_diagonal_blocks(bits: int) -> None:
    source = RecordingSource(random_matrix((30, 22)))
    make_encoder("blockdiag").encode("w", source, {"n_blocks": 4, "bits": bits}, 0)
    expected = torch.zeros(30, 22, dtype=torch.bool)
    for r, c in zip(cuts(30, 4), cuts(22, 4), strict=True):
        expected[r.start : r.stop, c.start : c.stop] = True
    assert torch.equal(source.read, expected)


def test_blockdiag_encode_large_block_is_read_in_strips() -> None:
    source = RecordingSource(random_matrix((3000, 1000)))
    (term,) = make_encoder("blockdiag").encode("w", source, {"n_blocks": 1, "bits": 2}, 0)
    assert source.largest <= 1 << 20
    assert source.read.all()
    matrix = random_matrix((3000, 1000))
    assert float((term.to_dense() - matrix).norm() / matrix.norm()) < 0.36  # 2-bit normal: .343


@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.sampled_from(BLOCKDIAG_BITS),
    st.floats(0, 4000),
    st.sampled_from([0.0, 0.3, 0.8]),
)
def test_blockdiag_size_bytes_any_plan_is_what_tensors_hold(shape, bits, budget, head) -> None:
    codec = make_encoder("blockdiag", bits=bits, head_fraction=head)
    params = codec.fit(shape, budget)
    terms = encode(codec, random_matrix(shape), params)
    assert payload(terms) == codec.size_bytes(shape, params)
    for term in terms:
        check_term(term)


@pytest.mark.parametrize("bits", BLOCKDIAG_BITS)
@pytest.mark.parametrize("shape", [(50, 31), (64, 48), (200, 10)])
def test_blockdiag_plan_without_slack_is_the_nearest_size(bits: int, shape) -> None:
    codec = make_encoder("blockdiag", bits=bits, divisor_slack=0)
    form = codec.fit(shape, 0)
    sizes = {s: codec.size_bytes(shape, form | {"n_blocks": s}) for s in range(1, min(shape) + 1)}
    for budget in (0, 50, 130, 400, 777, 1500, 10**6):
        chosen = codec.fit(shape, budget)["n_blocks"]
        nearest = min(abs(size - budget) for size in sizes.values())
        assert abs(sizes[chosen] - budget) == nearest


def test_blockdiag_plan_prefers_common_divisor_within_slack() -> None:
    shape = (576, 1536)
    budget = 576 * 1536 * 2 / 32
    near = make_encoder("blockdiag", bits=4).fit(shape, budget)["n_blocks"]
    assert 576 % near == 0
    assert 1536 % near == 0
    assert make_encoder("blockdiag", bits=4).fit((577, 1531), budget)["n_blocks"] == 8


def test_blockdiag_head_takes_about_its_share_and_lowers_the_error() -> None:
    u, v = (torch.linalg.qr(random_matrix((60, 60), s))[0] for s in (1, 2))
    matrix = (u * torch.tensor([1.0, 0.7, 0.5] + [0.01] * 57)) @ v.T
    budget = 60 * 60 * 2 / 8
    codec = make_encoder("blockdiag", head_fraction=0.4)
    params = codec.fit((60, 60), budget)
    head, rest = encode(codec, matrix, params)
    assert isinstance(head, LowRankTerm)
    assert isinstance(rest, BlockDiagTerm)
    assert payload((head,)) == pytest.approx(0.4 * budget, rel=0.4)
    plain = make_encoder("blockdiag")
    (alone,) = encode(plain, matrix, plain.fit((60, 60), budget))
    error = (head.to_dense() + rest.to_dense() - matrix).norm()
    assert error < 0.5 * (alone.to_dense() - matrix).norm()


def test_blockdiag_encode_same_input_gives_identical_bytes() -> None:
    codec = make_encoder("blockdiag", head_fraction=0.3)
    params = codec.fit((40, 30), 400)
    one, two = (encode(codec, random_matrix((40, 30)), params) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert a.params() == b.params()
        for name, part in a.tensors().items():
            assert part.numpy().tobytes() == b.tensors()[name].numpy().tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_blockdiag_encode_unusable_value_raises_naming_the_tensor(bad: float) -> None:
    matrix = random_matrix((8, 8))
    matrix[0, 0] = bad
    with pytest.raises(UnsupportedTensor, match=r"layer\.weight"):
        encode(make_encoder("blockdiag"), matrix, {"n_blocks": 2, "bits": 4})


def test_blockdiag_zero_matrix_round_trips_to_zero() -> None:
    for bits in BLOCKDIAG_BITS:
        (term,) = encode(
            make_encoder("blockdiag"), torch.zeros(6, 6), {"n_blocks": 2, "bits": bits}
        )
        assert not term.to_dense().any()
        check_term(term)


@pytest.mark.parametrize("ids", [[-1], [6], [0, 7]])
def test_blockdiag_rows_outside_the_matrix_raise(ids: list[int]) -> None:
    with pytest.raises(IndexError):
        make((6, 6), 2, 4).dense_rows(torch.tensor(ids))


def _parts(bits: int = 3) -> tuple[dict, dict[str, Tensor]]:
    term = make((11, 9), 2, bits)
    return term.params(), {name: part.clone() for name, part in term.tensors().items()}


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("n_blocks", 0, WrongShape),
        ("n_blocks", 10, WrongShape),
        ("n_blocks", 3, WrongShape),
        ("n_blocks", "2", Corrupt),
        ("n_blocks", True, Corrupt),
        ("n_blocks", None, Corrupt),
        ("bits", 5, UnsupportedVersion),
        ("scale_bits", 4, UnsupportedVersion),
        ("scale_bits", 8, WrongShape),
        ("scale_bits", True, Corrupt),
        ("bits", 4, WrongShape),
        ("unit", float("nan"), NonFinite),
        ("unit", float("inf"), NonFinite),
        ("unit", 10**400, NonFinite),
        ("unit", 0.0, NonFinite),
        ("unit", -1.0, NonFinite),
        ("unit", 1e35, NonFinite),
        ("unit", "1", Corrupt),
    ],
)
def test_blockdiag_from_parts_bad_parameter_raises(key, value, error) -> None:
    params, parts = _parts()
    with pytest.raises(error):
        BlockDiagTerm.from_parts((11, 9), params | {key: value}, parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("bits", "part"), [(3, "scales"), (16, "values")])
def test_blockdiag_from_parts_non_finite_raises(bad: float, bits: int, part: str) -> None:
    params, parts = _parts(bits)
    parts[part][5] = bad
    with pytest.raises(NonFinite):
        BlockDiagTerm.from_parts((11, 9), params, parts)


def test_blockdiag_from_parts_wrong_parts_raise() -> None:
    params, parts = _parts()
    from_parts = BlockDiagTerm.from_parts
    with pytest.raises(Corrupt):
        from_parts((11, 9), params, {"codes": parts["codes"]})
    with pytest.raises(Corrupt):
        from_parts((11, 9), params, parts | {"extra": parts["codes"]})
    with pytest.raises(WrongShape):
        from_parts((11, 9), params, parts | {"scales": parts["scales"][:-1]})
    with pytest.raises(WrongShape):
        from_parts((11, 9), params, parts | {"scales": parts["scales"].float()})
    with pytest.raises(WrongShape):
        from_parts((11, 9), params, parts | {"codes": parts["codes"][:-1]})
    padded = parts["codes"].clone()
    padded[-1] |= 0x80  # 50 values of 3 bits leave 2 bits of the last byte
    with pytest.raises(Corrupt, match="padding"):
        from_parts((11, 9), params, parts | {"codes": padded})
    for shape in [(0, 9), (11,), (11, 9, 1), (12, 9)]:
        with pytest.raises(WrongShape):
            from_parts(shape, params, parts)


def test_blockdiag_mean_over_cyclic_shifts_is_the_matrix() -> None:
    """Unbiased: over all alignments of columns to blocks the average is dW itself."""
    matrix = random_matrix((8, 12))
    total = np.zeros((8, 12))
    for shift in range(12):
        rolled = torch.roll(matrix, shift, 1)
        (term,) = encode(make_encoder("blockdiag"), rolled, {"n_blocks": 4, "bits": 16})
        total += torch.roll(term.to_dense(), -shift, 1).double().numpy()
    np.testing.assert_allclose(total / 12, matrix.double().numpy(), rtol=1e-3, atol=1e-7)
