"""ImPart's block factors under the interpreter, against the codec's own dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compressor.codecs.impart import ImpartTerm
from compressor.encoders.codec import make_encoder
from compressor.encoders.sources import TensorSource
from server.ops.factors import ImpartFactors, rank_lists
from server.ops.triton.impart import impart_add_, impart_add_reference_
from server.ops.triton.segments import segment_arrays
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
    params = encoder.fit(shape, shape[0] * shape[1] * 2 / 2)
    (term,) = encoder.encode("w", TensorSource(dense), params, seed)
    assert isinstance(term, ImpartTerm)
    return term


def in_blocks(values: Tensor, block_rows: int) -> Tensor:
    blocks = -(-len(values) // block_rows)
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, blocks * block_rows - len(values)))
    return padded.view(blocks, block_rows, -1)


def stack(terms: dict[int, ImpartTerm], n_slots: int, ranks: int) -> ImpartFactors:
    """Slot arrays; slots without a term hold NaN and wild indices. Slot s is at place s."""
    first = next(iter(terms.values()))
    r, kept = first.block_rows, first.kept
    u, v = in_blocks(first.u_values, r), in_blocks(first.v_values, r)
    nan, wild = float("nan"), 10**6

    def indices(size: int) -> Tensor:
        return torch.full((n_slots, size), wild, dtype=torch.int32)

    arrays = ImpartFactors(
        u_values=torch.full((n_slots, *u.shape), nan),
        u_index=indices(len(u) * kept),
        v_values=torch.full((n_slots, *v.shape), nan),
        v_index=indices(len(v) * kept),
        order=indices(len(v) * kept),
        first=indices(ranks + 1),
        sigma=torch.full((n_slots, ranks), nan),
        present=frozenset(),
        place_of=torch.zeros(n_slots, dtype=torch.int32),
    )
    for slot, term in terms.items():
        arrays.u_values[slot] = in_blocks(term.u_values, r)
        arrays.u_index[slot] = term.u_index.int().flatten()
        arrays.v_values[slot] = in_blocks(term.v_values, r)
        arrays.v_index[slot] = term.v_index.int().flatten()
        arrays.order[slot], arrays.first[slot] = rank_lists(term.v_index.flatten(), ranks)
        arrays.sigma[slot] = 0
        arrays.sigma[slot, : term.rank] = term.sigma
        arrays.place_of[slot] = slot + 1
    return arrays


@pytest.mark.parametrize(
    ("sizes", "n", "block_rows"),
    [((48,), 32, 16), ((37, 20, 16), 50, 16), ((33,), 40, 20)],
)
def test_kernels_mixed_batch_equal_the_codecs_matrix(
    sizes: tuple[int, ...], n: int, block_rows: int
) -> None:
    # The members of a group need not have the same variants.
    variants = [
        {slot: encode((m, n), block_rows, 10 * g + slot) for slot in ((0, 2) if g < 2 else (2,))}
        for g, m in enumerate(sizes)
    ]
    arrays = [stack(terms, 3, min(m, n)) for terms, m in zip(variants, sizes, strict=True)]
    segments = segments_of([(-1, 2), (0, 1), (1, 1), (2, 18)])
    rows = segments[-1].end
    x = torch.randn(rows, n, generator=generator(9))
    y, whole = guarded(rows, sum(sizes), 8, torch.float32)
    parts = y.split(sizes, 1)
    want = torch.cat(
        [
            expected(part, x, segments, {slot: term.to_dense() for slot, term in terms.items()})
            for part, terms in zip(parts, variants, strict=True)
        ],
        dim=1,
    )
    where = segment_arrays(segments, 16, CPU)
    reference = y.clone()
    impart_add_reference_(reference.split(sizes, 1), x, where, arrays)
    impart_add_(parts, x, where, arrays)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reference.double(), want, rtol=1e-4, atol=1e-5)
    assert_guard_intact(whole, rows, sum(sizes))


def test_rank_lists_name_every_part_once_in_order() -> None:
    index = torch.tensor([0, 3, 4, 1, 3, 4, 0, 1, 3])
    order, first = rank_lists(index, 6)
    lists = [order[first[k] : first[k + 1]].tolist() for k in range(6)]
    assert lists == [[0, 6], [3, 7], [], [1, 4, 8], [2, 5], []]
