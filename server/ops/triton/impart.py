"""ImPart terms ``dW = Uhat diag(sigma) Vhat^T`` in blocks of rows (arXiv 2504.13237, eq. 6).

Three launches for all matrices that read the same x, each output owned by one program, so nothing
is added atomically:

    1  parts[t, b, j]  = x[t, block b] @ v_values[slot, b, :, j]
    2  z[t, k]         = sigma[k] * sum of the parts whose component is k   (lists made at load)
    3  y[t, block b]  += u_values[slot, b] @ z[t, u_index[slot, b]]

The second sums in the order of the blocks: deterministic. Each matrix has its own arrays and
places; variants are data, as in `blockdiag`.

Bytes per step: the slot's arrays once (``2 S (m + n)`` for 2-byte values, indices and lists), and
float32 scratch of ``bv S + r`` per row, which stays in the cache. Numerics: float32 sums; z is
rounded to x's dtype before the second product; y is rounded once.

Tensor parallelism: column-parallel: U's row blocks are split, V is replicated; row-parallel: V's
blocks are split (before the lists are made), U replicated; the all-reduce of y joins the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.factors import ImpartFactors
from server.ops.triton.compat import (
    UPCAST,
    first_item,
    launch,
    mac,
    n_pieces,
    n_programs,
    piece_rows,
    tile_of,
)
from server.ops.triton.segments import SegmentArrays, place_of, rows_of, where_of

TILE_RANKS = 64


def impart_add_(
    outputs: Sequence[Tensor], x: Tensor, segments: SegmentArrays, terms: Sequence[ImpartFactors]
) -> None:
    """Add every present slot's terms to its rows of each matrix's output.

    outputs [T, m] each, last axis contiguous; x [T, n]; values of one dtype. `segments` names
    slots, which each term's `place_of` maps (they are equally long).
    """
    u_shapes = [term.u_values.shape[1:] for term in terms]  # bu, R, S
    v_shapes = [term.v_values.shape[1:] for term in terms]  # bv, R, S
    ranks = [term.sigma.shape[1] for term in terms]
    widths = (0, *accumulate(bv * kept for bv, _, kept in v_shapes))
    heights = (0, *accumulate(ranks))
    parts = torch.empty((len(x), widths[-1]), dtype=torch.float32, device=x.device)
    z = torch.empty((len(x), heights[-1]), dtype=x.dtype, device=x.device)
    where, n_slots = where_of(segments), len(terms[0].place_of)
    places = tuple(term.place_of for term in terms)
    grid = (n_programs(x.device, 4),)
    tiles = {
        "TILE_R": tile_of(max(rows for _, rows, _ in u_shapes)),
        "TILE_S": tile_of(max(kept for _, _, kept in u_shapes)),
        "UPCAST": UPCAST,
    }
    sizes = {"TILE_T": segments.tile_rows, "num_warps": 4, "num_stages": 3}
    shapes = tuple((*shape, first) for shape, first in zip(v_shapes, widths, strict=False))
    launch(
        _parts_kernel,
        grid,
        parts, x, tuple(term.v_values for term in terms), places, shapes, where, n_slots,
        widths[-1], x.shape[1], x.stride(0),
        **tiles,
        **sizes,
    )  # fmt: skip
    lists = tuple((term.order, term.first, term.sigma) for term in terms)
    shapes = tuple(
        (w[1] - w[0], w[0], r, first)
        for w, r, first in zip(pairwise(widths), ranks, heights, strict=False)
    )
    launch(
        _rank_kernel,
        grid,
        z, parts, lists, places, shapes, where, n_slots, widths[-1], heights[-1],
        TILE_K=TILE_RANKS,
        **sizes,
    )  # fmt: skip
    shapes = tuple(
        (*shape, first, y.shape[1], y.stride(0))
        for shape, first, y in zip(u_shapes, heights, outputs, strict=False)
    )
    factors = tuple((term.u_values, term.u_index) for term in terms)
    launch(
        _expand_kernel,
        grid,
        tuple(outputs), z, factors, places, shapes, where, n_slots, heights[-1],
        **tiles,
        **sizes,
    )  # fmt: skip


def impart_add_reference_(
    outputs: Sequence[Tensor],
    x: Tensor,
    segments: SegmentArrays,
    terms: Sequence[ImpartFactors],
    compute: torch.dtype = torch.float32,
) -> None:
    """The same in torch, in `compute`, rounded where the kernel rounds:
    `server.ops.factors.impart_add_` rounds more often.
    """
    for y, term in zip(outputs, terms, strict=True):
        for segment in rows_of(segments):
            place = place_of(segment, term.place_of)
            if place >= 0:
                rows = slice(segment.start, segment.end)
                added = _apply(x[rows], term, place, compute)[:, : y.shape[1]]
                y[rows] = (y[rows].to(compute) + added).to(y.dtype)


def _apply(x: Tensor, term: ImpartFactors, place: int, compute: torch.dtype) -> Tensor:
    """``x [t, n]`` -> ``[t, bu * R]`` in `compute`."""
    _, bu, block_rows, kept = term.u_values.shape
    v = term.v_values[place].to(compute)
    padding = len(v) * block_rows - x.shape[1]
    wide = torch.nn.functional.pad(x.to(compute), (0, padding)).view(-1, len(v), block_rows)
    parts = torch.einsum("tbr,brs->tbs", wide, v).flatten(1)
    counts = term.first[place].diff().long()
    component = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    z = parts.new_zeros(len(parts), len(counts))
    z.index_add_(1, component, parts[:, term.order[place].long()])
    z = (z * term.sigma[place].to(compute)).to(x.dtype).to(compute)
    chosen = z[:, term.u_index[place].long()].view(-1, bu, kept)
    return torch.einsum("tbs,brs->tbr", chosen, term.u_values[place].to(compute)).flatten(1)


@triton.jit
def _parts_kernel(
    parts, x, values, places, shapes, where, n_present, width, n, x_stride,
    TILE_R: tl.constexpr, TILE_S: tl.constexpr, UPCAST: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    before = 0
    for g in tl.static_range(len(values)):
        bv = shapes[g][0]
        block_rows = shapes[g][1]
        kept = shapes[g][2]
        tiles = tl.cdiv(kept, TILE_S)
        n_items = n_pieces(where) * bv * tiles
        for item in range(first_item(before), n_items, tl.num_programs(0)):
            j = item % tiles * TILE_S + tl.arange(0, TILE_S)
            block = item // tiles % bv
            piece = item // (tiles * bv)
            place, token, inside = piece_rows(where, places[g], n_present, piece, TILE_T)
            if place >= 0:
                v_block = values[g] + (place.to(tl.int64) * bv + block) * block_rows * kept
                acc = tl.zeros((TILE_T, TILE_S), tl.float32)
                for first in range(0, block_rows, TILE_R):
                    r = first + tl.arange(0, TILE_R)
                    column = block * block_rows + r
                    x_mask = inside[:, None] & ((r < block_rows) & (column < n))[None, :]
                    v_mask = (r < block_rows)[:, None] & (j < kept)[None, :]
                    source = token[:, None].to(tl.int64) * x_stride + column[None, :]
                    xs = tl.load(x + source, mask=x_mask, other=0.0)
                    v = tl.load(v_block + r[:, None] * kept + j[None, :], mask=v_mask, other=0.0)
                    acc = mac(acc, xs, v, UPCAST)
                target = token[:, None].to(tl.int64) * width + shapes[g][3] + block * kept
                mask = inside[:, None] & (j < kept)[None, :]
                tl.store(parts + target + j[None, :], acc, mask=mask)
        before += n_items


@triton.jit
def _rank_kernel(
    z, parts, lists, places, shapes, where, n_present, width, height,
    TILE_K: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    before = 0
    for g in tl.static_range(len(lists)):
        own = shapes[g][0]  # parts of this matrix
        ranks = shapes[g][2]
        tiles = tl.cdiv(ranks, TILE_K)
        n_items = n_pieces(where) * tiles
        for item in range(first_item(before), n_items, tl.num_programs(0)):
            k = item % tiles * TILE_K + tl.arange(0, TILE_K)
            place, token, inside = piece_rows(where, places[g], n_present, item // tiles, TILE_T)
            if place >= 0:
                wide = place.to(tl.int64)
                known = k < ranks
                firsts = lists[g][1] + wide * (ranks + 1) + k
                begin = tl.load(firsts, mask=known, other=0)
                end = tl.load(firsts + 1, mask=known, other=0)
                source = token[:, None].to(tl.int64) * width + shapes[g][1]
                acc = tl.zeros((TILE_T, TILE_K), tl.float32)
                for i in range(0, tl.max(end - begin, axis=0)):
                    some = begin + i < end
                    part = tl.load(lists[g][0] + wide * own + begin + i, mask=some, other=0)
                    mask = inside[:, None] & some[None, :]
                    acc += tl.load(parts + source + part[None, :], mask=mask, other=0.0)
                gain = tl.load(lists[g][2] + wide * ranks + k, mask=known, other=0.0)
                result = acc * gain.to(tl.float32)[None, :]
                target = z + token[:, None].to(tl.int64) * height + shapes[g][3] + k[None, :]
                mask = inside[:, None] & known[None, :]
                tl.store(target, result.to(z.dtype.element_ty), mask=mask)
        before += n_items


@triton.jit
def _expand_kernel(
    outputs, z, factors, places, shapes, where, n_present, height,
    TILE_R: tl.constexpr, TILE_S: tl.constexpr, UPCAST: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    before = 0
    for g in tl.static_range(len(factors)):
        bu = shapes[g][0]
        block_rows = shapes[g][1]
        kept = shapes[g][2]
        tiles = tl.cdiv(block_rows, TILE_R)
        n_items = n_pieces(where) * bu * tiles
        for item in range(first_item(before), n_items, tl.num_programs(0)):
            r = item % tiles * TILE_R + tl.arange(0, TILE_R)
            block = item // tiles % bu
            piece = item // (tiles * bu)
            place, token, inside = piece_rows(where, places[g], n_present, piece, TILE_T)
            if place >= 0:
                here = place.to(tl.int64) * bu + block
                acc = tl.zeros((TILE_T, TILE_R), tl.float32)
                for start in range(0, kept, TILE_S):
                    j = start + tl.arange(0, TILE_S)
                    rank = tl.load(factors[g][1] + here * kept + j, mask=j < kept, other=0)
                    source = token[:, None].to(tl.int64) * height + shapes[g][3] + rank[None, :]
                    z_mask = inside[:, None] & (j < kept)[None, :]
                    zs = tl.load(z + source, mask=z_mask, other=0.0)
                    u_mask = (j < kept)[:, None] & (r < block_rows)[None, :]
                    place_u = (here * block_rows + r[None, :]) * kept + j[:, None]
                    u = tl.load(factors[g][0] + place_u, mask=u_mask, other=0.0)
                    acc = mac(acc, zs, u, UPCAST)
                column = block * block_rows + r
                mask = inside[:, None] & ((r < block_rows) & (column < shapes[g][4]))[None, :]
                y = outputs[g] + token[:, None].to(tl.int64) * shapes[g][5] + column[None, :]
                old = tl.load(y, mask=mask, other=0.0)
                tl.store(y, (old.to(tl.float32) + acc).to(old.dtype), mask=mask)
        before += n_items
