"""Low-rank terms ``dW = b^T a`` of all matrices that read the same x: shrink, then expand.

`shrink` writes ``x a^T`` in `n_chunks` partial sums over the inputs, one program each (enough
programs for few variants), `expand` adds them in a fixed order: deterministic, no atomics, nothing
to zero. Variants are data, as in `blockdiag`.

Bytes per step: ``2 r (G n + sum m)`` for every distinct slot. Numerics: float32 sums; ``x a^T``
is rounded to x's dtype between the two products; y is rounded once.

Tensor parallelism: column-parallel: a replicated, b split by outputs; row-parallel: a split by
inputs, b replicated, each rank expands its own partial sum into the y that is all-reduced anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.triton.compat import (
    UPCAST,
    launch,
    mac,
    n_programs,
    next_power_of_two,
    slot_of,
)
from server.ops.triton.layout import SegmentArrays, place_of, rows_of, where_of

CHUNK_INPUTS = 512
TILE_INPUTS = 64
TILE_OUTPUTS = 128
MIN_TILE = 16


@dataclass(frozen=True, slots=True)
class LowRankArrays:
    """Slot arrays of G matrices ``[m_g, n]`` of one rank r.

    a        [C, G * r, n], ranks of the matrices one after the other
    b        [C, r, sum m], outputs side by side
    sizes    m of each matrix
    present  int32 [slots]: place + 1 of a slot in the arrays, 0 where it has nothing here
    """

    a: Tensor
    b: Tensor
    sizes: tuple[int, ...]
    present: Tensor

    @property
    def rank(self) -> int:
        """Ranks of each matrix, r."""
        return self.b.shape[1]


def output_tiles(sizes: tuple[int, ...]) -> Tensor:
    """int32 ``[n_tiles, 3]``: first output in y, end of its matrix in y, number of the matrix."""
    rows, start = [], 0
    for number, m in enumerate(sizes):
        rows += [(first, start + m, number) for first in range(start, start + m, TILE_OUTPUTS)]
        start += m
    return torch.tensor(rows, dtype=torch.int32)


def lowrank_add_(
    y: Tensor, x: Tensor, segments: SegmentArrays, arrays: LowRankArrays, tiles: Tensor
) -> None:
    """Add every present slot's low-rank term to its rows.

    y [T, sum m], x [T, n], a and b of one dtype; `tiles` from `output_tiles`, on the device.
    """
    _, ranks, n = arrays.a.shape
    chunks = -(-n // CHUNK_INPUTS)
    hidden = torch.empty((len(x), chunks, ranks), dtype=torch.float32, device=x.device)
    where = where_of(segments, arrays.present)
    launch(
        _shrink_kernel,
        (n_programs(x.device, 4),),
        *(hidden, x, arrays.a, *where, chunks, n, ranks, x.stride(0)),
        TILE_T=segments.tile_rows,
        TILE_R=max(MIN_TILE, min(64, next_power_of_two(ranks))),
        TILE_K=TILE_INPUTS,
        CHUNK=CHUNK_INPUTS,
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=4,
    )
    launch(
        _expand_kernel,
        (n_programs(x.device, 4),),
        *(y, hidden, arrays.b, tiles, *where, len(tiles), chunks, arrays.rank, ranks),
        *(arrays.b.shape[2], y.stride(0)),
        TILE_T=segments.tile_rows,
        TILE_R=max(MIN_TILE, min(64, next_power_of_two(arrays.rank))),
        TILE_M=TILE_OUTPUTS,
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=3,
    )


def lowrank_add_reference_(
    y: Tensor,
    x: Tensor,
    segments: SegmentArrays,
    arrays: LowRankArrays,
    compute: torch.dtype = torch.float32,
) -> None:
    """The same in torch, in `compute`."""
    r = arrays.rank
    for segment in rows_of(segments):
        place = place_of(segment, arrays.present)
        if place < 0:
            continue
        rows, column = slice(segment.start, segment.end), 0
        for g, m in enumerate(arrays.sizes):
            a = arrays.a[place, g * r : (g + 1) * r].to(compute)
            b = arrays.b[place, :, column : column + m].to(compute)
            hidden = (x[rows].to(compute) @ a.T).to(x.dtype).to(compute)
            target = y[rows, column : column + m]
            target.copy_((target.to(compute) + hidden @ b).to(y.dtype))
            column += m


@triton.jit
def _shrink_kernel(
    hidden, x, a, seg_slot, seg_start, seg_end, seg_count, present, n_present,
    chunks, n, ranks, x_stride,
    TILE_T: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    rank_tiles = tl.cdiv(ranks, TILE_R)
    n_items = tl.load(seg_count) * chunks * rank_tiles
    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        r = item % rank_tiles * TILE_R + tl.arange(0, TILE_R)
        chunk = item // rank_tiles % chunks
        segment = item // (rank_tiles * chunks)
        slot = slot_of(seg_slot, present, n_present, segment)
        if slot >= 0:
            token = tl.load(seg_start + segment) + tl.arange(0, TILE_T)
            token_mask = token < tl.load(seg_end + segment)
            rows = a + (slot.to(tl.int64) * ranks + r[None, :]) * n
            x_rows = x + token[:, None].to(tl.int64) * x_stride
            acc = tl.zeros((TILE_T, TILE_R), tl.float32)
            end = tl.minimum(chunk * CHUNK + CHUNK, n)
            for j in range(chunk * CHUNK, end, TILE_K):
                k = j + tl.arange(0, TILE_K)
                x_mask = token_mask[:, None] & (k < end)[None, :]
                a_mask = (k < end)[:, None] & (r < ranks)[None, :]
                xs = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
                weights = tl.load(rows + k[:, None], mask=a_mask, other=0.0)
                acc = mac(acc, xs, weights, UPCAST)
            place = (token[:, None].to(tl.int64) * chunks + chunk) * ranks + r[None, :]
            tl.store(hidden + place, acc, mask=token_mask[:, None] & (r < ranks)[None, :])


@triton.jit
def _expand_kernel(
    y, hidden, b, tiles, seg_slot, seg_start, seg_end, seg_count, present, n_present,
    n_tiles, chunks, rank, ranks, width, y_stride,
    TILE_T: tl.constexpr, TILE_R: tl.constexpr, TILE_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    n_items = tl.load(seg_count) * n_tiles
    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        tile = tiles + item % n_tiles * 3
        segment = item // n_tiles
        slot = slot_of(seg_slot, present, n_present, segment)
        if slot >= 0:
            token = tl.load(seg_start + segment) + tl.arange(0, TILE_T)
            token_mask = token < tl.load(seg_end + segment)
            out = tl.load(tile) + tl.arange(0, TILE_M)
            out_mask = out < tl.load(tile + 1)
            matrix = tl.load(tile + 2)
            acc = tl.zeros((TILE_T, TILE_M), tl.float32)
            for first in range(0, rank, TILE_R):
                r = first + tl.arange(0, TILE_R)
                z_mask = token_mask[:, None] & (r < rank)[None, :]
                z = tl.zeros((TILE_T, TILE_R), tl.float32)
                for chunk in range(0, chunks):
                    place = (token[:, None].to(tl.int64) * chunks + chunk) * ranks + matrix * rank
                    z += tl.load(hidden + place + r[None, :], mask=z_mask, other=0.0)
                rows = b + (slot.to(tl.int64) * rank + r[:, None]) * width
                b_mask = (r < rank)[:, None] & out_mask[None, :]
                weights = tl.load(rows + out[None, :], mask=b_mask, other=0.0)
                acc = mac(acc, z.to(weights.dtype), weights, UPCAST)
            place = y + token[:, None].to(tl.int64) * y_stride + out[None, :]
            mask = token_mask[:, None] & out_mask[None, :]
            old = tl.load(place, mask=mask, other=0.0)
            tl.store(place, (old.to(tl.float32) + acc).to(old.dtype), mask=mask)
