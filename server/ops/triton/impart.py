"""ImPart terms ``dW = Uhat diag(sigma) Vhat^T`` in blocks of rows (arXiv 2504.13237, eq. 6).

Three launches, each output owned by one program, so nothing is added atomically:

    1  parts[t, b, j]  = x[t, block b] @ v_values[slot, b, :, j]
    2  z[t, k]         = sigma[k] * sum of the parts whose component is k   (lists made at load)
    3  y[t, block b]  += u_values[slot, b] @ z[t, u_index[slot, b]]

The second sums in the order of the blocks: deterministic. Variants are data, as in `blockdiag`.

Bytes per step: the slot's arrays once (``2 S (m + n)`` for 2-byte values, indices and lists), and
float32 scratch of ``bv S + r`` per row, which stays in the cache. Numerics: float32 sums; z is
rounded to x's dtype before the second product; y is rounded once.

Tensor parallelism: column-parallel: U's row blocks are split, V is replicated; row-parallel: V's
blocks are split (before the lists are made), U replicated; the all-reduce of y joins the ranks.
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

MIN_TILE = 16
TILE_RANKS = 64


@dataclass(frozen=True, slots=True)
class ImpartArrays:
    """Slot arrays of one matrix ``[m, n]``, R rows a block, S components a block, r components.

    u_values [C, bu, R, S], u_index [C, bu * S] int; v_values [C, bv, R, S]; sigma [C, r];
    order    [C, bv * S] int32, first [C, r + 1] int32: component k's parts are
             ``order[first[k] : first[k + 1]]`` (see `rank_lists`)
    present  int32 [slots]: place + 1 of a slot in the arrays, 0 where it has nothing here
    """

    u_values: Tensor
    u_index: Tensor
    v_values: Tensor
    order: Tensor
    first: Tensor
    sigma: Tensor
    present: Tensor


def rank_lists(v_index: Tensor, n_ranks: int) -> tuple[Tensor, Tensor]:
    """Which of the ``bv * S`` parts belong to each component: `order` and `first`, int32.

    v_index [bv * S] integer components, block after block.
    """
    order = torch.argsort(v_index, stable=True).int()
    counts = torch.bincount(v_index.long(), minlength=n_ranks)
    first = torch.zeros(n_ranks + 1, dtype=torch.int32, device=v_index.device)
    first[1:] = counts.cumsum(0)
    return order, first


def impart_add_(y: Tensor, x: Tensor, segments: SegmentArrays, arrays: ImpartArrays) -> None:
    """Add every present slot's term to its rows: y [T, m], x [T, n], values of one dtype."""
    _, bu, block_rows, kept = arrays.u_values.shape
    bv, ranks = arrays.v_values.shape[1], arrays.sigma.shape[1]
    parts = torch.empty((len(x), bv * kept), dtype=torch.float32, device=x.device)
    z = torch.empty((len(x), ranks), dtype=x.dtype, device=x.device)
    where = where_of(segments, arrays.present)
    grid = (n_programs(x.device, 4),)
    tile_kept = max(MIN_TILE, min(64, next_power_of_two(kept)))
    tile_rows = max(MIN_TILE, min(64, next_power_of_two(block_rows)))
    sizes = {"TILE_T": segments.tile_rows, "num_warps": 4, "num_stages": 3}
    launch(
        _parts_kernel,
        grid,
        *(parts, x, arrays.v_values, *where, bv, block_rows, kept, x.shape[1], x.stride(0)),
        TILE_R=tile_rows,
        TILE_S=tile_kept,
        UPCAST=UPCAST,
        **sizes,
    )
    launch(
        _rank_kernel,
        grid,
        *(z, parts, arrays.order, arrays.first, arrays.sigma, *where, bv * kept, ranks),
        TILE_K=TILE_RANKS,
        **sizes,
    )
    launch(
        _expand_kernel,
        grid,
        *(y, z, arrays.u_values, arrays.u_index, *where, bu, block_rows, kept, ranks),
        *(y.shape[1], y.stride(0)),
        TILE_R=tile_rows,
        TILE_S=tile_kept,
        UPCAST=UPCAST,
        **sizes,
    )


def impart_add_reference_(
    y: Tensor,
    x: Tensor,
    segments: SegmentArrays,
    arrays: ImpartArrays,
    compute: torch.dtype = torch.float32,
) -> None:
    """The same in torch, in `compute`."""
    _, bu, block_rows, kept = arrays.u_values.shape
    for segment in rows_of(segments):
        place = place_of(segment, arrays.present)
        if place < 0:
            continue
        rows, slot = slice(segment.start, segment.end), place
        v = arrays.v_values[slot].to(compute)
        padding = len(v) * block_rows - x.shape[1]
        wide = torch.nn.functional.pad(x[rows].to(compute), (0, padding)).view(
            -1, len(v), block_rows
        )
        parts = torch.einsum("tbr,brs->tbs", wide, v).flatten(1)
        counts = arrays.first[slot].diff().long()
        component = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
        z = parts.new_zeros(len(parts), len(counts))
        z.index_add_(1, component, parts[:, arrays.order[slot].long()])
        z = (z * arrays.sigma[slot].to(compute)).to(x.dtype).to(compute)
        chosen = z[:, arrays.u_index[slot].long()].view(-1, bu, kept)
        out = torch.einsum("tbs,brs->tbr", chosen, arrays.u_values[slot].to(compute)).flatten(1)
        y[rows] = (y[rows].to(compute) + out[:, : y.shape[1]]).to(y.dtype)


@triton.jit
def _parts_kernel(
    parts, x, v_values, seg_slot, seg_start, seg_end, seg_count, present, n_present,
    bv, block_rows, kept, n, x_stride,
    TILE_R: tl.constexpr, TILE_S: tl.constexpr, UPCAST: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(kept, TILE_S)
    for item in range(tl.program_id(0), tl.load(seg_count) * bv * tiles, tl.num_programs(0)):
        j = item % tiles * TILE_S + tl.arange(0, TILE_S)
        block = item // tiles % bv
        segment = item // (tiles * bv)
        slot = slot_of(seg_slot, present, n_present, segment)
        if slot >= 0:
            token = tl.load(seg_start + segment) + tl.arange(0, TILE_T)
            token_mask = token < tl.load(seg_end + segment)
            values = v_values + (slot.to(tl.int64) * bv + block) * block_rows * kept
            acc = tl.zeros((TILE_T, TILE_S), tl.float32)
            for first in range(0, block_rows, TILE_R):
                r = first + tl.arange(0, TILE_R)
                column = block * block_rows + r
                x_mask = token_mask[:, None] & ((r < block_rows) & (column < n))[None, :]
                v_mask = (r < block_rows)[:, None] & (j < kept)[None, :]
                place = token[:, None].to(tl.int64) * x_stride + column[None, :]
                xs = tl.load(x + place, mask=x_mask, other=0.0)
                v = tl.load(values + r[:, None] * kept + j[None, :], mask=v_mask, other=0.0)
                acc = mac(acc, xs, v, UPCAST)
            place = (token[:, None].to(tl.int64) * bv + block) * kept + j[None, :]
            tl.store(parts + place, acc, mask=token_mask[:, None] & (j < kept)[None, :])


@triton.jit
def _rank_kernel(
    z, parts, order, first, sigma, seg_slot, seg_start, seg_end, seg_count, present, n_present,
    width, ranks, TILE_K: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(ranks, TILE_K)
    for item in range(tl.program_id(0), tl.load(seg_count) * tiles, tl.num_programs(0)):
        k = item % tiles * TILE_K + tl.arange(0, TILE_K)
        segment = item // tiles
        slot = slot_of(seg_slot, present, n_present, segment)
        if slot >= 0:
            token = tl.load(seg_start + segment) + tl.arange(0, TILE_T)
            token_mask = token < tl.load(seg_end + segment)
            wide = slot.to(tl.int64)
            begin = tl.load(first + wide * (ranks + 1) + k, mask=k < ranks, other=0)
            end = tl.load(first + wide * (ranks + 1) + k + 1, mask=k < ranks, other=0)
            acc = tl.zeros((TILE_T, TILE_K), tl.float32)
            for i in range(0, tl.max(end - begin, axis=0)):
                some = begin + i < end
                part = tl.load(order + wide * width + begin + i, mask=some, other=0)
                place = token[:, None].to(tl.int64) * width + part[None, :]
                acc += tl.load(parts + place, mask=token_mask[:, None] & some[None, :], other=0.0)
            weight = tl.load(sigma + wide * ranks + k, mask=k < ranks, other=0.0).to(tl.float32)
            place = token[:, None].to(tl.int64) * ranks + k[None, :]
            mask = token_mask[:, None] & (k < ranks)[None, :]
            tl.store(z + place, (acc * weight[None, :]).to(z.dtype.element_ty), mask=mask)


@triton.jit
def _expand_kernel(
    y, z, u_values, u_index, seg_slot, seg_start, seg_end, seg_count, present, n_present,
    bu, block_rows, kept, ranks, m, y_stride,
    TILE_R: tl.constexpr, TILE_S: tl.constexpr, UPCAST: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(block_rows, TILE_R)
    for item in range(tl.program_id(0), tl.load(seg_count) * bu * tiles, tl.num_programs(0)):
        r = item % tiles * TILE_R + tl.arange(0, TILE_R)
        block = item // tiles % bu
        segment = item // (tiles * bu)
        slot = slot_of(seg_slot, present, n_present, segment)
        if slot >= 0:
            token = tl.load(seg_start + segment) + tl.arange(0, TILE_T)
            token_mask = token < tl.load(seg_end + segment)
            here = slot.to(tl.int64) * bu + block
            acc = tl.zeros((TILE_T, TILE_R), tl.float32)
            for start in range(0, kept, TILE_S):
                j = start + tl.arange(0, TILE_S)
                rank = tl.load(u_index + here * kept + j, mask=j < kept, other=0)
                place = token[:, None].to(tl.int64) * ranks + rank[None, :]
                zs = tl.load(z + place, mask=token_mask[:, None] & (j < kept)[None, :], other=0.0)
                u_mask = (j < kept)[:, None] & (r < block_rows)[None, :]
                place = (here * block_rows + r[None, :]) * kept + j[:, None]
                u = tl.load(u_values + place, mask=u_mask, other=0.0)
                acc = mac(acc, zs, u, UPCAST)
            column = block * block_rows + r
            mask = token_mask[:, None] & ((r < block_rows) & (column < m))[None, :]
            place = y + token[:, None].to(tl.int64) * y_stride + column[None, :]
            old = tl.load(place, mask=mask, other=0.0)
            tl.store(place, (old.to(tl.float32) + acc).to(old.dtype), mask=mask)
