"""Decode attention (one new token a sequence) over a paged cache, read in place.

It is split-KV: each sequence's keys are cut into `n_splits` stretches, one program per (sequence,
KV head, stretch) with the query heads of the group as rows, online softmax; a second kernel joins
the stretches by their log-sum-exp, if there are several. A step that only decodes norms and turns q
and k in the same launch: the program whose stretch ends a sequence begins with the new key, from
registers, and writes it to the cache for later steps. Lengths and KV blocks are data, so a captured
graph serves any lengths.

Source: FlashDecoding (Dao et al., 2023); the combination is eq. 3 of FlashInfer (arXiv 2501.01005).
Numerics: scores, softmax and sums in float32; probabilities rounded to v's dtype for the product.
Bytes: k and v of every position in the window once, plus float32 partials of ``n_splits (Dv + 1)``
per head.
Tensor parallelism: KV heads are independent, a rank runs its own with their query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.attention import HeadNorm
from server.ops.triton.compat import UPCAST, is_wide, launch, mac, next_power_of_two

TILE_KEYS = 64  # read at once; fewer where they would not fit, see `keys_of`
MIN_ROWS = 16  # of a tensor-core operand


@dataclass(frozen=True, slots=True)
class NewTokens:
    """One new token a sequence whose q and k are not turned yet and whose k and v no cache holds.

    k, v        [B, Hkv, D], [B, Hkv, Dv], last axis contiguous
    cos, sin    [B, R], last axis contiguous: as `rope_and_write_` takes them
    cache_rows  [B] integer: row of the flattened cache, -1 writes nothing
    norms       of q's and of k's heads, before they turn: of one form, weights contiguous, an
                index each
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    cache_rows: Tensor
    norms: tuple[HeadNorm, HeadNorm] | None = None


def keys_of(dtype: torch.dtype, dim: int) -> int:
    """Keys of a tile: of heads of 256, 64 take more shared memory than a processor of sm_89 has."""
    return 16 if is_wide(dtype) else TILE_KEYS // 2 if dim > 128 else TILE_KEYS


def splits_for(batch: int) -> int:
    """Stretches per sequence: more where few sequences would leave the device idle."""
    return 16 if batch <= 8 else 4 if batch <= 32 else 1


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_blocks: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    n_splits: int | None = None,
    new: NewTokens | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per sequence over its own KV blocks.

    q [B, H, D], last axis contiguous; caches [n_kv_blocks, block_tokens, Hkv, D] and [.., Hkv, Dv],
    contiguous; sinks [H] or [B, H], last axis contiguous, see `AttentionCall`; kv_blocks [B, P]
    integer ids, only those that `lengths` reaches are read; lengths [B] integer, the new token
    included, 0: a padding row, its output is 0. Returns [B, H, Dv] in q's dtype:
    `out`, contiguous, if given.
    new: norm and turn q on the way (in float32, rounded after each; q itself stays), likewise each
    sequence's new key, and write it and its value; without it q is turned and the cache complete.
    """
    batch, heads, dim = q.shape
    block_tokens, kv_heads, value_dim = v_cache.shape[1:]
    splits = splits_for(batch) if n_splits is None else n_splits
    if out is None:
        out = torch.empty((batch, heads, value_dim), dtype=q.dtype, device=q.device)
    partial = lse = out
    if splits > 1:
        partial = torch.empty(
            (batch, heads, splits, value_dim), dtype=torch.float32, device=q.device
        )
        lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    k, v, cos, sin, cache_rows = (q, q, q, q, lengths)
    rotated = cos_row = 0
    norms: tuple[Tensor | int | float, ...] = (q, lengths, 0, q, lengths, 0, 0.0, 0.0)
    form = None
    if new is not None:
        k, v, cos, sin, cache_rows = new.k, new.v, new.cos, new.sin, new.cache_rows
        rotated, cos_row = cos.shape[1], cos.stride(0)
        if new.norms is not None:
            norms, form = _norm_arguments(*new.norms), new.norms[0].form
    group = heads // kv_heads
    launch(
        _attend_kernel,
        (batch, kv_heads, splits),
        out, partial, lse, q, k_cache, v_cache, kv_blocks, lengths, k, v, cos, sin, cache_rows,
        scale, 0.0 if softcap is None else softcap, 0 if window is None else window,
        0 if chunk is None else chunk, *sink_arguments(sinks, q),
        heads, kv_heads, dim, value_dim, block_tokens, *kv_blocks.stride(),
        q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), cos_row, rotated,
        *norms,
        TURN=new is not None,
        NORM=form is not None,
        ROUND=form is not None and form.casts_first,
        GROUP=group,
        SPLITS=splits,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        CHUNK=chunk is not None,
        SINK=sinks is not None,
        TILE_G=max(MIN_ROWS, next_power_of_two(group)),
        TILE_D=max(MIN_ROWS, next_power_of_two(dim)),
        TILE_V=max(MIN_ROWS, next_power_of_two(value_dim)),
        TILE_L=keys_of(q.dtype, max(dim, value_dim)),
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    if splits == 1:
        return out
    launch(
        _combine_kernel,
        (batch, heads),
        out, partial, lse, value_dim,
        SPLITS=splits,
        TILE_S=next_power_of_two(splits),
        TILE_D=next_power_of_two(value_dim),
        num_warps=1,
    )  # fmt: skip
    return out


def sink_arguments(sinks: Tensor | None, nothing: Tensor) -> tuple[Tensor, int]:
    """The sinks and the elements from one row's to the next's, 0 if they are the same."""
    if sinks is None:
        return nothing, 0
    return sinks, 0 if sinks.dim() == 1 else sinks.stride(0)


def _norm_arguments(q: HeadNorm, k: HeadNorm) -> tuple[Tensor | int | float, ...]:
    """Weights, places among them and their stride, twice; then the form of both."""
    assert q.form == k.form
    assert q.index is not None
    assert k.index is not None
    found: list[Tensor | int | float] = []
    for norm, index in ((q, q.index), (k, k.index)):
        found += [norm.weights, index, index.stride(0)]
    return (*found, q.form.eps, q.form.offset)


def paged_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_blocks: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """The same in torch, sequence by sequence, in `compute`. It stays beside
    `server.ops.attend.decode_` for what that has not: rows of length 0, a static step's padding,
    and a softcap in `compute`.
    """
    out = torch.zeros_like(q)
    group = q.shape[1] // k_cache.shape[2]
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        used = kv_blocks[row, : -(-length // k_cache.shape[1])].long()
        first = 0 if window is None else max(0, length - window)
        keys = k_cache[used].flatten(0, 1)[first:length].to(compute).repeat_interleave(group, 1)
        values = v_cache[used].flatten(0, 1)[first:length].to(compute).repeat_interleave(group, 1)
        scores = torch.einsum("hd,lhd->hl", q[row].to(compute), keys) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values).to(q.dtype)
    return out


@triton.jit
def visit(
    acc, top, total, queries, k_cache, v_cache, kv_blocks, kv_blocks_column, position, seen,
    from_row, kv_head, kv_heads, dim, value_dim, block_tokens, scale, softcap,
    SOFTCAP: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the online softmax of `queries [G, D]`.

    position, seen [L]: of the keys, and whether they exist; from_row [G, L]: who may see them.
    """
    d = tl.arange(0, TILE_D)
    number = tl.load(kv_blocks + position // block_tokens * kv_blocks_column, mask=seen, other=0)
    place = (number.to(tl.int64) * block_tokens + position % block_tokens) * kv_heads + kv_head
    mask = seen[:, None] & (d < dim)[None, :]
    keys = tl.load(k_cache + place[:, None] * dim + d[None, :], mask=mask, other=0.0)
    e = tl.arange(0, TILE_V)
    mask = seen[:, None] & (e < value_dim)[None, :]
    values = tl.load(v_cache + place[:, None] * value_dim + e[None, :], mask=mask, other=0.0)
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
def drain(acc, top, total, sink):
    """A sink's logit joins the online softmax: it takes its share and adds no value."""
    highest = tl.maximum(top, sink)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    kept = tl.exp(top - origin)
    return acc * kept[:, None], highest, total * kept + tl.exp(sink - origin)


@triton.jit
def _partner(d, rotated):
    """The dimension that turns together with each: halves of the first `rotated` are paired."""
    half = rotated // 2
    return tl.where(d < rotated, tl.where(d < half, d + half, d - half), d)


@triton.jit
def _scaled(x, inverse, weight, ROUND: tl.constexpr):
    """What RMSNorm makes of x, rounded to its dtype, in float32."""
    normal = x.to(tl.float32) * inverse
    if ROUND:
        normal = normal.to(x.dtype).to(tl.float32)
    return (normal * weight).to(x.dtype).to(tl.float32)


@triton.jit
def _attend_kernel(
    out, partial, lse, q, k_cache, v_cache, kv_blocks, lengths, k, v, cos, sin, cache_rows,
    scale, softcap, window, chunk, sinks, sinks_row,
    heads, kv_heads, dim, value_dim, block_tokens, kv_blocks_row, kv_blocks_column, q_row, q_head,
    k_row, k_head, v_row, v_head, cos_row, rotated,
    q_weights, q_index, q_index_row, k_weights, k_index, k_index_row, eps, offset,
    TURN: tl.constexpr, NORM: tl.constexpr, ROUND: tl.constexpr,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr, SINK: tl.constexpr, TILE_G: tl.constexpr, TILE_D: tl.constexpr,
    TILE_V: tl.constexpr, TILE_L: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    if CHUNK:
        first = tl.maximum((length - 1) // chunk * chunk, first)
    tiles = tl.cdiv(length - first, TILE_L)
    per_split = tl.cdiv(tiles, SPLITS) * TILE_L
    start = first + split * per_split
    end = tl.minimum(start + per_split, length)

    g = tl.arange(0, TILE_G)
    d = tl.arange(0, TILE_D)
    head = kv_head * GROUP + g
    g_mask = g < GROUP
    d_mask = d < dim
    e = tl.arange(0, TILE_V)
    e_mask = e < value_dim
    q_mask = g_mask[:, None] & d_mask[None, :]
    q_rows = q + row * q_row + head[:, None] * q_head
    queries = tl.load(q_rows + d[None, :], mask=q_mask, other=0.0)
    top = tl.full((TILE_G,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_G,), tl.float32)
    acc = tl.zeros((TILE_G, TILE_V), tl.float32)
    if TURN:
        other = _partner(d, rotated)
        c = tl.load(cos + row * cos_row + d, mask=d < rotated, other=1.0).to(tl.float32)
        s = tl.load(sin + row * cos_row + d, mask=d < rotated, other=0.0).to(tl.float32)
        s = tl.where(d < rotated // 2, -s, s)
        partner = tl.load(q_rows + other[None, :], mask=q_mask, other=0.0)
        wide, across = queries.to(tl.float32), partner.to(tl.float32)
        if NORM:
            inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / dim + eps)[:, None]
            q_own = q_weights + tl.load(q_index + row * q_index_row).to(tl.int64) * dim
            by = tl.load(q_own + d, mask=d_mask, other=0.0).to(tl.float32) + offset
            by_other = tl.load(q_own + other, mask=d_mask, other=0.0).to(tl.float32) + offset
            wide = _scaled(queries, inverse, by[None, :], ROUND)
            across = _scaled(partner, inverse, by_other[None, :], ROUND)
        queries = (wide * c[None, :] + across * s[None, :]).to(queries.dtype)
        last = length - 1
        if (start <= last) & (last < end):
            k_of = k + row * k_row + kv_head * k_head
            key = tl.load(k_of + d, mask=d_mask, other=0.0)
            mate = tl.load(k_of + other, mask=d_mask, other=0.0)
            long, cross = key.to(tl.float32), mate.to(tl.float32)
            if NORM:
                scale_k = tl.rsqrt(tl.sum(long * long, axis=0) / dim + eps)
                k_own = k_weights + tl.load(k_index + row * k_index_row).to(tl.int64) * dim
                by_k = tl.load(k_own + d, mask=d_mask, other=0.0).to(tl.float32) + offset
                by_mate = tl.load(k_own + other, mask=d_mask, other=0.0).to(tl.float32) + offset
                long = _scaled(key, scale_k, by_k, ROUND)
                cross = _scaled(mate, scale_k, by_mate, ROUND)
            turned = (long * c + cross * s).to(k_cache.dtype.element_ty)
            value = tl.load(v + row * v_row + kv_head * v_head + e, mask=e_mask, other=0.0)
            value = value.to(v_cache.dtype.element_ty)
            place = tl.load(cache_rows + row).to(tl.int64)
            if place >= 0:
                target = place * kv_heads + kv_head
                tl.store(k_cache + target * dim + d, turned, mask=d_mask)
                tl.store(v_cache + target * value_dim + e, value, mask=e_mask)
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
        acc, top, total = visit(
            acc, top, total, queries, k_cache, v_cache,
            kv_blocks + row * kv_blocks_row, kv_blocks_column,
            position, seen, seen[None, :], kv_head, kv_heads, dim, value_dim, block_tokens,
            scale, softcap, SOFTCAP, TILE_D, TILE_V, UPCAST,
        )  # fmt: skip
    if SINK:  # noqa: SIM102
        if split == 0:  # known at run time only
            sink = tl.load(sinks + row * sinks_row + head, mask=g_mask, other=0.0)
            acc, top, total = drain(acc, top, total, sink.to(tl.float32))

    empty = total == 0.0
    result = acc / tl.where(empty, 1.0, total)[:, None]
    spot = (row * heads + head) * SPLITS + split
    if SPLITS == 1:
        target = out + spot[:, None] * value_dim + e[None, :]
        result = result.to(out.dtype.element_ty)
        tl.store(target, result, mask=g_mask[:, None] & e_mask[None, :])
    else:
        joined = top + tl.log(tl.where(empty, 1.0, total))
        tl.store(lse + spot, tl.where(empty, float("-inf"), joined), mask=g_mask)
        target = partial + spot[:, None] * value_dim + e[None, :]
        tl.store(target, result, mask=g_mask[:, None] & e_mask[None, :])


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
