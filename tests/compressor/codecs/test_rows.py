"""`rows`: the element loop, which rows are chosen, and what a damaged file may hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.codecs import LowRankTerm, RowsTerm
from compressor.codecs.rows import most_rows, rows_size
from compressor.encoders.blockdiag import ROW_BITS, BlockDiagCodec
from compressor.encoders.codec import make_encoder
from compressor.encoders.rows import encode_largest_rows
from compressor.encoders.sources import TensorSource
from compressor.errors import Corrupt, NonFinite, UnsupportedTensor, UnsupportedVersion, WrongShape
from tests.compressor.codec_oracles import SHAPES, check_term, encode, payload, random_matrix


@given(SHAPES, st.integers(1, 40), st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_encode_any_shape_agrees_with_the_element_loop_and_its_size(
    shape: tuple[int, int], n_rows: int, bits: int
) -> None:
    n_rows = min(n_rows, shape[0])
    term = encode_largest_rows("w", TensorSource(random_matrix(shape)), n_rows, bits)
    check_term(term)
    assert payload((term,)) == rows_size(shape, n_rows, bits)
    again = RowsTerm.from_parts(shape, term.params(), term.tensors())
    assert torch.equal(again.to_dense(), term.to_dense())


def test_encode_keeps_the_rows_of_the_largest_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.encoders.svd._STRIP", 60)  # several strips
    matrix = random_matrix((40, 12))
    matrix[[3, 17, 18, 39]] *= 20
    term = encode_largest_rows("w", TensorSource(matrix), 4, 8)
    assert term.index.tolist() == [3, 17, 18, 39]
    kept = term.to_dense()[term.index]
    torch.testing.assert_close(kept, matrix[term.index], rtol=0.05, atol=1e-3)


def test_encode_of_equal_rows_keeps_the_first() -> None:
    term = encode_largest_rows("w", TensorSource(torch.ones(9, 4)), 3, 2)
    assert term.index.tolist() == [0, 1, 2]


def test_encode_not_finite_raises_naming_the_tensor() -> None:
    matrix = random_matrix((9, 4))
    matrix[5, 1] = float("nan")
    with pytest.raises(UnsupportedTensor, match="w of layer"):
        encode_largest_rows("w of layer", TensorSource(matrix), 3, 2)


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(0, 100_000))
@settings(deadline=None)
def test_most_rows_fit_the_bytes_and_one_more_would_not(m: int, n: int, budget: int) -> None:
    found = most_rows((m, n), budget, 2)
    assert 1 <= found <= m
    if found > 1:
        assert rows_size((m, n), found, 2) <= budget + 1
    if found < m:
        assert rows_size((m, n), found + 1, 2) > budget - 1


def test_blockdiag_codec_head_and_rows_are_stored_instead_of_blocks() -> None:
    codec = BlockDiagCodec(bits=2)
    params = codec.settings(3, 0, n_rows=5)
    matrix = random_matrix((60, 40))
    head, rows = encode(codec, matrix, params)
    assert isinstance(head, LowRankTerm)
    assert isinstance(rows, RowsTerm)
    assert (head.codec, rows.codec) == codec.terms_of(params)
    assert payload((head, rows)) == codec.size_bytes((60, 40), params)
    rest = matrix - head.to_dense()
    best = rest.square().sum(1).topk(5).indices.sort().values
    assert rows.index.tolist() == best.tolist()
    assert rows.bits == ROW_BITS
    assert codec.terms_of(codec.settings(3, 0)) == ("lowrank",)


def stored() -> tuple[dict, dict]:
    term = encode_largest_rows("w", TensorSource(random_matrix((11, 5))), 3, 3)
    return term.params(), {name: part.clone() for name, part in term.tensors().items()}


def test_from_parts_contradictions_raise() -> None:
    params, parts = stored()
    for wrong, error in [
        ({"n_rows": 0}, WrongShape),
        ({"n_rows": 12}, WrongShape),
        ({"n_rows": 4}, Corrupt),
        ({"n_rows": True}, Corrupt),
        ({"bits": 5}, UnsupportedVersion),
        ({"bits": 4}, WrongShape),
        ({"unit": 0.0}, NonFinite),
    ]:
        with pytest.raises(error):
            RowsTerm.from_parts((11, 5), params | wrong, parts)
    with pytest.raises(WrongShape):
        RowsTerm.from_parts((17, 5), params, parts)
    with pytest.raises(WrongShape):
        RowsTerm.from_parts((11, 6), params, parts)
    with pytest.raises(Corrupt, match="expected parts"):
        RowsTerm.from_parts((11, 5), params, {k: v for k, v in parts.items() if k != "mask"})


def test_from_parts_row_past_the_end_raises() -> None:
    params, parts = stored()
    parts["mask"][-1] |= 0x80  # bit 15 of 11 rows
    with pytest.raises(Corrupt, match="padding"):
        RowsTerm.from_parts((11, 5), params, parts)


def test_from_parts_other_number_of_rows_than_the_mask_raises() -> None:
    params, parts = stored()
    parts["mask"] = torch.tensor([0xFF, 0x07], dtype=torch.uint8)
    with pytest.raises(Corrupt, match="names 11 rows, not 3"):
        RowsTerm.from_parts((11, 5), params, parts)


def test_rows_is_no_codec_of_its_own_on_the_command_line() -> None:
    from compressor.errors import InputError

    with pytest.raises(InputError, match="unknown codec"):
        make_encoder("rows")
