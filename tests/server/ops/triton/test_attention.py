"""Split-KV decode attention under the interpreter, against float64 softmax over loose tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.ops.attention import AttentionCall, AttentionPlan, PrefillChunk, prefill_
from server.ops.triton import attention
from server.ops.triton.attention import (
    paged_decode,
    paged_decode_reference,
    paged_prefill_,
    prefill_tiles,
)
from tests.server.ops.triton.helpers import CPU, generator

PAGE = 8


def scattered(
    lengths: list[int], kv_heads: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Caches with each sequence on pages of its own in random order; all else is NaN."""
    used = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(used) + 2, generator=generator(0)).tolist()
    k_cache = torch.full((len(order), PAGE, kv_heads, dim), float("nan"))
    v_cache = k_cache.clone()
    pages = torch.full((len(lengths), max(used) + 1), 10**6, dtype=torch.int32)
    loose = []
    for row, length in enumerate(lengths):
        keys = torch.randn(length, kv_heads, dim, generator=generator(10 + row))
        values = torch.randn(length, kv_heads, dim, generator=generator(50 + row))
        loose.append((keys, values))
        for i in range(used[row]):
            page = order.pop()
            pages[row, i] = page
            part = slice(i * PAGE, min(length, (i + 1) * PAGE))
            k_cache[page, : part.stop - part.start] = keys[part]
            v_cache[page, : part.stop - part.start] = values[part]
    return k_cache, v_cache, pages, loose


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
    k_cache, v_cache, pages, loose = scattered(lengths, kv_heads, dim)
    q = torch.randn(len(lengths) + 1, heads, dim, generator=generator(2))
    pages = torch.cat([pages, torch.full_like(pages[:1], -5)])  # a padding row
    sizes = torch.tensor([*lengths, 0])
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    got = paged_decode(q, k_cache, v_cache, pages, sizes, n_splits=splits, **options)
    reference = paged_decode_reference(q, k_cache, v_cache, pages, sizes, **options)
    for row, (keys, values) in enumerate(loose):
        want = softmax_over(q[row], keys, values, window, softcap)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reference[row].double(), want, rtol=1e-4, atol=1e-5)
    assert bool((got[-1] == 0).all())


def test_decode_bfloat16_stays_near_float64() -> None:
    k_cache, v_cache, pages, loose = scattered([100], 1, 16)
    k_cache, v_cache = k_cache.bfloat16(), v_cache.bfloat16()
    q = torch.randn(1, 4, 16, generator=generator(2)).bfloat16()
    got = paged_decode(q, k_cache, v_cache, pages, torch.tensor([100]), scale=0.25, n_splits=2)
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "TILE_TOKENS", 16)
    monkeypatch.setattr(attention, "TILE_KEYS", 16)
    lengths, contexts = [21, 3, 40], [0, 2, 33]  # two whole prompts' ends and a later chunk
    k_cache, v_cache, pages, loose = scattered(lengths, kv_heads, dim)
    chunks, row = [], 2  # rows 0 and 1 decode
    for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        used = pages[i, : -(-length // PAGE)].long()
        chunks.append(PrefillChunk(row, row + length - context, context, used))
        row += length - context
    q = torch.randn(row, heads, dim, generator=generator(2))
    scale = dim**-0.5
    got = torch.full_like(q, 7.0)
    tiles = prefill_tiles(chunks, CPU)
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
    plan = AttentionPlan(torch.zeros(row, dtype=torch.int64), None, tuple(chunks))
    caches = (torch.nan_to_num(k_cache), torch.nan_to_num(v_cache))  # torch reads whole pages
    prefill_(reference, AttentionCall(q, k, v, *caches, plan, scale, window, softcap))
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)
