"""Codes in the order of kernels: against a reading bit by bit, and against bit streams."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.codecs import BlockDiagTerm, LowRankTerm, RowsTerm, Term, lowrank_from_factors
from compressor.codecs.columns import fills_bytes, pack_columns, packed_rows, unpack_columns
from compressor.encoders.blockdiag import encode_blocks
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import TensorSource
from compressor.errors import WrongShape
from tests.compressor.codec_oracles import as_stream, check_term, random_matrix


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 2**31 - 1),
)
def test_pack_columns_any_size_round_trips(nb: int, mb: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (2, nb, mb), dtype=torch.uint8, generator=generator)
    packed = pack_columns(codes, bits)
    assert packed.shape == (2, packed_rows(nb, bits), mb)
    assert torch.equal(unpack_columns(packed, bits, nb), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_columns_each_field_holds_a_run_of_inputs(bits: int) -> None:
    nb, mb, fields = 13, 3, 8 // bits
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (nb, mb), dtype=torch.uint8, generator=generator)
    packed = pack_columns(codes, bits)
    rows = -(-nb // fields)
    for j, i in itertools.product(range(nb), range(mb)):
        field, row = divmod(j, rows)
        assert (int(packed[row, i]) >> (field * bits)) & ((1 << bits) - 1) == int(codes[j, i])


def test_pack_columns_three_bits_are_a_plane_of_two_and_one_of_one() -> None:
    nb = 11
    codes = (torch.arange(nb) % 8).to(torch.uint8).unsqueeze(1)
    packed = pack_columns(codes, 3)
    low, high = packed[:3, 0].tolist(), packed[3:, 0].tolist()
    assert len(high) == 2
    for j in range(nb):
        two = (low[j % 3] >> (2 * (j // 3))) & 3
        one = (high[j % 2] >> (j // 2)) & 1
        assert two + 4 * one == int(codes[j])


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("n_inputs", range(1, 17))
def test_fills_bytes_exactly_where_the_order_costs_nothing(bits: int, n_inputs: int) -> None:
    if bits in (3, 16):
        assert not fills_bytes(n_inputs, bits)
    else:
        assert fills_bytes(n_inputs, bits) == (8 * packed_rows(n_inputs, bits) == n_inputs * bits)


EVEN = st.tuples(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.sampled_from([2, 4, 8])
)
by_size = settings(max_examples=40, deadline=None)


def check_both_orders(term: Term) -> None:
    """The term is in kernel order, is right, and has the values of its bit stream, bit for bit."""
    stream = as_stream(term)
    sizes = [sum(p.nbytes for p in t.tensors().values()) for t in (term, stream)]
    assert sizes[0] == sizes[1]
    check_term(term)
    check_term(stream)
    x = random_matrix((3, term.shape[1]), 5, 1.0)
    ids = torch.arange(term.shape[0]).flip(0)
    assert torch.equal(term.to_dense(), stream.to_dense())
    assert torch.equal(term.apply(x), stream.apply(x))
    assert torch.equal(term.dense_rows(ids), stream.dense_rows(ids))


@by_size
@given(EVEN)
def test_blockdiag_of_even_blocks_has_the_values_of_its_bit_stream(
    size: tuple[int, int, int, int],
) -> None:
    n_blocks, mb, nb, bits = size
    shape = n_blocks * mb, n_blocks * nb * (8 // bits)
    term = encode_blocks("w", TensorSource(random_matrix(shape)), n_blocks, bits)
    assert term.in_columns
    check_both_orders(term)


@by_size
@given(EVEN)
def test_lowrank_of_even_sizes_has_the_values_of_its_bit_stream(
    size: tuple[int, int, int, int],
) -> None:
    rank, m, n, bits = size
    rank, n = rank * (8 // bits), n * (8 // bits)
    factors = random_matrix((rank, n)), random_matrix((rank, m), 1)
    term = lowrank_from_factors(*factors, bits)
    assert term.in_columns("a")
    assert term.in_columns("b")
    check_both_orders(term)


@by_size
@given(EVEN)
def test_rows_of_an_even_width_have_the_values_of_their_bit_stream(
    size: tuple[int, int, int, int],
) -> None:
    n_rows, more, n, bits = size
    source = TensorSource(random_matrix((n_rows + more, n * (8 // bits))))
    term = encode_largest_rows("w", source, n_rows, bits)
    assert term.in_columns
    check_both_orders(term)


def test_lowrank_factors_each_have_their_own_order() -> None:
    term = lowrank_from_factors(random_matrix((3, 8)), random_matrix((3, 5), 1), 2)
    assert term.in_columns("a")
    assert not term.in_columns("b")
    check_term(term)


def test_from_parts_of_kernel_order_keeps_the_array_that_it_is_given() -> None:
    for term in even_terms():
        parts = term.tensors()
        again = type(term).from_parts(term.shape, term.params(), parts)
        for name, part in again.tensors().items():
            assert name == "mask" or part.data_ptr() == parts[name].data_ptr(), name


def even_terms() -> list[Term]:
    source = TensorSource(random_matrix((12, 16)))
    factors = random_matrix((8, 16)), random_matrix((8, 12), 1)
    rows = encode_largest_rows("w", source, 5, 2)
    return [encode_blocks("w", source, 2, 2), lowrank_from_factors(*factors, 2), rows]


@pytest.mark.parametrize("index", range(3))
def test_from_parts_array_of_other_dimensions_raises_wrong_shape(index: int) -> None:
    term = even_terms()[index]
    for name in term.tensors().keys() & {"codes", "a", "b"}:
        part = term.tensors()[name]
        shapes = [(1, part.numel()), (part.numel(), 1), (*part.shape, 1), (1, *part.shape)]
        others = [part.reshape(shape) for shape in shapes] + [part.to(torch.int16), part.sum()]
        for other in [*others, part.transpose(-1, -2).contiguous()]:
            wrong = term.tensors() | {name: other}
            with pytest.raises(WrongShape, match=f"part {name}"):
                type(term).from_parts(term.shape, term.params(), wrong)


def test_from_parts_array_where_sizes_do_not_fill_its_bytes_raises_wrong_shape() -> None:
    uneven: list[tuple[type[Term], tuple[int, int], dict, str, tuple[int, ...]]] = [
        (BlockDiagTerm, (8, 6), {"n_blocks": 2, "bits": 2}, "codes", (2, 1, 4)),  # 3 inputs
        (BlockDiagTerm, (9, 8), {"n_blocks": 2, "bits": 2}, "codes", (2, 1, 5)),  # 9 rows in 2
        (BlockDiagTerm, (8, 16), {"n_blocks": 2, "bits": 3}, "codes", (2, 3, 4)),
        (RowsTerm, (8, 6), {"n_rows": 8, "bits": 2}, "codes", (2, 8)),
        (RowsTerm, (8, 8), {"n_rows": 8, "bits": 3}, "codes", (3, 8)),
        (LowRankTerm, (8, 6), {"rank": 4, "bits": 2}, "a", (2, 4)),
        (LowRankTerm, (8, 8), {"rank": 3, "bits": 2}, "b", (1, 8)),
    ]
    for term, shape, params, name, array in uneven:
        rank = params.get("rank", 1)
        parts = {
            "scales": torch.full((shape[0],), 200, dtype=torch.uint8),
            "mask": torch.full((1,), 255, dtype=torch.uint8),
            "a_scales": torch.ones(rank).half(),
            "b_scales": torch.ones(rank).half(),
            "a": torch.zeros(-(-rank * shape[1] * params["bits"] // 8), dtype=torch.uint8),
            "b": torch.zeros(-(-rank * shape[0] * params["bits"] // 8), dtype=torch.uint8),
        } | {name: torch.zeros(array, dtype=torch.uint8)}
        wanted = {
            BlockDiagTerm: ("codes", "scales"),
            RowsTerm: ("codes", "scales", "mask"),
            LowRankTerm: ("a", "b", "a_scales", "b_scales"),
        }
        units = {"unit": 1.0, "unit_a": 1.0, "unit_b": 1.0, "scale_bits": 8}
        with pytest.raises(WrongShape, match="not fill the bytes"):
            term.from_parts(shape, params | units, {key: parts[key] for key in wanted[term]})
