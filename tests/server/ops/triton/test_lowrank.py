"""Shrink and expand of a projection group, against dense float64 products."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from server.ops.triton import lowrank
from server.ops.triton.layout import segment_arrays
from server.ops.triton.lowrank import (
    LowRankArrays,
    lowrank_add_,
    lowrank_add_reference_,
    output_tiles,
)
from tests.server.ops.triton.helpers import (
    CPU,
    assert_guard_intact,
    expected,
    generator,
    guarded,
    segments_of,
)


@pytest.mark.parametrize(
    ("sizes", "n", "rank"), [((48,), 40, 8), ((130, 16, 16), 33, 3), ((20, 24), 70, 20)]
)
@pytest.mark.parametrize("chunk", [32, 512])
def test_kernels_mixed_batch_equal_dense_products(
    sizes: tuple[int, ...], n: int, rank: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "CHUNK_INPUTS", chunk)
    a = torch.randn(4, len(sizes) * rank, n, generator=generator(0))
    b = torch.randn(4, rank, sum(sizes), generator=generator(1))
    present = torch.tensor([1, 2, 0, 4], dtype=torch.int32)
    a[2], b[2] = float("nan"), float("nan")
    dense = {}
    for slot in (0, 1, 3):
        parts, column = [], 0
        for g, m in enumerate(sizes):
            left = b[slot, :, column : column + m].double().T
            parts.append(left @ a[slot, g * rank : (g + 1) * rank].double())
            column += m
        dense[slot] = torch.cat(parts)
    segments = segments_of([(-1, 2), (0, 1), (2, 1), (3, 19)])
    rows = segments[-1].end
    x = torch.randn(rows, n, generator=generator(2))
    y, whole = guarded(rows, sum(sizes), 3, torch.float32)
    want = expected(y, x, segments, dense)
    arrays = LowRankArrays(a, b, sizes, present)
    where = segment_arrays(segments, 16, CPU)
    reference = y.clone()
    lowrank_add_reference_(reference, x, where, arrays)
    lowrank_add_(y, x, where, arrays, output_tiles(sizes))
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference.double(), want, rtol=1e-4, atol=1e-4)
    assert_guard_intact(whole, rows, sum(sizes))
