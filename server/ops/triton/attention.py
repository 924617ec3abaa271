"""Attention over a paged cache, read in place: decode (one new token) and prefill (a chunk).

Decode is split-KV: each sequence's keys are cut into `n_splits` stretches, one program per
(sequence, KV head, stretch) with the query heads of the group as rows, online softmax; a second
kernel joins the stretches by their log-sum-exp, if there are several. A step that only decodes
turns q and k in the same launch: the program whose stretch ends a sequence begins with the new key,
from registers, and writes it to the cache for later steps. Prefill takes all chunks of a step in
one launch, one program per (tile of a chunk's tokens, head), each walking the keys that its tokens
may see. Lengths and pages are data, so a captured graph serves any lengths.

Source: FlashDecoding (Dao et al., 2023); the combination is eq. 3 of FlashInfer (arXiv 2501.01005);
prefill is FlashAttention-2 (arXiv 2307.08691, algorithm 1). torch's `varlen_attn` is not used: it
has no softcap, on 2.11 no pages (every chunk after the first would gather its whole context), and
cannot be tested without a GPU.
Numerics: scores, softmax and sums in float32; probabilities rounded to v's dtype for the product.
Bytes: k and v of every position in the window once (prefill: once a tile, from the cache mostly),
in decode plus float32 partials of ``n_splits (D + 1)`` per head.
Tensor parallelism: KV heads are independent, a rank runs its own with their query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.attention import PrefillChunk
from server.ops.triton.compat import UPCAST, launch, mac, next_power_of_two

TILE_KEYS = 64
TILE_TOKENS = 64  # of a prefill chunk
MIN_ROWS = 16  # of a tensor-core operand


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """The chunks of one step as data.

    table  int32 [n_tiles, 4]: first row, end of the chunk's rows, position of the first row, where
           in `pages` the chunk's own begin
    pages  integer: page ids, chunk after chunk
    """

    table: Tensor
    pages: Tensor


@dataclass(frozen=True, slots=True)
class NewTokens:
    """One new token a sequence whose q and k are not turned yet and whose k and v no cache holds.

    k, v      [B, Hkv, D], last axis contiguous
    cos, sin  [B, R], last axis contiguous: as `rope_and_write_` takes them
    places    [B] integer: row of the flattened cache, -1 writes nothing
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    places: Tensor


def splits_for(batch: int) -> int:
    """Stretches per sequence: more where few sequences would leave the device idle."""
    return 16 if batch <= 8 else 4 if batch <= 32 else 1


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    n_splits: int | None = None,
    new: NewTokens | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence over its own pages.

    q [B, H, D], last axis contiguous; caches [n_pages, page, Hkv, D] contiguous; pages [B, P]
    integer page ids, only those that `lengths` reaches are read; lengths [B] integer, the new token
    included, 0: a padding row, its output is 0. Returns [B, H, D] in q's dtype: `out`, contiguous,
    if given.
    new: turn q by its angles on the way (in float32, rounded once; q itself stays), turn and write
    each sequence's new key and value; without it q is turned and the cache complete.
    """
    batch, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    splits = splits_for(batch) if n_splits is None else n_splits
    out = torch.empty((batch, heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    partial = lse = out
    if splits > 1:
        partial = torch.empty((batch, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    k, v, cos, sin, places = (q, q, q, q, lengths)
    rotated = cos_row = 0
    if new is not None:
        k, v, cos, sin, places = new.k, new.v, new.cos, new.sin, new.places
        rotated, cos_row = cos.shape[1], cos.stride(0)
    group = heads // kv_heads
    launch(
        _attend_kernel,
        (batch, kv_heads, splits),
        *(out, partial, lse, q, k_cache, v_cache, pages, lengths, k, v, cos, sin, places),
        *(scale, 0.0 if softcap is None else softcap, 0 if window is None else window),
        *(heads, kv_heads, dim, page, *pages.stride(), q.stride(0), q.stride(1)),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), cos_row, rotated),
        TURN=new is not None,
        GROUP=group,
        SPLITS=splits,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        TILE_G=max(MIN_ROWS, next_power_of_two(group)),
        TILE_D=max(MIN_ROWS, next_power_of_two(dim)),
        TILE_L=TILE_KEYS,
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=3,
    )
    if splits == 1:
        return out
    launch(
        _combine_kernel,
        (batch, heads),
        *(out, partial, lse, dim),
        SPLITS=splits,
        TILE_S=next_power_of_two(splits),
        TILE_D=next_power_of_two(dim),
        num_warps=1,
    )
    return out


def paged_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """The same in torch, sequence by sequence, in `compute`."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        used = pages[row, : -(-length // k_cache.shape[1])].long()
        first = 0 if window is None else max(0, length - window)
        keys = k_cache[used].flatten(0, 1)[first:length].to(compute).repeat_interleave(group, 1)
        values = v_cache[used].flatten(0, 1)[first:length].to(compute).repeat_interleave(group, 1)
        scores = torch.einsum("hd,lhd->hl", q[row].to(compute), keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values).to(q.dtype)
    return out


def prefill_tiles(chunks: Sequence[PrefillChunk], device: torch.device) -> PrefillTiles:
    """Cut a step's chunks into tiles of tokens; one host-to-device copy, once a step."""
    table, first_page = [], 0
    for chunk in chunks:
        for start in range(chunk.start, chunk.end, TILE_TOKENS):
            position = chunk.context + start - chunk.start
            table.append((start, chunk.end, position, first_page))
        first_page += len(chunk.pages)
    pages = torch.cat([chunk.pages for chunk in chunks])
    return PrefillTiles(torch.tensor(table, dtype=torch.int32).to(device), pages)


def paged_prefill_(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tiles: PrefillTiles,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Causal attention of each chunk's tokens over their sequence, their own keys included.

    out, q [T, H, D], last axis contiguous: the tiles' rows are read and written, no others; caches
    [n_pages, page, Hkv, D] contiguous, hold the new tokens already.
    """
    _, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    launch(
        _prefill_kernel,
        (len(tiles.table), heads),
        *(out, q, k_cache, v_cache, tiles.table, tiles.pages),
        *(scale, 0.0 if softcap is None else softcap, 0 if window is None else window),
        *(heads // kv_heads, kv_heads, dim, page),
        *(q.stride(0), q.stride(1), out.stride(0), out.stride(1)),
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        TILE_Q=TILE_TOKENS,
        TILE_D=max(MIN_ROWS, next_power_of_two(dim)),
        TILE_L=TILE_KEYS,
        UPCAST=UPCAST,
        num_warps=4 if dim <= 128 else 8,
        num_stages=2,
    )


@triton.jit
def _visit(
    acc, top, total, queries, k_cache, v_cache, pages, pages_column, position, seen, from_row,
    kv_head, kv_heads, dim, page, scale, softcap,
    SOFTCAP: tl.constexpr, TILE_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the online softmax of `queries [G, D]`.

    position, seen [L]: of the keys, and whether they exist; from_row [G, L]: who may see them.
    """
    d = tl.arange(0, TILE_D)
    number = tl.load(pages + position // page * pages_column, mask=seen, other=0)
    place = (number.to(tl.int64) * page + position % page) * kv_heads + kv_head
    mask = seen[:, None] & (d < dim)[None, :]
    keys = tl.load(k_cache + place[:, None] * dim + d[None, :], mask=mask, other=0.0)
    values = tl.load(v_cache + place[:, None] * dim + d[None, :], mask=mask, other=0.0)
    blank = tl.zeros((queries.shape[0], position.shape[0]), tl.float32)
    scores = mac(blank, queries, tl.trans(keys), UPCAST)
    scores *= scale
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores = tl.where(from_row, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet has no largest score; its weights are 0.
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp(scores - origin[:, None])
    shrink = tl.exp(top - origin)
    total = total * shrink + tl.sum(weight, axis=1)
    acc = mac(acc * shrink[:, None], weight.to(values.dtype), values, UPCAST)
    return acc, new_top, total


@triton.jit
def _partner(d, rotated):
    """The dimension that turns together with each: halves of the first `rotated` are paired."""
    half = rotated // 2
    return tl.where(d < rotated, tl.where(d < half, d + half, d - half), d)


@triton.jit
def _attend_kernel(
    out, partial, lse, q, k_cache, v_cache, pages, lengths, k, v, cos, sin, places,
    scale, softcap, window,
    heads, kv_heads, dim, page, pages_row, pages_column, q_row, q_head,
    k_row, k_head, v_row, v_head, cos_row, rotated,
    TURN: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE_G: tl.constexpr, TILE_D: tl.constexpr, TILE_L: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    tiles = tl.cdiv(length - first, TILE_L)
    per_split = tl.cdiv(tiles, SPLITS) * TILE_L
    start = first + split * per_split
    end = tl.minimum(start + per_split, length)

    g = tl.arange(0, TILE_G)
    d = tl.arange(0, TILE_D)
    head = kv_head * GROUP + g
    g_mask = g < GROUP
    d_mask = d < dim
    q_mask = g_mask[:, None] & d_mask[None, :]
    q_rows = q + row * q_row + head[:, None] * q_head
    queries = tl.load(q_rows + d[None, :], mask=q_mask, other=0.0)
    top = tl.full((TILE_G,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_G,), tl.float32)
    acc = tl.zeros((TILE_G, TILE_D), tl.float32)
    if TURN:
        other = _partner(d, rotated)
        c = tl.load(cos + row * cos_row + d, mask=d < rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + row * cos_row + d, mask=d < rotated, other=0.0).to(tl.float32)
        s = tl.where(d < rotated // 2, -s, s)
        partner = tl.load(q_rows + other[None, :], mask=q_mask, other=0.0)
        wide = queries.to(tl.float32) * c[None, :] + partner.to(tl.float32) * s[None, :]
        queries = wide.to(queries.dtype)
        last = length - 1
        if (start <= last) & (last < end):
            k_of = k + row * k_row + kv_head * k_head
            key = tl.load(k_of + d, mask=d_mask, other=0.0).to(tl.float32) * c
            key += tl.load(k_of + other, mask=d_mask, other=0.0).to(tl.float32) * s
            turned = key.to(k_cache.dtype.element_ty)
            value = tl.load(v + row * v_row + kv_head * v_head + d, mask=d_mask, other=0.0)
            value = value.to(v_cache.dtype.element_ty)
            place = tl.load(places + row).to(tl.int64)
            if place >= 0:
                target = (place * kv_heads + kv_head) * dim + d
                tl.store(k_cache + target, turned, mask=d_mask)
                tl.store(v_cache + target, value, mask=d_mask)
            # Nobody reads it back here: the softmax begins with it.
            top = tl.sum(queries.to(tl.float32) * turned.to(tl.float32)[None, :], axis=1) * scale
            if SOFTCAP:
                top = softcap * (2.0 * tl.sigmoid(2.0 * top / softcap) - 1.0)
            total += 1.0
            acc += value.to(tl.float32)[None, :]
            end = last
    for at in range(start, end, TILE_L):
        position = at + tl.arange(0, TILE_L)
        seen = position < end
        acc, top, total = _visit(
            acc, top, total, queries, k_cache, v_cache, pages + row * pages_row, pages_column,
            position, seen, seen[None, :], kv_head, kv_heads, dim, page, scale, softcap,
            SOFTCAP, TILE_D, UPCAST,
        )  # fmt: skip

    empty = total == 0.0
    result = acc / tl.where(empty, 1.0, total)[:, None]
    spot = (row * heads + head) * SPLITS + split
    if SPLITS == 1:
        target = out + spot[:, None] * dim + d[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=q_mask)
    else:
        joined = top + tl.log(tl.where(empty, 1.0, total))
        tl.store(lse + spot, tl.where(empty, float("-inf"), joined), mask=g_mask)
        tl.store(partial + spot[:, None] * dim + d[None, :], result, mask=q_mask)


@triton.jit
def _prefill_kernel(
    out, q, k_cache, v_cache, tiles, pages, scale, softcap, window,
    group, kv_heads, dim, page, q_row, q_head, out_row, out_head,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_D: tl.constexpr, TILE_L: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    i = tl.arange(0, TILE_Q)
    row = tl.load(tile) + i
    inside = row < tl.load(tile + 1)
    position = tl.load(tile + 2) + i
    pages += tl.load(tile + 3)
    d = tl.arange(0, TILE_D)
    mask = inside[:, None] & (d < dim)[None, :]
    wide = row[:, None].to(tl.int64)
    queries = tl.load(q + wide * q_row + head * q_head + d[None, :], mask=mask, other=0.0)
    end = tl.max(tl.where(inside, position, 0), axis=0) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(tl.load(tile + 2) + 1 - window, 0)
    top = tl.full((TILE_Q,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, TILE_D), tl.float32)
    for at in range(first, end, TILE_L):
        key = at + tl.arange(0, TILE_L)
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible &= key[None, :] > position[:, None] - window
        acc, top, total = _visit(
            acc, top, total, queries, k_cache, v_cache, pages, 1, key, key < end, visible,
            head // group, kv_heads, dim, page, scale, softcap, SOFTCAP, TILE_D, UPCAST,
        )  # fmt: skip
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    target = out + wide * out_row + head * out_head + d[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    out, partial, lse, dim, SPLITS: tl.constexpr, TILE_S: tl.constexpr, TILE_D: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    s = tl.arange(0, TILE_S)
    d = tl.arange(0, TILE_D)
    parts = tl.load(lse + place * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(parts, axis=0)
    weight = tl.exp(parts - tl.where(top == float("-inf"), 0.0, top))  # 0 for empty stretches
    total = tl.sum(weight, axis=0)
    mask = (s < SPLITS)[:, None] & (d < dim)[None, :]
    values = tl.load(
        partial + (place * SPLITS + s[:, None]) * dim + d[None, :], mask=mask, other=0.0
    )
    result = tl.sum(values * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + place * dim + d, result.to(out.dtype.element_ty), mask=d < dim)
