"""Split-KV decode attention under the interpreter, against float64 softmax over loose tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.ops.attend import prefill_
from server.ops.attention import (
    AttentionCall,
    AttentionMetadata,
    HeadNorm,
    PrefillChunk,
    Rotary,
    rotate_and_write_,
)
from server.ops.norm import RmsForm, rms_norm
from server.ops.triton.attention import NewTokens, paged_decode, paged_decode_reference
from server.ops.triton.prefill import paged_prefill_, prefill_tiles
from tests.corners import corners
from tests.server.ops.triton.helpers import CPU, generator

BLOCK_TOKENS = 8


def scattered(
    lengths: list[int], kv_heads: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Caches with each sequence on KV blocks of its own in random order; all else is NaN."""
    used = [-(-length // BLOCK_TOKENS) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=generator(0)).tolist()
    k_cache = torch.full((len(order), BLOCK_TOKENS, kv_heads, dim), float("nan"))
    v_cache = k_cache.clone()
    kv_blocks = torch.full((len(lengths), max(used) + 1), 10**6, dtype=torch.int32)
    loose = []
    for row, length in enumerate(lengths):
        keys = torch.randn(length, kv_heads, dim, generator=generator(10 + row))
        values = torch.randn(length, kv_heads, dim, generator=generator(50 + row))
        loose.append((keys, values))
        for i in range(used[row]):
            kv_block = order.pop()
            kv_blocks[row, i] = kv_block
            part = slice(i * BLOCK_TOKENS, min(length, (i + 1) * BLOCK_TOKENS))
            k_cache[kv_block, : part.stop - part.start] = keys[part]
            v_cache[kv_block, : part.stop - part.start] = values[part]
    return k_cache, v_cache, kv_blocks, loose


def softmax_over(
    q: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """float64 attention of one query, head by head."""
    heads, group = len(q), len(q) // keys.shape[1]
    first = 0 if window is None else max(0, len(keys) - window)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head in range(heads):
        k, v = keys[first:, head // group].double(), values[first:, head // group].double()
        scores = k @ q[head].double() / math.sqrt(q.shape[1])
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        out[head] = torch.softmax(scores, 0) @ v
    return out


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [(4, 2, 16, None, None), (6, 1, 20, 70, None), (2, 2, 32, None, 2.5), (3, 3, 16, 5, 4.0)],
)
def test_decode_equals_softmax_over_own_tokens(
    splits: int, heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None
) -> None:
    lengths = [1, 150, 64, 9]
    k_cache, v_cache, kv_blocks, loose = scattered(lengths, kv_heads, dim)
    q = torch.randn(len(lengths) + 1, heads, dim, generator=generator(2))
    kv_blocks = torch.cat([kv_blocks, torch.full_like(kv_blocks[:1], -5)])  # a padding row
    sizes = torch.tensor([*lengths, 0])
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    got = paged_decode(q, k_cache, v_cache, kv_blocks, sizes, n_splits=splits, **options)
    reference = paged_decode_reference(q, k_cache, v_cache, kv_blocks, sizes, **options)
    for row, (keys, values) in enumerate(loose):
        want = softmax_over(q[row], keys, values, window, softcap)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reference[row].double(), want, rtol=1e-4, atol=1e-5)
    assert bool((got[-1] == 0).all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotated", "window", "softcap", "offset", "splits"),
    corners(
        [
            (4, 2, 16, 16, None, None),
            (6, 1, 20, 8, 70, None),  # the first dimensions turn only
            (2, 2, 32, 32, None, 2.5),
            (3, 3, 16, 16, 1, 4.0),  # each token sees itself only
        ],
        [None, 0.0, 1.0],
        [3, 1],
    ),
)
def test_decode_of_new_tokens_norms_turns_writes_and_attends(
    offset: float | None,
    splits: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotated: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Lengths at the borders of tiles, stretches, KV blocks; a padding row; offset: of norms."""
    lengths = [1, 150, 64, 65, 9]
    k_cache, v_cache, kv_blocks, _ = scattered(lengths, kv_heads, dim)
    kv_blocks = torch.cat([kv_blocks, torch.full_like(kv_blocks[:1], -5)])
    sizes = torch.tensor([*lengths, 0])
    rows = len(sizes)
    cut = [heads * dim, kv_heads * dim, kv_heads * dim]
    fused = torch.randn(rows, sum(cut), generator=generator(2))
    q, k, v = (part.view(rows, -1, dim) for part in fused.split(cut, 1))
    angle = torch.rand(rows, rotated // 2, generator=generator(3)).repeat(1, 2) * 6
    cache_rows = [
        int(kv_blocks[i, (n - 1) // BLOCK_TOKENS]) * BLOCK_TOKENS + (n - 1) % BLOCK_TOKENS
        for i, n in enumerate(lengths)
    ]
    norms = None
    if offset is not None:
        form = RmsForm(1e-3, offset, casts_first=offset == 0.0)
        one = torch.tensor([2, 0, 1, 1, 2, 0])
        weights = torch.randn(2, 3, dim, generator=generator(4))
        norms = HeadNorm(weights[0], one, form), HeadNorm(weights[1], one[:1].expand(rows), form)
    new = NewTokens(k, v, angle.cos(), angle.sin(), torch.tensor([*cache_rows, -1]), norms)
    for cache in (k_cache, v_cache):  # what is there before must not be read
        cache.view(-1, kv_heads, dim)[new.cache_rows[:-1]] = float("nan")
    exact_q, exact_key, exact_k, exact_v = (t.double() for t in (q, k, k_cache, v_cache))
    if norms is not None:
        exact_q, exact_key = (
            rms_norm(x, n.weights, n.index, n.form)
            for x, n in zip((exact_q, exact_key), norms, strict=True)
        )
    # In place and in float64; the padding row has nothing to write and is not read.
    one_less = exact_q[:-1], exact_key[:-1], v[:-1].double()
    metadata = AttentionMetadata(new.cache_rows[:-1], None, ())
    rotary = Rotary(new.cos[:-1], new.sin[:-1])
    rotate_and_write_(AttentionCall(*one_less, exact_k, exact_v, metadata, 1.0, rotary=rotary))
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    want = paged_decode_reference(
        exact_q, exact_k, exact_v, kv_blocks, sizes, compute=torch.float64, **options
    )
    before, out = fused.clone(), torch.empty(rows, heads, dim)
    got = paged_decode(
        q, k_cache, v_cache, kv_blocks, sizes, n_splits=splits, new=new, out=out, **options
    )
    assert got is out
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    for cache, filled in ((k_cache, exact_k), (v_cache, exact_v)):
        torch.testing.assert_close(cache.double(), filled, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(fused, before)


def test_decode_of_new_tokens_without_a_place_writes_nothing() -> None:
    k_cache, v_cache, kv_blocks, _ = scattered([20], 1, 16)
    before = k_cache.clone(), v_cache.clone()
    q, k, v = torch.randn(3, 1, 1, 16, generator=generator(2))
    new = NewTokens(k, v, torch.ones(1, 16), torch.zeros(1, 16), torch.tensor([-1]))
    sizes = torch.tensor([21])
    got = paged_decode(q, k_cache, v_cache, kv_blocks, sizes, scale=0.25, new=new)
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)
    k_cache.view(-1, 1, 16)[kv_blocks[0, 2] * BLOCK_TOKENS + 4] = k[0]
    v_cache.view(-1, 1, 16)[kv_blocks[0, 2] * BLOCK_TOKENS + 4] = v[0]
    want = paged_decode_reference(q, k_cache, v_cache, kv_blocks, sizes, scale=0.25)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_decode_bfloat16_stays_near_float64() -> None:
    k_cache, v_cache, kv_blocks, loose = scattered([100], 1, 16)
    k_cache, v_cache = k_cache.bfloat16(), v_cache.bfloat16()
    q = torch.randn(1, 4, 16, generator=generator(2)).bfloat16()
    got = paged_decode(q, k_cache, v_cache, kv_blocks, torch.tensor([100]), scale=0.25, n_splits=2)
    keys, values = (part.bfloat16() for part in loose[0])
    want = softmax_over(q[0], keys, values, None, None)
    assert float((got[0].double() - want).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [(4, 2, 16, None, None), (2, 1, 20, 9, None), (2, 2, 16, None, 2.5), (1, 1, 16, 30, 4.0)],
)
def test_prefill_chunks_equal_softmax_over_own_tokens(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    lengths, contexts = [21, 3, 40], [0, 2, 33]  # two whole prompts' ends and a later chunk
    k_cache, v_cache, kv_blocks, loose = scattered(lengths, kv_heads, dim)
    chunks, row = [], 2  # rows 0 and 1 decode
    for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        used = kv_blocks[i, : -(-length // BLOCK_TOKENS)].long()
        chunks.append(PrefillChunk(row, row + length - context, context, used))
        row += length - context
    q = torch.randn(row, heads, dim, generator=generator(2))
    scale = dim**-0.5
    got = torch.full_like(q, 7.0)
    tiles = prefill_tiles(chunks, CPU, q.dtype)
    options = {"scale": scale, "window": window, "softcap": softcap}
    paged_prefill_(got, q, k_cache, v_cache, tiles, **options)
    assert bool((got[:2] == 7).all()), "decode rows are not its own"
    k, v = (torch.zeros(row, kv_heads, dim) for _ in range(2))
    for i, chunk in enumerate(chunks):
        keys, values = loose[i]
        k[chunk.start : chunk.end], v[chunk.start : chunk.end] = (
            part[chunk.context :] for part in (keys, values)
        )
        for at in range(chunk.start, chunk.end):
            seen = chunk.context + at - chunk.start + 1
            want = softmax_over(q[at], keys[:seen], values[:seen], window, softcap)
            torch.testing.assert_close(got[at].double(), want, rtol=1e-4, atol=1e-5)
    reference = torch.full_like(q, 7.0)
    metadata = AttentionMetadata(torch.zeros(row, dtype=torch.int64), None, tuple(chunks))
    caches = (torch.nan_to_num(k_cache), torch.nan_to_num(v_cache))  # torch reads whole KV blocks
    prefill_(reference, AttentionCall(q, k, v, *caches, metadata, scale, window, softcap))
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)
