"""Paged attention in plain torch: SDPA on contiguous prefill, gathered KV blocks for decode.

Cache layout per layer: ``k, v [n_kv_blocks, block_tokens, Hkv, D]``. A step's tokens are packed on
one axis; a sequence with one new token is a decode row, any other a prefill chunk.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from server.ops.norm import RmsForm


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """All sequences with one new token.

    rows   [B] int64, their rows in the packed batch
    kv_blocks  [B, P] int64, KV block ids, padded with KV block 0
    lengths [B] int64, context length including the new token
    """

    rows: Tensor
    kv_blocks: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One sequence's chunk: rows ``[start, end)`` hold positions from `context` on.

    kv_blocks  [P] int64, the sequence's KV blocks up to the chunk's end
    """

    start: int
    end: int
    context: int
    kv_blocks: Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """Where each row's keys and values go, and who reads what.

    cache_rows    [T] int64, row in the flattened cache ``[n_kv_blocks * block_tokens]``
    made          what layers derive from it and share in this step, by what it depends on
    first_row     which of the step's rows the first is, where these are a part of them
    """

    cache_rows: Tensor
    decode: DecodeBatch | None
    prefill: tuple[PrefillChunk, ...]
    made: dict[Hashable, Tensor] = field(default_factory=dict)
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of rotary position embedding (Su et al., arXiv 2104.09864).

    cos, sin  [T, R], R <= D even: the first R dimensions of every head turn, dimension i < R / 2
              together with i + R / 2, as in Hugging Face's Llama
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of every head of q or k before it turns (Qwen3): as `Kernels.rms_norm` takes it."""

    weights: Tensor
    index: Tensor | None
    form: RmsForm


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention in one step; T new tokens.

    q [T, H, D]; k, v [T, Hkv, D]: the new tokens', may be slices of one fused tensor, last axis
    contiguous; k_cache, v_cache [n_kv_blocks, block_tokens, Hkv, D]
    rotary   turns q and k first; None if they are turned already, or the model has no such thing
    norms    of q and of k, before they turn; None if they are normed already, or the model has none
    window   each token sees only the last `window` positions
    softcap  tanh cap on the scores
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    metadata: AttentionMetadata
    scale: float
    window: int | None = None
    softcap: float | None = None
    rotary: Rotary | None = None
    norms: tuple[HeadNorm, HeadNorm] | None = None


class AttentionKernels(Protocol):
    """The parts of `Kernels` that attention consists of; see the functions below."""

    def rms_norm(
        self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> Tensor: ...

    def rotate_and_write_(self, call: AttentionCall) -> None: ...

    def decode_(self, out: Tensor, call: AttentionCall) -> None: ...

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        """Norms and both of these at once, for a step that only decodes; q and k stay as they are.

        False, and nothing is done, where there is no such kernel.
        """
        ...

    def prefill_(self, out: Tensor, call: AttentionCall) -> None: ...


def paged_attention(call: AttentionCall, kernels: AttentionKernels) -> Tensor:
    """Causal attention of every new token over its own sequence.

    Norms and turns q and k, maybe in place, and writes k and v to the cache. Returns [T, H, D] in
    q's dtype.
    Numerics: float32 accumulation.
    """
    out = call.q.new_empty(call.q.shape)
    decode = call.metadata.decode
    only_decodes = decode is not None and len(decode.rows) == len(call.q)
    if only_decodes and call.rotary is not None and kernels.rotate_and_decode_(out, call):
        return out
    if call.norms is not None:
        q, k = (
            kernels.rms_norm(x.unsqueeze(0), norm.weights, norm.index, norm.form)[0]
            for x, norm in zip((call.q, call.k), call.norms, strict=True)
        )
        call = replace(call, q=q, k=k, norms=None)
    kernels.rotate_and_write_(call)
    if decode is not None:
        kernels.decode_(out, call)
    if call.metadata.prefill:
        kernels.prefill_(out, call)
    return out


def rotate_and_write_(call: AttentionCall) -> None:
    """Turn q and k in place (in float32, float64 where they are; rounded once); write every new key
    and value.
    """
    if call.rotary is not None:
        for x in (call.q, call.k):
            x.copy_(rotate(x, call.rotary, torch.promote_types(x.dtype, torch.float32)))
    write_cache_(call.k_cache, call.k, call.metadata.cache_rows)
    write_cache_(call.v_cache, call.v, call.metadata.cache_rows)


def rotate(x: Tensor, rotary: Rotary, compute: torch.dtype) -> Tensor:
    """``x [T, H, D]`` turned, computed in `compute`, in x's dtype."""
    cos, sin = (t.to(compute).unsqueeze(1) for t in (rotary.cos, rotary.sin))
    wide, rotated = x.to(compute), cos.shape[2]
    turning, rest = wide[..., :rotated], wide[..., rotated:]
    first, second = turning.chunk(2, dim=2)
    turned = turning * cos + torch.cat([-second, first], dim=2) * sin
    return torch.cat([turned, rest], dim=2).to(x.dtype)


def write_cache_(cache: Tensor, values: Tensor, cache_rows: Tensor) -> None:
    """``values [T, Hkv, D]`` go to these rows of ``[n_kv_blocks, block_tokens, Hkv, D]``."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, cache_rows, values)


def decode_(out: Tensor, call: AttentionCall) -> None:
    """Fill the decode rows of ``out [T, H, D]``; their keys and values are in the cache."""
    assert call.metadata.decode is not None
    rows = call.metadata.decode.rows
    if len(rows) == len(call.q):
        out.copy_(_decode(call.q, call))
    else:
        out[rows] = _decode(call.q[rows], call)


def prefill_(out: Tensor, call: AttentionCall) -> None:
    """Fill the rows of ``out [T, H, D]`` that belong to prefill chunks, one chunk at a time."""
    for chunk_index, chunk in enumerate(call.metadata.prefill):
        part = slice(chunk.start, chunk.end)
        keys, values = call.k[part], call.v[part]
        if chunk.context:
            length = chunk.context + chunk.end - chunk.start
            # index_select copies whole KV blocks; plain indexing is 5x slower
            keys = call.k_cache.index_select(0, chunk.kv_blocks).flatten(0, 1)[:length]
            values = call.v_cache.index_select(0, chunk.kv_blocks).flatten(0, 1)[:length]
        out[part] = _prefill(call.q[part], keys, values, chunk_index, call)


def _decode(q: Tensor, call: AttentionCall) -> Tensor:
    """Query heads that share a KV head are packed as query rows: KV is never repeated."""
    batch = call.metadata.decode
    assert batch is not None
    n, heads, dim = q.shape
    kv_heads = call.k_cache.shape[2]
    kv_blocks = batch.kv_blocks.flatten()
    keys = call.k_cache.index_select(0, kv_blocks).view(n, -1, kv_heads, dim).transpose(1, 2)
    values = call.v_cache.index_select(0, kv_blocks).view(n, -1, kv_heads, dim).transpose(1, 2)
    packed = q.view(n, kv_heads, heads // kv_heads, dim)
    mask = _decode_mask(call.metadata, batch, keys.shape[2], call.window, q.dtype)
    out = _attend(packed, keys, values, mask, call.scale, call.softcap)
    return out.reshape(n, heads, dim)


def _decode_mask(
    metadata: AttentionMetadata,
    batch: DecodeBatch,
    length: int,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, 1, 1, L] additive mask, made once per step and window."""
    key = (None, window, dtype)
    if key not in metadata.made:
        position = torch.arange(length, device=batch.lengths.device)
        seen = position < batch.lengths.unsqueeze(1)
        if window is not None:
            seen &= position >= batch.lengths.unsqueeze(1) - window
        metadata.made[key] = _additive(seen, dtype).view(len(seen), 1, 1, length)
    return metadata.made[key]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))


def _prefill(q: Tensor, k: Tensor, v: Tensor, chunk_index: int, call: AttentionCall) -> Tensor:
    """Chunk number `chunk_index`: q [t, H, D] at positions context.., k, v [context + t, Hkv, D]
    -> [t, H, D].
    """
    t, context = len(q), call.metadata.prefill[chunk_index].context
    queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    window, softcap = call.window, call.softcap
    if context == 0 and softcap is None and (window is None or window >= t):
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=call.scale, enable_gqa=True
        )
    else:
        mask = _prefill_mask(call.metadata, chunk_index, window, q)
        out = _attend(queries, keys, values, mask, call.scale, softcap)
    return out.squeeze(0).transpose(0, 1)


def _prefill_mask(
    metadata: AttentionMetadata, chunk_index: int, window: int | None, q: Tensor
) -> Tensor:
    """[t, context + t] additive mask of one chunk, made once per step and window."""
    key = (chunk_index, window, q.dtype)
    if key not in metadata.made:
        context = metadata.prefill[chunk_index].context
        rows = torch.arange(context, context + len(q), device=q.device).unsqueeze(1)
        cols = torch.arange(context + len(q), device=q.device)
        seen = cols <= rows
        if window is not None:
            seen &= cols > rows - window
        metadata.made[key] = _additive(seen, q.dtype)
    return metadata.made[key]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """[B, H, q, D] x [B, Hkv, L, D] with an additive mask; scores in float32 under a softcap."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)).float() * scale
    scores = torch.tanh(scores / softcap) * softcap + mask.float()
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v
