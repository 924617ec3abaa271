"""Decode attention over a paged cache: every sequence has one new token.

Split-KV: each sequence's keys are cut into `n_splits` stretches, one program per (sequence, KV
head, stretch) with the query heads of the group as rows, online softmax; a second kernel joins the
stretches by their log-sum-exp. Lengths and pages are data, so a captured graph serves any lengths.

Source: FlashDecoding (Dao et al., 2023); the combination is eq. 3 of FlashInfer (arXiv 2501.01005).
Numerics: scores, softmax and sums in float32; probabilities rounded to v's dtype for the product.
Bytes: k and v of every position in the window once, plus float32 partials of
``n_splits (D + 1)`` per head. Tensor parallelism: KV heads are independent, a rank runs its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.triton.compat import UPCAST, launch, mac, next_power_of_two

TILE_KEYS = 64
MIN_ROWS = 16  # of a tensor-core operand


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
) -> Tensor:
    """Attention of one new token per sequence over its own pages.

    q [B, H, D], last axis contiguous; caches [n_pages, page, Hkv, D] contiguous; pages [B, P]
    integer page ids, only those that `lengths` reaches are read; lengths [B] integer, the new token
    included, 0: a padding row, its output is 0. Returns [B, H, D] in q's dtype.
    """
    batch, heads, dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    splits = splits_for(batch) if n_splits is None else n_splits
    partial = torch.empty((batch, heads, splits, dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, splits), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, heads, dim), dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    launch(
        _attend_kernel,
        (batch, kv_heads, splits),
        *(partial, lse, q, k_cache, v_cache, pages, lengths),
        *(scale, 0.0 if softcap is None else softcap, 0 if window is None else window),
        *(heads, kv_heads, dim, page, pages.stride(0), q.stride(0), q.stride(1)),
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


@triton.jit
def _attend_kernel(
    partial, lse, q, k_cache, v_cache, pages, lengths, scale, softcap, window,
    heads, kv_heads, dim, page, pages_stride, q_row, q_head,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
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
    queries = tl.load(
        q + row * q_row + head[:, None] * q_head + d[None, :],
        mask=g_mask[:, None] & d_mask[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full((TILE_G,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_G,), tl.float32)
    acc = tl.zeros((TILE_G, TILE_D), tl.float32)
    for at in range(start, end, TILE_L):
        position = at + tl.arange(0, TILE_L)
        seen = position < end
        number = tl.load(pages + row * pages_stride + position // page, mask=seen, other=0)
        place = (number.to(tl.int64) * page + position % page) * kv_heads + kv_head
        mask = seen[:, None] & d_mask[None, :]
        keys = tl.load(k_cache + place[:, None] * dim + d[None, :], mask=mask, other=0.0)
        values = tl.load(v_cache + place[:, None] * dim + d[None, :], mask=mask, other=0.0)
        scores = mac(tl.zeros((TILE_G, TILE_L), tl.float32), queries, tl.trans(keys), UPCAST)
        scores *= scale
        if SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weight = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = mac(acc * shrink[:, None], weight.to(values.dtype), values, UPCAST)
        top = new_top

    place = (row * heads + head) * SPLITS + split
    empty = total == 0.0
    joined = top + tl.log(tl.where(empty, 1.0, total))
    tl.store(lse + place, tl.where(empty, float("-inf"), joined), mask=g_mask)
    tl.store(
        partial + place[:, None] * dim + d[None, :],
        acc / tl.where(empty, 1.0, total)[:, None],
        mask=g_mask[:, None] & d_mask[None, :],
    )


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
