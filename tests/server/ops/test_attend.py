"""Attention of every backend, in every form, against softmax in float64, pair by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from server.ops.attention import (
    AttentionCall,
    AttentionMetadata,
    DecodeBatch,
    PrefillChunk,
    Rotary,
    paged_attention,
)
from server.ops.cpu.kernels import NumbaKernels
from server.ops.kernels import Kernels, TorchKernels

BLOCK_TOKENS = 4
CPU = torch.device("cpu")
SEQUENCES = [(1, 0), (1, 18), (7, 0), (9, 14), (1, 6)]  # new tokens, known before


@pytest.fixture(scope="module", params=["torch", "numba", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return TorchKernels()
    if request.param == "numba":
        return NumbaKernels()
    pytest.importorskip("triton")
    from server.ops.triton.kernels import TritonKernels

    return TritonKernels(CPU)


@dataclass(frozen=True)
class Form:
    dims: tuple[int, int] = (16, 16)
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sinks: str = "none"  # or "heads", "rows"
    scale: float = 0.4

    def sees(self, query: int, key: int) -> bool:
        if key > query or (self.window is not None and query - key >= self.window):
            return False
        return self.chunk is None or key // self.chunk == query // self.chunk


FORMS = {
    "plain": Form(),
    "sinks": Form(sinks="heads"),
    "sinks of rows": Form(sinks="rows", softcap=3.0),
    "sinks in a window": Form(sinks="rows", window=5),
    "chunks": Form(chunk=8),
    "chunks that fit no block": Form(chunk=3, sinks="heads"),
    "wide values": Form(dims=(16, 32)),
    "narrow values": Form(dims=(24, 16), sinks="rows", chunk=10),
    "values of no vector's width": Form(dims=(20, 12), window=6),
}


def one_step(
    form: Form, dtype: torch.dtype, sequences: list[tuple[int, int]] = SEQUENCES
) -> tuple[AttentionCall, list[tuple[int, Tensor, Tensor]]]:
    """The call, and for each new token its position and its sequence's keys and values."""
    generator = torch.Generator().manual_seed(7)
    heads, kv_heads, (dim, value_dim) = 6, 2, form.dims
    totals = [new + known for new, known in sequences]
    used = [-(-total // BLOCK_TOKENS) for total in totals]
    order = torch.randperm(sum(used), generator=generator) + 1
    k_cache = torch.zeros(len(order) + 1, BLOCK_TOKENS, kv_heads, dim, dtype=dtype)
    v_cache = torch.zeros(len(order) + 1, BLOCK_TOKENS, kv_heads, value_dim, dtype=dtype)
    cache_rows, decode, prefill, new_k, new_v, oracle = [], [], [], [], [], []
    for (n, known), kv_blocks in zip(sequences, order.split(used), strict=True):
        keys = torch.randn(n + known, kv_heads, dim, generator=generator).to(dtype)
        values = torch.randn(n + known, kv_heads, value_dim, generator=generator).to(dtype)
        places = [
            int(kv_blocks[t // BLOCK_TOKENS]) * BLOCK_TOKENS + t % BLOCK_TOKENS
            for t in range(n + known)
        ]
        k_cache.view(-1, kv_heads, dim)[places[:known]] = keys[:known]
        v_cache.view(-1, kv_heads, value_dim)[places[:known]] = values[:known]
        row = len(cache_rows)
        if n == 1 and known:
            decode.append((row, kv_blocks, n + known))
        else:
            prefill.append(PrefillChunk(row, row + n, known, kv_blocks))
        cache_rows += places[known:]
        new_k.append(keys[known:])
        new_v.append(values[known:])
        oracle += [(t, keys, values) for t in range(known, known + n)]
    tables = torch.zeros(len(decode), max(used), dtype=torch.int64)
    for i, (_, kv_blocks, _) in enumerate(decode):
        tables[i, : len(kv_blocks)] = kv_blocks
    batch = DecodeBatch(
        torch.tensor([row for row, _, _ in decode]),
        tables,
        torch.tensor([length for _, _, length in decode]),
    )
    rows = len(cache_rows)
    sinks = torch.randn(rows, heads, generator=generator).to(dtype) * 2
    chosen = {"none": None, "heads": sinks[0], "rows": sinks}[form.sinks]
    call = AttentionCall(
        torch.randn(rows, heads, dim, generator=generator).to(dtype),
        torch.cat(new_k),
        torch.cat(new_v),
        k_cache,
        v_cache,
        AttentionMetadata(torch.tensor(cache_rows), batch if decode else None, tuple(prefill)),
        form.scale,
        form.window,
        form.softcap,
        chunk=form.chunk,
        sinks=chosen,
    )
    return call, oracle


def softmax_pair_by_pair(
    form: Form, call: AttentionCall, oracle: list[tuple[int, Tensor, Tensor]]
) -> Tensor:
    heads, group = call.q.shape[1], call.q.shape[1] // call.k.shape[1]
    out = torch.zeros(call.out_shape, dtype=torch.float64)
    for row, (position, keys, values) in enumerate(oracle):
        for head in range(heads):
            weights = {}
            for key in filter(lambda key: form.sees(position, key), range(len(keys))):
                score = float(call.q[row, head].double() @ keys[key, head // group].double())
                score *= form.scale
                if form.softcap is not None:
                    score = math.tanh(score / form.softcap) * form.softcap
                weights[key] = math.exp(score)
            total = sum(weights.values())
            if call.sinks is not None:
                logits = call.sinks if call.sinks.dim() == 1 else call.sinks[row]
                total += math.exp(float(logits[head]))
            for key, weight in weights.items():
                out[row, head] += weight / total * values[key, head // group].double()
    return out


def check(ours: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    bound = 2e-6 if dtype is torch.float32 else 2**-6
    torch.testing.assert_close(ours.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_paged_attention_equals_softmax_pair_by_pair(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    call, oracle = one_step(FORMS[name], dtype)
    wanted = softmax_pair_by_pair(FORMS[name], call, oracle)
    check(paged_attention(call, kernels), wanted, dtype)
    for cache, new in ((call.k_cache, call.k), (call.v_cache, call.v)):
        assert torch.equal(cache.flatten(0, 1)[call.metadata.cache_rows], new)


@pytest.mark.parametrize("name", ["sinks of rows", "chunks that fit no block", "narrow values"])
def test_step_that_only_decodes_and_turns_equals_softmax_pair_by_pair(
    kernels: Kernels, name: str
) -> None:
    """Where a kernel norms, turns, writes and attends at once. Angles of 0: nothing moves."""
    form = FORMS[name]
    call, oracle = one_step(form, torch.float32, [(1, known) for known in (18, 6, 9, 2, 8)])
    still = torch.zeros(len(call.q), 8)
    turning = replace(call, rotary=Rotary(still.cos(), still.sin()))
    check(
        paged_attention(turning, kernels),
        softmax_pair_by_pair(form, call, oracle),
        torch.float32,
    )


def test_metadata_part_has_its_sequences_counted_from_its_first_row() -> None:
    blocks = torch.arange(5).view(5, 1)
    decode = DecodeBatch(torch.tensor([0, 4, 5]), blocks[[0, 2, 3]], torch.tensor([7, 8, 9]))
    chunks = (PrefillChunk(1, 4, 2, blocks[1]), PrefillChunk(6, 8, 0, blocks[4]))
    part = AttentionMetadata(torch.arange(8) * 10, decode, chunks).part(4, 8)
    assert part.cache_rows.tolist() == [40, 50, 60, 70]
    assert part.decode is not None
    assert part.decode.rows.tolist() == [0, 1]
    assert part.decode.lengths.tolist() == [8, 9]
    assert part.decode.kv_blocks.tolist() == [[2], [3]]
    assert [(c.start, c.end, c.context) for c in part.prefill] == [(2, 4, 0)]
    assert part.first_row == 4
    only_chunk = part.part(2, 4)
    assert only_chunk.decode is None
    assert only_chunk.first_row == 6
