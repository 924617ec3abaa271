"""Paged attention in plain torch: SDPA on contiguous prefill, page gather for decode.

Cache layout per layer: ``k, v [n_pages, page, Hkv, D]``. A step's tokens are packed on one axis;
a sequence with one new token is a decode row, any other a prefill chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """All sequences with one new token.

    rows   [B] int64, their rows in the packed batch
    pages  [B, P] int64, page ids, padded with page 0
    lengths [B] int64, context length including the new token
    """

    rows: Tensor
    pages: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence's chunk: rows ``[start, end)`` hold positions from `context` on.

    pages  [P] int64, the sequence's pages up to the chunk's end; unused when context is 0
    """

    start: int
    end: int
    context: int
    pages: Tensor


@dataclass(slots=True)
class AttentionPlan:
    """Where each row's keys and values go, and who reads what.

    places        [T] int64, row in the flattened cache ``[n_pages * page]``
    prefill_rows  [R] int64, the rows of all prefill chunks
    """

    places: Tensor
    prefill_rows: Tensor
    decode: DecodeBatch | None
    prefill: tuple[PrefillChunk, ...]
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)


def write_cache_(cache: Tensor, values: Tensor, places: Tensor) -> None:
    """``cache [n_pages, page, Hkv, D]``; ``values [T, Hkv, D]`` go to ``places [T]``."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, places, values)


WriteAndDecode = Callable[
    [
        Tensor,
        Tensor,
        Tensor,
        Tensor,
        Tensor,
        Tensor,
        AttentionPlan,
        float,
        int | None,
        float | None,
    ],
    None,
]


def write_and_decode(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Write every new key and value to the cache; fill the decode rows of `out [T, H, D]`.

    Other arguments as in `paged_attention`, which calls this first.
    """
    write_cache_(k_cache, k, plan.places)
    write_cache_(v_cache, v, plan.places)
    if plan.decode is None:
        return
    rows = plan.decode.rows
    if len(rows) == len(q):
        out.copy_(_decode(q, k_cache, v_cache, plan, scale, window, softcap))
    else:
        out[rows] = _decode(q[rows], k_cache, v_cache, plan, scale, window, softcap)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    decode: WriteAndDecode = write_and_decode,
) -> Tensor:
    """Causal attention of every new token over its own sequence.

    q [T, H, D]; k, v [T, Hkv, D] (the new tokens', written to the cache here);
    window: each token sees only the last `window` positions; softcap: tanh cap on the scores;
    decode: `write_and_decode` or a compiled form of it.
    Returns [T, H, D] in q's dtype. Numerics: float32 accumulation inside SDPA.
    """
    out = q.new_empty(q.shape)
    decode(out, q, k, v, k_cache, v_cache, plan, scale, window, softcap)
    for chunk in plan.prefill:
        part = slice(chunk.start, chunk.end)
        keys, values = k[part], v[part]
        if chunk.context:
            length = chunk.context + chunk.end - chunk.start
            keys = k_cache[chunk.pages].flatten(0, 1)[:length]
            values = v_cache[chunk.pages].flatten(0, 1)[:length]
        out[part] = _prefill(q[part], keys, values, chunk.context, scale, window, softcap)
    return out


def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Query heads that share a KV head are packed as query rows: KV is never repeated."""
    batch = plan.decode
    assert batch is not None
    n, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    pages = batch.pages.flatten()  # index_select copies whole pages; plain indexing is 5x slower
    keys = k_cache.index_select(0, pages).view(n, -1, kv_heads, dim).transpose(1, 2)
    values = v_cache.index_select(0, pages).view(n, -1, kv_heads, dim).transpose(1, 2)
    packed = q.view(n, kv_heads, heads // kv_heads, dim)
    mask = _decode_mask(plan, batch, keys.shape[2], window, q.dtype)
    out = _attend(packed, keys, values, mask, scale, softcap)
    return out.reshape(n, heads, dim)


def _decode_mask(
    plan: AttentionPlan, batch: DecodeBatch, length: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """[B, 1, 1, L] additive mask, made once per step and window."""
    key = (window, dtype)
    if key not in plan.masks:
        position = torch.arange(length, device=batch.lengths.device)
        seen = position < batch.lengths.unsqueeze(1)
        if window is not None:
            seen &= position >= batch.lengths.unsqueeze(1) - window
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        plan.masks[key] = mask.masked_fill_(~seen, float("-inf")).view(len(seen), 1, 1, length)
    return plan.masks[key]


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One chunk: q [t, H, D] at positions context.., k, v [context + t, Hkv, D] -> [t, H, D]."""
    t, heads, _ = q.shape
    keys, values = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    queries = q.transpose(0, 1).unsqueeze(0)
    if context == 0 and softcap is None and (window is None or window >= t):
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        rows = torch.arange(context, context + t, device=q.device).unsqueeze(1)
        cols = torch.arange(len(k), device=q.device)
        seen = cols <= rows
        if window is not None:
            seen &= cols > rows - window
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)
        mask = mask.masked_fill_(~seen, float("-inf"))
        groups = heads // k.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        out = _attend(queries, keys, values, mask, scale, softcap)
    return out.squeeze(0).transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """[B, H, q, D] x [B, H, L, D] with an additive mask; scores in float32 under a softcap."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / softcap) * softcap + mask.float()
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v
