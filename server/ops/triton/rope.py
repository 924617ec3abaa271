"""Rotary embedding of q and k, and k, v into the paged cache, in one pass.

Heads are independent: under tensor parallelism a rank runs it on its own heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from server.ops.triton.compat import launch, next_power_of_two


def rope_and_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
) -> None:
    """Rotate q in place; write rotated k and v to their rows of the cache.

    q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv]: last axis contiguous, may be slices of one tensor;
    cos, sin [T, R], R <= D even: the first R dimensions turn, halves ``[0, R/2)`` and
    ``[R/2, R)`` paired as in Hugging Face's Llama; caches contiguous,
    [n_kv_blocks, block_tokens, Hkv, D or Dv]; cache_rows [T] integer: of the flattened cache, -1
    writes nothing (padding).
    Numerics: float32, one rounding. Bytes: q twice, k and v read and written.
    """
    tokens, heads, dim = q.shape
    kv_heads, rotated, value_dim = k.shape[1], cos.shape[1], v.shape[2]
    launch(
        _rope_kernel,
        (tokens, heads + kv_heads),
        q, k, v, cos, sin, k_cache, v_cache, cache_rows, heads, kv_heads, dim, value_dim,
        rotated, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        cos.stride(0),
        TILE=next_power_of_two(dim),
        TILE_V=next_power_of_two(value_dim),
        num_warps=1,
    )  # fmt: skip


@triton.jit
def _turn(row, cos, sin, dim, rotated, TILE: tl.constexpr):
    """float32 rotated row; dimensions from `rotated` on pass through."""
    i = tl.arange(0, TILE)
    mask = i < dim
    turns = i < rotated
    half = rotated // 2
    other = tl.where(turns, tl.where(i < half, i + half, i - half), i)
    x = tl.load(row + i, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(row + other, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + i, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + i, mask=turns, other=0.0).to(tl.float32)
    return x * c + tl.where(i < half, -partner, partner) * s


@triton.jit
def _rope_kernel(
    q, k, v, cos, sin, k_cache, v_cache, cache_rows, heads, kv_heads, dim, value_dim, rotated,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_stride,
    TILE: tl.constexpr, TILE_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, TILE)
    mask = i < dim
    cos += token * cos_stride
    sin += token * cos_stride
    if head < heads:
        row = q + token * q_token + head * q_head
        turned = _turn(row, cos, sin, dim, rotated, TILE)
        tl.debug_barrier()  # every lane has read its partner before any writes
        tl.store(row + i, turned.to(q.dtype.element_ty), mask=mask)
    else:
        cache_row = tl.load(cache_rows + token).to(tl.int64)
        if cache_row >= 0:
            kv_head = head - heads
            place = cache_row * kv_heads + kv_head
            turned = _turn(k + token * k_token + kv_head * k_head, cos, sin, dim, rotated, TILE)
            tl.store(k_cache + place * dim + i, turned.to(k_cache.dtype.element_ty), mask=mask)
            j = tl.arange(0, TILE_V)
            there = j < value_dim
            value = tl.load(v + token * v_token + kv_head * v_head + j, mask=there, other=0.0)
            value = value.to(v_cache.dtype.element_ty)
            tl.store(v_cache + place * value_dim + j, value, mask=there)
