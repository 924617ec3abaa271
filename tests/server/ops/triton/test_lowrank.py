"""Shrink and expand of a projection group, against dense float64 products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.ops.factors import LowRankFactors
from server.ops.triton import lowrank
from server.ops.triton.lowrank import lowrank_add_, lowrank_add_reference_
from server.ops.triton.segments import segment_arrays
from tests.server.ops.triton.helpers import (
    CPU,
    assert_guard_intact,
    expected,
    generator,
    guarded,
    segments_of,
)

# Place + 1 of slots 0 .. 3, for each matrix: they need not agree.
PLACES = ([1, 2, 0, 4], [3, 0, 0, 1], [0, 0, 0, 2])


def factors_of(m: int, n: int, rank: int, seed: int, places: list[int]) -> LowRankFactors:
    """Places that no slot has hold NaN."""
    a = torch.full((4, rank, n), float("nan"))
    b = torch.full((4, rank, m), float("nan"))
    for place in (p - 1 for p in places if p):
        a[place] = torch.randn(rank, n, generator=generator(seed + place))
        b[place] = torch.randn(rank, m, generator=generator(seed + 10 + place))
    return LowRankFactors(a, b, frozenset(), torch.tensor(places, dtype=torch.int32))


def dense_of(term: LowRankFactors) -> dict[int, Tensor]:
    held = [(slot, place - 1) for slot, place in enumerate(term.place_of.tolist()) if place]
    return {slot: term.b[place].double().T @ term.a[place].double() for slot, place in held}


@pytest.mark.parametrize(
    ("sizes", "n", "ranks"),
    [((48,), 40, (8,)), ((130, 16, 16), 33, (3, 17, 1)), ((20, 24), 70, (20, 4))],
)
@pytest.mark.parametrize("chunk", [32, 512])
def test_kernels_mixed_batch_equal_dense_products(
    sizes: tuple[int, ...],
    n: int,
    ranks: tuple[int, ...],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowrank, "CHUNK_INPUTS", chunk)
    terms = [
        factors_of(m, n, rank, 100 * g, PLACES[g])
        for g, (m, rank) in enumerate(zip(sizes, ranks, strict=True))
    ]
    segments = segments_of([(-1, 2), (0, 1), (2, 1), (3, 19)])
    rows = segments[-1].end
    x = torch.randn(rows, n, generator=generator(2))
    y, whole = guarded(rows, sum(sizes), 3, torch.float32)
    parts = y.split(sizes, 1)
    want = torch.cat(
        [
            expected(part, x, segments, dense_of(term))
            for part, term in zip(parts, terms, strict=True)
        ],
        dim=1,
    )
    where = segment_arrays(segments, 16, CPU)
    reference = y.clone()
    lowrank_add_reference_(reference.split(sizes, 1), x, where, terms)
    lowrank_add_(parts, x, where, terms)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference.double(), want, rtol=1e-4, atol=1e-4)
    assert_guard_intact(whole, rows, sum(sizes))
