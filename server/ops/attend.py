"""Attention of a step's rows over the paged cache, in plain torch: SDPA on contiguous prefill,
gathered KV blocks for decode.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from server.ops.attention import AttentionCall, DecodeBatch


def decode_(out: Tensor, call: AttentionCall) -> None:
    """Fill the decode rows of ``out [T, H, Dv]``; their keys and values are in the cache."""
    assert call.metadata.decode is not None
    rows, sinks = call.metadata.decode.rows, call.sinks
    if len(rows) == len(call.q):
        out.copy_(_decode(call.q, sinks, call))
    else:
        own = sinks if sinks is None or sinks.dim() == 1 else sinks[rows]
        out[rows] = _decode(call.q[rows], own, call)


def prefill_(out: Tensor, call: AttentionCall) -> None:
    """Fill the rows of ``out [T, H, Dv]`` that belong to prefill chunks, one chunk at a time."""
    for chunk_index, chunk in enumerate(call.metadata.prefill):
        part = slice(chunk.start, chunk.end)
        keys, values = call.k[part], call.v[part]
        if chunk.context:
            length = chunk.context + chunk.end - chunk.start
            # index_select copies whole KV blocks; plain indexing is 5x slower
            keys = call.k_cache.index_select(0, chunk.kv_blocks).flatten(0, 1)[:length]
            values = call.v_cache.index_select(0, chunk.kv_blocks).flatten(0, 1)[:length]
        out[part] = _prefill(part, keys, values, chunk_index, call)


def _decode(q: Tensor, sinks: Tensor | None, call: AttentionCall) -> Tensor:
    """Query heads that share a KV head are packed as query rows: KV is never repeated.

    q [B, H, D], sinks [H] or [B, H], of the decode rows -> [B, H, Dv]
    """
    batch = call.metadata.decode
    assert batch is not None
    n, heads, dim = q.shape
    kv_heads = call.k_cache.shape[2]
    kv_blocks = batch.kv_blocks.flatten()
    keys, values = (
        cache.index_select(0, kv_blocks).view(n, -1, kv_heads, cache.shape[3]).transpose(1, 2)
        for cache in (call.k_cache, call.v_cache)
    )
    packed = q.view(n, kv_heads, heads // kv_heads, dim)
    logits = None if sinks is None else sinks.reshape(-1, kv_heads, heads // kv_heads, 1)
    mask = _decode_mask(batch, keys.shape[2], call)
    return _attend(packed, keys, values, mask, logits, call).reshape(n, heads, -1)


def _decode_mask(batch: DecodeBatch, length: int, call: AttentionCall) -> Tensor:
    """[B, 1, 1, L] additive mask, made once per step and form."""
    made, dtype = call.metadata.made, call.q.dtype
    key = (None, call.window, call.chunk, dtype)
    if key not in made:
        position = torch.arange(length, device=batch.lengths.device)
        lengths = batch.lengths.unsqueeze(1)
        seen = position < lengths
        if call.window is not None:
            seen &= position >= lengths - call.window
        if call.chunk is not None:
            seen &= position >= (lengths - 1) // call.chunk * call.chunk
        made[key] = _additive(seen, dtype).view(len(seen), 1, 1, length)
    return made[key]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))


def _prefill(rows: slice, k: Tensor, v: Tensor, chunk_index: int, call: AttentionCall) -> Tensor:
    """Chunk number `chunk_index`: its t rows are at positions context..;
    k, v [context + t, Hkv, D or Dv] -> [t, H, Dv].
    """
    q, context = call.q[rows], call.metadata.prefill[chunk_index].context
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    sees_all = all(reach is None or reach >= len(q) for reach in (call.window, call.chunk))
    if context == 0 and sees_all and call.softcap is None and call.sinks is None:
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=call.scale, enable_gqa=True
        )
    else:
        mask, sinks = _prefill_mask(chunk_index, len(q), call), call.sinks
        if sinks is not None:  # [1, H, t or 1, 1]
            sinks = (sinks.unsqueeze(0) if sinks.dim() == 1 else sinks[rows]).t()[None, :, :, None]
        out = _attend(queries, keys, values, mask, sinks, call)
    return out.squeeze(0).transpose(0, 1)


def _prefill_mask(chunk_index: int, n_rows: int, call: AttentionCall) -> Tensor:
    """[t, context + t] additive mask of one chunk, made once per step and form."""
    made, dtype, device = call.metadata.made, call.q.dtype, call.q.device
    key = (chunk_index, call.window, call.chunk, dtype)
    if key not in made:
        context = call.metadata.prefill[chunk_index].context
        rows = torch.arange(context, context + n_rows, device=device).unsqueeze(1)
        cols = torch.arange(context + n_rows, device=device)
        seen = cols <= rows
        if call.window is not None:
            seen &= cols > rows - call.window
        if call.chunk is not None:
            seen &= cols >= rows // call.chunk * call.chunk
        made[key] = _additive(seen, dtype)
    return made[key]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None, call: AttentionCall
) -> Tensor:
    """[B, H, q, D] x [B, Hkv, L, D] with an additive mask, sinks that broadcast to [B, H, q, 1];
    scores in float32 under a softcap or beside sinks.
    """
    if call.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)).float() * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores + mask.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:3], 1)], dim=3)
    return torch.softmax(scores, dim=-1)[..., : k.shape[2]].to(v.dtype) @ v
