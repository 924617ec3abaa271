"""The compiled prefill attention against softmax in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.ops import attend, attention
from server.ops.attention import AttentionCall, AttentionMetadata, PrefillChunk
from server.ops.cpu.kernels import NumbaKernels
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.prefill import PrefillKernel


@pytest.fixture(scope="module")
def kernel() -> PrefillKernel:
    return PrefillKernel(Parallel())


def make_call(
    chunks: list[tuple[int, int]],
    heads: tuple[int, int] = (6, 2),
    dim: int = 32,
    block_tokens: int = 4,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> AttentionCall:
    """Chunks of (tokens, tokens known before), each on shuffled KV blocks of its own."""
    generator = torch.Generator().manual_seed(0)
    n_heads, kv_heads = heads
    n_kv_blocks = [-(-(tokens + known) // block_tokens) for tokens, known in chunks]
    order = torch.randperm(sum(n_kv_blocks), generator=generator)
    tables = torch.split(order, n_kv_blocks)
    prefill, cache_rows, row = [], [], 0
    for (tokens, known), kv_blocks in zip(chunks, tables, strict=True):
        prefill.append(PrefillChunk(row, row + tokens, known, kv_blocks))
        cache_rows += [
            int(kv_blocks[t // block_tokens]) * block_tokens + t % block_tokens
            for t in range(known, known + tokens)
        ]
        row += tokens
    fused = torch.randn(row, (n_heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    q, k, v = (
        t.view(row, -1, dim)
        for t in fused.split([n * dim for n in (n_heads, kv_heads, kv_heads)], 1)
    )
    caches = torch.randn(2, sum(n_kv_blocks), block_tokens, kv_heads, dim, generator=generator).to(
        dtype
    )
    metadata = AttentionMetadata(torch.tensor(cache_rows), None, tuple(prefill))
    call = AttentionCall(q, k, v, caches[0], caches[1], metadata, 0.3, window, softcap)
    attention.rotate_and_write_(call)
    return call


def softmax_in_float64(call: AttentionCall) -> Tensor:
    out = torch.empty(call.q.shape, dtype=torch.float64)
    repeats = call.q.shape[1] // call.k_cache.shape[2]
    for chunk in call.metadata.prefill:
        n = chunk.context + chunk.end - chunk.start
        k, v = (
            cache[chunk.kv_blocks].flatten(0, 1)[:n].double().repeat_interleave(repeats, 1)
            for cache in (call.k_cache, call.v_cache)
        )
        q = call.q[chunk.start : chunk.end].double()
        scores = torch.einsum("thd,nhd->htn", q, k) * call.scale
        age = torch.arange(chunk.context, n).unsqueeze(1) - torch.arange(n)
        hidden = (age < 0) | (age >= (call.window or n))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[chunk.start : chunk.end] = torch.einsum("htn,nhd->thd", weights, v)
    return out


def computed(kernel: PrefillKernel, call: AttentionCall) -> Tensor:
    out = torch.full(call.q.shape, float("nan"), dtype=torch.bfloat16)
    assert kernel.takes(call)
    kernel.prefill_(out, call)
    return out


def check(kernel: PrefillKernel, call: AttentionCall) -> None:
    wanted = softmax_in_float64(call)
    torch.testing.assert_close(computed(kernel, call).double(), wanted, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(("heads", "dim"), [((6, 2), 32), ((3, 3), 16), ((4, 1), 20), ((9, 3), 64)])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
def test_prefill_equals_the_oracle(
    kernel: PrefillKernel, heads: tuple[int, int], dim: int, window: int | None
) -> None:
    chunks = [(1, 0), (5, 3), (64, 0), (70, 133), (2, 90)]
    check(kernel, make_call(chunks, heads, dim, window=window))


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 150)), min_size=1, max_size=4),
    block_tokens=st.integers(1, 17),
    group=st.integers(1, 5),
    window=st.none() | st.integers(1, 200),
)
def test_prefill_any_chunks_and_kv_blocks_equal_the_oracle(
    kernel: PrefillKernel,
    chunks: list[tuple[int, int]],
    block_tokens: int,
    group: int,
    window: int | None,
) -> None:
    check(kernel, make_call(chunks, (2 * group, 2), 8, block_tokens, window))


def test_prefill_scores_of_any_size_neither_overflow_nor_vanish(kernel: PrefillKernel) -> None:
    call = make_call([(40, 30), (40, 0)])
    call.q[:40] *= 1e4
    call.q[40:] *= 1e-4
    check(kernel, call)


def test_prefill_one_prompt_of_nan_spoils_no_other(kernel: PrefillKernel) -> None:
    call = make_call([(20, 0), (20, 0), (20, 0)])
    call.k_cache[call.metadata.prefill[1].kv_blocks] = float("nan")
    out = computed(kernel, call)
    assert out[20:40].isnan().all()
    assert out[:20].isfinite().all()
    assert out[40:].isfinite().all()


def test_prefill_decode_rows_beside_it_are_left_alone(kernel: PrefillKernel) -> None:
    call = make_call([(3, 0), (9, 4)])
    first, second = call.metadata.prefill
    metadata = AttentionMetadata(call.metadata.cache_rows, None, (second,))
    call = AttentionCall(call.q, call.k, call.v, call.k_cache, call.v_cache, metadata, call.scale)
    out = computed(kernel, call)
    assert out[first.start : first.end].isnan().all()
    assert out[second.start : second.end].isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        make_call([(5, 2)], dtype=torch.float32),
        make_call([(5, 2)], softcap=3.0),
        make_call([(5, 2)], dim=10),
    ],
    ids=["float32", "softcap", "dim 10"],
)
def test_prefill_what_the_kernel_does_not_take_is_the_references(call: AttentionCall) -> None:
    kernels, wanted = NumbaKernels(), torch.empty(call.q.shape, dtype=call.q.dtype)
    ours = wanted.clone()
    kernels.prefill_(ours, call)
    attend.prefill_(wanted, call)
    assert torch.equal(ours, wanted)


@pytest.mark.slow
def test_prefill_without_bfloat16_instructions_equals_the_oracle() -> None:
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "equals_the_oracle and 32"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.startswith("....")
