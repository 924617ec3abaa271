"""Attention of prompt chunks over a paged cache, read in place.

All chunks of a step are one launch, one program per (tile of a chunk's tokens, head), each walking
the keys that its tokens may see.

Source: FlashAttention-2 (arXiv 2307.08691, algorithm 1). torch's `varlen_attn` is not used: it has
no softcap, on 2.11 no paged cache (every chunk after the first would gather its whole context), and
cannot be tested without a GPU.
Numerics: as in `server.ops.triton.attention`.
Bytes: k and v of every position in the window once a tile, from the cache mostly.
Tensor parallelism: heads are independent, a rank runs its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.attention import PrefillChunk
from server.ops.triton.attention import MIN_ROWS, drain, keys_of, sink_arguments, visit
from server.ops.triton.compat import UPCAST, is_wide, launch, next_power_of_two

TILE_TOKENS, WIDE_TOKENS = 64, 16  # of a chunk, in a tile; of 32 bits


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """The chunks of one step as data.

    table  int32 [n_tiles, 4]: first row, end of the chunk's rows, position of the first row, where
           in `kv_blocks` the chunk's own begin
    kv_blocks  integer: KV block ids, chunk after chunk
    tokens of a tile at most
    """

    table: Tensor
    kv_blocks: Tensor
    tokens: int


def tokens_of(dtype: torch.dtype) -> int:
    """Tokens of a tile, by the dtype of q."""
    return WIDE_TOKENS if is_wide(dtype) else TILE_TOKENS


def prefill_tiles(
    chunks: Sequence[PrefillChunk], device: torch.device, dtype: torch.dtype
) -> PrefillTiles:
    """Cut a step's chunks into tiles of tokens of this dtype; one host-to-device copy, once a
    step.
    """
    table, first_kv_block, tokens = [], 0, tokens_of(dtype)
    for chunk in chunks:
        for start in range(chunk.start, chunk.end, tokens):
            position = chunk.context + start - chunk.start
            table.append((start, chunk.end, position, first_kv_block))
        first_kv_block += len(chunk.kv_blocks)
    kv_blocks = torch.cat([chunk.kv_blocks for chunk in chunks])
    return PrefillTiles(torch.tensor(table, dtype=torch.int32).to(device), kv_blocks, tokens)


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
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Causal attention of each chunk's tokens over their sequence, their own keys included.

    out [T, H, Dv], q [T, H, D], last axis contiguous: the tiles' rows are read and written, no
    others; caches [n_kv_blocks, block_tokens, Hkv, D] and [.., Hkv, Dv], contiguous, hold the new
    tokens already; sinks [H] or [T, H], last axis contiguous, see `AttentionCall`.
    """
    _, heads, dim = q.shape
    assert tiles.tokens <= tokens_of(q.dtype), "tiles made for another dtype"
    block_tokens, kv_heads, value_dim = v_cache.shape[1:]
    widest = max(dim, value_dim)
    launch(
        _prefill_kernel,
        (len(tiles.table), heads),
        out, q, k_cache, v_cache, tiles.table, tiles.kv_blocks,
        scale, 0.0 if softcap is None else softcap, 0 if window is None else window,
        0 if chunk is None else chunk, *sink_arguments(sinks, q),
        heads // kv_heads, kv_heads, dim, value_dim, block_tokens,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        CHUNK=chunk is not None,
        SINK=sinks is not None,
        TILE_Q=tiles.tokens,
        TILE_D=max(MIN_ROWS, next_power_of_two(dim)),
        TILE_V=max(MIN_ROWS, next_power_of_two(value_dim)),
        TILE_L=keys_of(q.dtype, widest),
        UPCAST=UPCAST,
        num_warps=4 if widest <= 128 else 8,
        num_stages=2,
    )  # fmt: skip


@triton.jit
def _prefill_kernel(
    out, q, k_cache, v_cache, tiles, kv_blocks, scale, softcap, window, chunk, sinks, sinks_row,
    group, kv_heads, dim, value_dim, block_tokens, q_row, q_head, out_row, out_head,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CHUNK: tl.constexpr, SINK: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr, TILE_L: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    i = tl.arange(0, TILE_Q)
    row = tl.load(tile) + i
    inside = row < tl.load(tile + 1)
    position = tl.load(tile + 2) + i
    kv_blocks += tl.load(tile + 3)
    d = tl.arange(0, TILE_D)
    mask = inside[:, None] & (d < dim)[None, :]
    wide = row[:, None].to(tl.int64)
    queries = tl.load(q + wide * q_row + head * q_head + d[None, :], mask=mask, other=0.0)
    end = tl.max(tl.where(inside, position, 0), axis=0) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(tl.load(tile + 2) + 1 - window, 0)
    if CHUNK:
        first = tl.maximum(tl.load(tile + 2) // chunk * chunk, first)
    top = tl.full((TILE_Q,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    acc = tl.zeros((TILE_Q, TILE_V), tl.float32)
    for at in range(first, end, TILE_L):
        key = at + tl.arange(0, TILE_L)
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible &= key[None, :] > position[:, None] - window
        if CHUNK:
            visible &= key[None, :] >= (position // chunk * chunk)[:, None]
        acc, top, total = visit(
            acc, top, total, queries, k_cache, v_cache, kv_blocks, 1, key, key < end, visible,
            head // group, kv_heads, dim, value_dim, block_tokens, scale, softcap,
            SOFTCAP, TILE_D, TILE_V, UPCAST,
        )  # fmt: skip
    if SINK:
        sink = tl.load(sinks + row.to(tl.int64) * sinks_row + head, mask=inside, other=0.0)
        acc, top, total = drain(acc, top, total, sink.to(tl.float32))
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    e = tl.arange(0, TILE_V)
    target = out + wide * out_row + head * out_head + e[None, :]
    mask = inside[:, None] & (e < value_dim)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)
