"""Quantised low-rank terms of up to all matrices that read the same x, straight from packed codes.

Two launches for a whole projection group, as `lowrank` (whose expand this uses). Shrink walks the
byte rows of ``a``: every field of a byte row is another input's, so it is a product of its own with
another slice of x, into one accumulator. What a component is a multiple of (scale, unit and gain)
is applied to the partial sums, so expand reads plain levels.

Bytes per step: the packed factors of every distinct slot. Numerics: codes become centred levels in
x's dtype, exactly; float32 sums; ``x a^T`` is rounded to x's dtype before the second product, y
once.
Tensor parallelism: as `lowrank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.codecs.columns import PLANES
from server.ops.lowrank import PackedLowRank
from server.ops.triton import lowrank
from server.ops.triton.compat import (
    UPCAST,
    first_item,
    is_wide,
    launch,
    mac,
    n_pieces,
    n_programs,
    piece_rows,
    tile_of,
)
from server.ops.triton.lowrank import expand_, levels_of, unpacked
from server.ops.triton.segments import SegmentArrays, gathers, place_of, rows_of, where_of

TILE_INPUTS, WIDE_INPUTS = 128, 32  # of x in 16 and in 32 bits
MOST_RANKS = 32  # of a tile: 64 spill


def packed_lowrank_add_(
    outputs: Sequence[Tensor], x: Tensor, segments: SegmentArrays, terms: Sequence[PackedLowRank]
) -> None:
    """Add every present slot's low-rank terms to its rows of each matrix's output.

    outputs [T, m] each, last axis contiguous; x [T, n]; of one dtype. All terms of the same bits,
    their ranks their own. `segments` names slots, which each term's `place_of` maps.
    """
    n, bits = x.shape[1], terms[0].bits
    assert all(term.bits == bits for term in terms)
    ranks = [term.rank for term in terms]
    offsets = (0, *accumulate(ranks))
    fields = 8 // PLANES[bits][-1]  # inputs of a byte row, at 3 bit of the high plane's
    walked, chunk = -(-n // fields), max(1, lowrank.CHUNK_INPUTS // fields)
    chunks = -(-walked // chunk)
    hidden = torch.empty((len(x), chunks, offsets[-1]), dtype=torch.float32, device=x.device)
    places = tuple(term.slot_map for term in terms)
    shapes = tuple(zip(ranks, offsets, strict=False))
    launch(
        _packed_shrink_kernel,
        (n_programs(x.device, 8),),
        hidden, x, tuple(term.down.codes for term in terms),
        tuple(term.down.scales for term in terms), tuple(term.down.units for term in terms),
        tuple(term.gains for term in terms), places, shapes, where_of(segments), len(places[0]),
        chunks, n, walked, terms[0].down.codes.shape[2], offsets[-1], x.stride(0),
        BITS=bits,
        FIELDS=fields,
        ALIGNED=not gathers(terms[0].down),
        TILE_T=segments.tile_rows,
        TILE_R=min(MOST_RANKS, tile_of(max(ranks))),
        TILE_K=max(16, (WIDE_INPUTS if is_wide(x.dtype) else TILE_INPUTS) // fields),
        CHUNK=chunk,
        UPCAST=UPCAST,
        num_warps=segments.tile_rows // 16,  # each warp of a program unpacks all its codes
        num_stages=3,
    )  # fmt: skip
    codes = tuple(term.up.codes for term in terms)
    expand_(outputs, hidden, codes, places, shapes, segments, bits=bits)


def packed_lowrank_add_reference_(
    outputs: Sequence[Tensor],
    x: Tensor,
    segments: SegmentArrays,
    terms: Sequence[PackedLowRank],
    compute: torch.dtype = torch.float32,
) -> None:
    """The same in torch, in `compute`, rounded where the kernel rounds: `server.ops.lowrank` rounds
    before the gains as well.
    """
    for y, term in zip(outputs, terms, strict=True):
        for segment in rows_of(segments):
            place = place_of(segment, term.slot_map)
            if place < 0:
                continue
            rows = slice(segment.start, segment.end)
            hidden = x[rows].to(compute) @ term.down.values(place)[0].to(compute)
            hidden = (hidden * term.gains[place].to(compute)).to(x.dtype).to(compute)
            added = hidden @ term.up.values(place)[0].to(compute)
            y[rows] = (y[rows].to(compute) + added).to(y.dtype)


@triton.jit
def _field(low, high, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Codes in one field of byte rows; at 3 bit `low` is the row of the low plane that has it."""
    if BITS == 3:
        code = (low.to(tl.int32) >> (FIELD // 2 * 2)) & 3
        return code | (((high.to(tl.int32) >> FIELD) & 1) << 2)
    else:
        return (low.to(tl.int32) >> (FIELD * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _packed_shrink_kernel(
    hidden, x, codes, scales, units, gains, places, shapes, where, n_present,
    chunks, n, walked, byte_rows, ranks, x_stride,
    BITS: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr, TILE_T: tl.constexpr,
    TILE_R: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    before = 0
    for g in tl.static_range(len(codes)):
        rank = shapes[g][0]
        tiles = tl.cdiv(rank, TILE_R)
        n_items = n_pieces(where) * chunks * tiles
        for item in range(first_item(before), n_items, tl.num_programs(0)):
            r = item % tiles * TILE_R + tl.arange(0, TILE_R)
            chunk = item // tiles % chunks
            piece = item // (tiles * chunks)
            place, token, inside = piece_rows(where, places[g], n_present, piece, TILE_T)
            if place >= 0:
                wide = place.to(tl.int64)
                columns = codes[g] + wide * byte_rows * rank + r[None, :]
                x_rows = x + token[:, None].to(tl.int64) * x_stride
                acc = tl.zeros((TILE_T, TILE_R), tl.float32)
                end = tl.minimum(chunk * CHUNK + CHUNK, walked)
                for j in range(chunk * CHUNK, end, TILE_K):
                    row = j + tl.arange(0, TILE_K)
                    mask = (row < end)[:, None] & (r < rank)[None, :]
                    packed = tl.load(columns + row[:, None] * rank, mask=mask, other=0)
                    odd = packed
                    high = packed
                    if BITS == 3 and ALIGNED:
                        odd = tl.load(columns + (walked + row)[:, None] * rank, mask=mask, other=0)
                        high_row = 2 * walked + row
                        high = tl.load(columns + high_row[:, None] * rank, mask=mask, other=0)
                    for f in tl.static_range(FIELDS):
                        k = f * walked + row
                        x_mask = inside[:, None] & ((row < end) & (k < n))[None, :]
                        xs = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
                        if ALIGNED:
                            code = _field(odd if f % 2 else packed, high, f, BITS)
                            weights = levels_of(code, BITS, xs.dtype)
                        else:
                            weights = unpacked(columns, k, n, rank, mask, BITS, xs.dtype)
                        acc = mac(acc, xs, weights, UPCAST)
                there = r < rank
                gain = tl.load(gains[g] + wide * rank + r, mask=there, other=0.0)
                scale = tl.load(scales[g] + wide * rank + r, mask=there, other=0.0)
                gain *= scale.to(tl.float32) * tl.load(units[g] + wide)
                target = (token[:, None].to(tl.int64) * chunks + chunk) * ranks
                target += shapes[g][1] + r[None, :]
                acc *= gain[None, :]
                tl.store(hidden + target, acc, mask=inside[:, None] & there[None, :])
        before += n_items
