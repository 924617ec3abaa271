"""Low-rank terms ``dW = b^T a`` of up to all matrices that read the same x: shrink, then expand.

Two launches for a whole projection group. Shrink writes ``x a^T`` in `n_chunks` partial sums over
the inputs, one program each (enough programs for few variants), expand adds them in a fixed order:
deterministic, no atomics, nothing to zero. Each matrix has its own arrays, rank and places;
variants are data, as in `blockdiag`.

Bytes per step: ``2 r (n + m)`` a matrix for every distinct slot. Numerics: float32 sums; ``x a^T``
is rounded to x's dtype between the two products; y is rounded once.

Tensor parallelism: column-parallel: a replicated, b split by outputs; row-parallel: a split by
inputs, b replicated, each rank expands its own partial sum into the y that is all-reduced anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.factors import LowRankFactors
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
from server.ops.triton.segments import SegmentArrays, place_of, rows_of, where_of

CHUNK_INPUTS = 512
TILE_INPUTS = 64
TILE_OUTPUTS, WIDE_OUTPUTS = 128, 32  # in 16 and in 32 bits


def lowrank_add_(
    outputs: Sequence[Tensor], x: Tensor, segments: SegmentArrays, terms: Sequence[LowRankFactors]
) -> None:
    """Add every present slot's low-rank terms to its rows of each matrix's output.

    outputs [T, m] each, last axis contiguous; x [T, n]; all of one dtype, as are a and b.
    `segments` names slots, which each term's `place_of` maps (they are equally long).
    """
    n = x.shape[1]
    ranks = [term.a.shape[1] for term in terms]
    offsets = (0, *accumulate(ranks))
    chunks = -(-n // CHUNK_INPUTS)
    hidden = torch.empty((len(x), chunks, offsets[-1]), dtype=torch.float32, device=x.device)
    where, n_slots = where_of(segments), len(terms[0].place_of)
    places = tuple(term.place_of for term in terms)
    shapes = tuple(zip(ranks, offsets, strict=False))
    launch(
        _shrink_kernel,
        (n_programs(x.device, 4),),
        hidden, x, tuple(term.a for term in terms), places, shapes, where, n_slots,
        chunks, n, offsets[-1], x.stride(0),
        TILE_T=segments.tile_rows,
        TILE_R=tile_of(max(ranks)),
        TILE_K=TILE_INPUTS,
        CHUNK=CHUNK_INPUTS,
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=4,
    )  # fmt: skip
    b = tuple(term.b for term in terms)
    expand_(outputs, hidden, b, places, shapes, segments, bits=16)


def expand_(
    outputs: Sequence[Tensor],
    hidden: Tensor,
    b: tuple[Tensor, ...],
    places: tuple[Tensor, ...],
    shapes: tuple[tuple[int, int], ...],
    segments: SegmentArrays,
    *,
    bits: int,
) -> None:
    """Add ``hidden b`` to each output: hidden float32 [T, chunks, all ranks], summed over chunks.

    b       by matrix: [C, r, m] in the outputs' dtype (16 bits), or uint8 [C, byte rows, m]: levels
            packed along r (`pack_columns`)
    shapes  rank and first component in `hidden` of each matrix
    """
    # Two warps leave each the registers that unpacking takes: four spill.
    warps = 4 if bits == 16 or segments.tile_rows > 16 else 2
    launch(
        _expand_kernel,
        (n_programs(hidden.device, 16 // warps),),
        tuple(outputs), hidden, b, places, shapes,
        tuple((y.shape[1], y.stride(0)) for y in outputs), where_of(segments), len(places[0]),
        *hidden.shape[1:],
        TILE_T=segments.tile_rows,
        TILE_R=tile_of(max(rank for rank, _ in shapes)),
        TILE_M=WIDE_OUTPUTS if is_wide(outputs[0].dtype) else TILE_OUTPUTS,
        BITS=bits,
        UPCAST=UPCAST,
        num_warps=warps,
        num_stages=3,
    )  # fmt: skip


def lowrank_add_reference_(
    outputs: Sequence[Tensor],
    x: Tensor,
    segments: SegmentArrays,
    terms: Sequence[LowRankFactors],
    compute: torch.dtype = torch.float32,
) -> None:
    """The same in torch, in `compute`, rounded where the kernel rounds:
    `server.ops.factors.lowrank_add_` rounds more often.
    """
    for y, term in zip(outputs, terms, strict=True):
        for segment in rows_of(segments):
            place = place_of(segment, term.place_of)
            if place < 0:
                continue
            rows = slice(segment.start, segment.end)
            hidden = x[rows].to(compute) @ term.a[place].to(compute).T
            added = hidden.to(x.dtype).to(compute) @ term.b[place].to(compute)
            y[rows] = (y[rows].to(compute) + added).to(y.dtype)


@triton.jit
def levels_of(code, BITS: tl.constexpr, dtype: tl.constexpr):
    """Centred levels of codes: exact in 16 bits, which hold the 8 bits of ``2 code - 255``."""
    return (code.to(tl.float32) - ((1 << BITS) - 1) * 0.5).to(dtype)


@triton.jit
def byte_rows(n, BITS: tl.constexpr):
    """`packed_rows`."""
    if BITS == 3:
        return tl.cdiv(n, 4) + tl.cdiv(n, 8)
    else:
        return tl.cdiv(n, 8 // BITS)


@triton.jit
def unpacked(columns, k, n, stride, mask, BITS: tl.constexpr, dtype: tl.constexpr):
    """Levels ``[inputs k, columns]`` of codes packed along n inputs, byte rows `stride` apart.

    A byte is loaded once for each of its inputs. What is masked is finite, not 0: inputs past n
    take the last field, a shift by more bits than there are being undefined.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    low_rows = tl.cdiv(n, 8 // LOW)
    low = tl.load(columns + (k % low_rows)[:, None] * stride, mask=mask, other=0).to(tl.int32)
    code = (low >> tl.minimum(k // low_rows * LOW, 8 - LOW)[:, None]) & ((1 << LOW) - 1)
    if BITS == 3:
        high_rows = tl.cdiv(n, 8)
        high_row = low_rows + k % high_rows
        high = tl.load(columns + high_row[:, None] * stride, mask=mask, other=0).to(tl.int32)
        code |= ((high >> tl.minimum(k // high_rows, 7)[:, None]) & 1) << 2
    return levels_of(code, BITS, dtype)


@triton.jit
def _shrink_kernel(
    hidden, x, a, places, shapes, where, n_present, chunks, n, ranks, x_stride,
    TILE_T: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr, CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    before = 0
    for g in tl.static_range(len(a)):
        rank = shapes[g][0]
        tiles = tl.cdiv(rank, TILE_R)
        n_items = n_pieces(where) * chunks * tiles
        for item in range(first_item(before), n_items, tl.num_programs(0)):
            r = item % tiles * TILE_R + tl.arange(0, TILE_R)
            chunk = item // tiles % chunks
            piece = item // (tiles * chunks)
            place, token, inside = piece_rows(where, places[g], n_present, piece, TILE_T)
            if place >= 0:
                rows = a[g] + (place.to(tl.int64) * rank + r[None, :]) * n
                x_rows = x + token[:, None].to(tl.int64) * x_stride
                acc = tl.zeros((TILE_T, TILE_R), tl.float32)
                end = tl.minimum(chunk * CHUNK + CHUNK, n)
                for j in range(chunk * CHUNK, end, TILE_K):
                    k = j + tl.arange(0, TILE_K)
                    x_mask = inside[:, None] & (k < end)[None, :]
                    a_mask = (k < end)[:, None] & (r < rank)[None, :]
                    xs = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
                    weights = tl.load(rows + k[:, None], mask=a_mask, other=0.0)
                    acc = mac(acc, xs, weights, UPCAST)
                target = (token[:, None].to(tl.int64) * chunks + chunk) * ranks
                target += shapes[g][1] + r[None, :]
                tl.store(hidden + target, acc, mask=inside[:, None] & (r < rank)[None, :])
        before += n_items


@triton.jit
def _expand_kernel(
    outputs, hidden, b, places, shapes, sizes, where, n_present, chunks, ranks,
    TILE_T: tl.constexpr, TILE_R: tl.constexpr, TILE_M: tl.constexpr, BITS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    before = 0
    for g in tl.static_range(len(b)):
        rank = shapes[g][0]
        m = sizes[g][0]
        tiles = tl.cdiv(m, TILE_M)
        n_items = n_pieces(where) * tiles
        for item in range(first_item(before), n_items, tl.num_programs(0)):
            out = item % tiles * TILE_M + tl.arange(0, TILE_M)
            place, token, inside = piece_rows(where, places[g], n_present, item // tiles, TILE_T)
            if place >= 0:
                acc = tl.zeros((TILE_T, TILE_M), tl.float32)
                for first in range(0, rank, TILE_R):
                    r = first + tl.arange(0, TILE_R)
                    z_mask = inside[:, None] & (r < rank)[None, :]
                    z = tl.zeros((TILE_T, TILE_R), tl.float32)
                    for chunk in range(0, chunks):
                        source = (token[:, None].to(tl.int64) * chunks + chunk) * ranks
                        source += shapes[g][1] + r[None, :]
                        z += tl.load(hidden + source, mask=z_mask, other=0.0)
                    if BITS == 16:
                        rows = b[g] + (place.to(tl.int64) * rank + r[:, None]) * m
                        b_mask = (r < rank)[:, None] & (out < m)[None, :]
                        weights = tl.load(rows + out[None, :], mask=b_mask, other=0.0)
                    else:
                        columns = b[g] + place.to(tl.int64) * byte_rows(rank, BITS) * m
                        columns += out[None, :]
                        b_mask = (r < rank)[:, None] & (out < m)[None, :]
                        dtype = outputs[g].dtype.element_ty
                        weights = unpacked(columns, r, rank, m, b_mask, BITS, dtype)
                    acc = mac(acc, z.to(weights.dtype), weights, UPCAST)
                y = outputs[g] + token[:, None].to(tl.int64) * sizes[g][1] + out[None, :]
                mask = inside[:, None] & (out < m)[None, :]
                old = tl.load(y, mask=mask, other=0.0)
                tl.store(y, (old.to(tl.float32) + acc).to(old.dtype), mask=mask)
        before += n_items
