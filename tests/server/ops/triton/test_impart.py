"""ImPart's block factors under the interpreter, against the codec's own dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compressor.codecs.encoder import make_encoder
from compressor.codecs.impart import ImpartTerm
from compressor.codecs.sources import TensorSource
from server.ops.triton.impart import (
    ImpartArrays,
    impart_add_,
    impart_add_reference_,
    rank_lists,
)
from server.ops.triton.layout import segment_arrays
from tests.server.ops.triton.helpers import (
    CPU,
    assert_guard_intact,
    expected,
    generator,
    guarded,
    segments_of,
)


def encode(shape: tuple[int, int], block_rows: int, seed: int) -> ImpartTerm:
    encoder = make_encoder("impart", block_rows=block_rows)
    dense = torch.randn(shape, generator=generator(seed)) * 0.1
    params = encoder.plan(shape, shape[0] * shape[1] * 2 / 2)
    (term,) = encoder.encode("w", TensorSource(dense), params, seed)
    assert isinstance(term, ImpartTerm)
    return term


def in_blocks(values: Tensor, block_rows: int) -> Tensor:
    blocks = -(-len(values) // block_rows)
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, blocks * block_rows - len(values)))
    return padded.view(blocks, block_rows, -1)


def stack(terms: dict[int, ImpartTerm], n_slots: int, ranks: int) -> ImpartArrays:
    """Slot arrays; slots without a term hold NaN and wild indices."""
    first = next(iter(terms.values()))
    r, kept = first.block_rows, first.kept
    u, v = in_blocks(first.u_values, r), in_blocks(first.v_values, r)
    nan = float("nan")
    arrays = ImpartArrays(
        u_values=torch.full((n_slots, *u.shape), nan),
        u_index=torch.full((n_slots, len(u) * kept), 10**6),
        v_values=torch.full((n_slots, *v.shape), nan),
        order=torch.full((n_slots, len(v) * kept), 10**6, dtype=torch.int32),
        first=torch.full((n_slots, ranks + 1), 10**6, dtype=torch.int32),
        sigma=torch.full((n_slots, ranks), nan),
        present=torch.zeros(n_slots, dtype=torch.int32),
    )
    for slot, term in terms.items():
        arrays.u_values[slot] = in_blocks(term.u_values, r)
        arrays.u_index[slot] = term.u_index.long().flatten()
        arrays.v_values[slot] = in_blocks(term.v_values, r)
        arrays.order[slot], arrays.first[slot] = rank_lists(term.v_index.flatten(), ranks)
        arrays.sigma[slot] = 0
        arrays.sigma[slot, : term.rank] = term.sigma
        arrays.present[slot] = slot + 1
    return arrays


@pytest.mark.parametrize(("shape", "block_rows"), [((48, 32), 16), ((37, 50), 16), ((33, 40), 20)])
def test_kernels_mixed_batch_equal_the_codecs_matrix(
    shape: tuple[int, int], block_rows: int
) -> None:
    terms = {slot: encode(shape, block_rows, slot) for slot in (0, 2)}
    arrays = stack(terms, 3, min(shape))
    segments = segments_of([(-1, 2), (0, 1), (1, 1), (2, 18)])
    rows = segments[-1].end
    x = torch.randn(rows, shape[1], generator=generator(9))
    y, whole = guarded(rows, shape[0], 8, torch.float32)
    want = expected(y, x, segments, {slot: term.to_dense() for slot, term in terms.items()})
    where = segment_arrays(segments, 16, CPU)
    reference = y.clone()
    impart_add_reference_(reference, x, where, arrays)
    impart_add_(y, x, where, arrays)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference.double(), want, rtol=1e-4, atol=1e-5)
    assert_guard_intact(whole, rows, shape[0])


def test_rank_lists_name_every_part_once_in_order() -> None:
    index = torch.tensor([0, 3, 4, 1, 3, 4, 0, 1, 3])
    order, first = rank_lists(index, 6)
    lists = [order[first[k] : first[k + 1]].tolist() for k in range(6)]
    assert lists == [[0, 6], [3, 7], [], [1, 4, 8], [2, 5], []]
