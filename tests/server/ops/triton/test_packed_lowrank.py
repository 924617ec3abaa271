"""Shrink and expand straight from packed codes, against dense float64 products from the codes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compressor.codecs.columns import pack_columns, packed_rows
from server.ops.kernels import TorchKernels
from server.ops.lowrank import HeldLowRank, PackedLowRank
from server.ops.row_mapping import Segment
from server.ops.static_row_mapping import StaticRowMapping
from server.ops.triton import lowrank
from server.ops.triton.kernels import TritonKernels
from server.ops.triton.packed_lowrank import packed_lowrank_add_, packed_lowrank_add_reference_
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
MIXED = [(-1, 2), (0, 1), (2, 1), (3, 19)]


@dataclass(frozen=True)
class Head:
    """Packed factors and their ``dW [m, n]`` by slot, float64, from the codes before packing."""

    factors: PackedLowRank
    dense: dict[int, Tensor]


def head_of(m: int, n: int, rank: int, bits: int, seed: int, places: list[int]) -> Head:
    """Places that no slot has hold NaN and garbage."""
    down = torch.full((4, packed_rows(n, bits), rank), 0xA5, dtype=torch.uint8)
    up = torch.full((4, packed_rows(rank, bits), m), 0xA5, dtype=torch.uint8)
    scales = torch.full((4, rank), float("nan"), dtype=torch.float16)
    units, gains = torch.full((4, 1), float("nan")), torch.full((4, rank), float("nan"))
    middle, dense = ((1 << bits) - 1) / 2, {}
    for slot, place in ((s, p - 1) for s, p in enumerate(places) if p):
        rng = generator(seed + place)
        a = torch.randint(0, 1 << bits, (n, rank), generator=rng, dtype=torch.uint8)
        b = torch.randint(0, 1 << bits, (rank, m), generator=rng, dtype=torch.uint8)
        down[place], up[place] = pack_columns(a, bits), pack_columns(b, bits)
        scales[place] = torch.rand(rank, generator=rng).add(0.5).half()
        units[place] = 0.5**bits
        gains[place] = (torch.rand(rank, generator=rng) + 0.5) * 0.5**bits
        factor = scales[place].double() * units[place].double() * gains[place].double()
        dense[slot] = (b.double() - middle).T @ ((a.double() - middle) * factor).T
    op = PackedLowRank(
        down, scales, units, up, gains,
        n=n,
        bits=bits,
        make_op=TorchKernels().blockdiag,
        place_of=torch.tensor(places, dtype=torch.int32),
    )  # fmt: skip
    return Head(op, dense)


def heads_of(sizes: tuple[int, ...], n: int, ranks: tuple[int, ...], bits: int) -> list[Head]:
    return [
        head_of(m, n, rank, bits, 100 * g, PLACES[g])
        for g, (m, rank) in enumerate(zip(sizes, ranks, strict=True))
    ]


def wanted(
    parts: tuple[Tensor, ...], x: Tensor, segments: list[Segment], heads: list[Head]
) -> Tensor:
    added = [expected(y, x, segments, head.dense) for y, head in zip(parts, heads, strict=True)]
    return torch.cat(added, dim=1)


# 3 bit: 72 and 16 inputs have planes that line up, 33 and 12 have not.
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("sizes", "n", "ranks", "chunk"),
    [((130, 16, 16), 33, (4, 36, 0), 32), ((24, 20), 72, (16, 12), 512)],
)
def test_kernels_mixed_batch_equal_dense_products(
    bits: int,
    sizes: tuple[int, ...],
    n: int,
    ranks: tuple[int, ...],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lowrank, "CHUNK_INPUTS", chunk)
    heads, segments = heads_of(sizes, n, ranks, bits), segments_of(MIXED)
    rows = segments[-1].end
    x = torch.randn(rows, n, generator=generator(2))
    y, whole = guarded(rows, sum(sizes), 3, torch.float32)
    parts = y.split(sizes, 1)
    want = wanted(parts, x, segments, heads)
    where, factors = segment_arrays(segments, 16, CPU), [head.factors for head in heads]
    reference = y.clone()
    packed_lowrank_add_reference_(reference.split(sizes, 1), x, where, factors)
    packed_lowrank_add_(parts, x, where, factors)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference.double(), want, rtol=1e-4, atol=1e-4)
    assert_guard_intact(whole, rows, sum(sizes))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernels_bfloat16_deviate_by_roundings_of_hidden_and_result(bits: int) -> None:
    sizes, n = (40, 16), 64
    heads, segments = heads_of(sizes, n, (8, 4), bits), segments_of(MIXED)
    rows = segments[-1].end
    x = torch.randn(rows, n, generator=generator(2)).bfloat16()
    y = torch.zeros(rows, sum(sizes), dtype=torch.bfloat16)
    want = wanted(y.split(sizes, 1), x, segments, heads)
    where, factors = segment_arrays(segments, 16, CPU), [head.factors for head in heads]
    packed_lowrank_add_(y.split(sizes, 1), x, where, factors)
    # The interpreter cuts off where a device rounds to nearest.
    assert float((y.double() - want).abs().max()) < 2.0**-6 * float(want.abs().max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_static_step_poisoned_padding_is_neither_read_nor_written(bits: int) -> None:
    sizes, n = (40, 16), 24
    heads = heads_of(sizes, n, (8, 4), bits)
    segments = [Segment(0, 0, 1), Segment(3, 1, 3), Segment(1, 3, 4)]
    used = [(s.slot, s.start, s.end) for s in segments]
    table = torch.tensor([*used, (0, 4, 6), (3, 0, 6)])  # the last two are not in use
    slots = torch.tensor([0, 3, 3, 1, -1, -1])
    count = torch.tensor([len(segments)], dtype=torch.int32)
    mapping = StaticRowMapping(slots, table, count, 2, with_deltas=True)
    x = torch.randn(6, n, generator=generator(2))
    x[4:] = float("nan")
    y = torch.zeros(6, sum(sizes))
    want = wanted(y.split(sizes, 1), x, segments, heads)
    terms = [HeldLowRank(head.factors, frozenset()) for head in heads]
    TritonKernels(CPU).packed_lowrank_add_(y.split(sizes, 1), x, mapping, terms)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
