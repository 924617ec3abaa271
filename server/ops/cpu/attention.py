"""Decode attention over the paged cache.

A task is one sequence (or one KV head of it, if there are few sequences): it reads the sequence's
KV blocks once, in the order they lie in memory, for all query heads. Nothing is gathered or padded.
Scores, softmax and sums are float32; bfloat16 is only read and written.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.attention import AttentionCall
from server.ops.cpu.codegen.intrinsics import (
    FAST_SUMS,
    exp_f32,
    f32_at,
    f64_at,
    i64_at,
    load_row,
    next_task,
    store_row,
)
from server.ops.cpu.codegen.vectors import LANES, add_scaled_bf16, add_scaled_f32, dot_bf16, dot_f32
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.rope import check_rows

U = np.uint64

# Places in the argument array. Strides are in elements.
(_Q, _Q_ROW, _Q_HEAD, _OUT, _K_CACHE, _V_CACHE, _BLOCK_TOKENS, _KV_HEADS) = range(1, 9)
(_GROUP, _DIM, _IS_BF16, _ROWS, _LENGTHS, _KV_BLOCKS, _MAX_KV_BLOCKS, _N_SEQUENCES) = range(9, 17)
(_WINDOW, _CHUNK, _VALUE_DIM, _SINKS, _SINKS_ROW, _SCALE, _SOFTCAP) = range(17, 24)
(_TASK_HEADS, _N_ARGUMENTS) = range(24, 26)


class AttentionKernel:
    """The compiled kernel, shared by all layers."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._kernel = compile_kernel(_attend, FAST_SUMS)

    def decode_(self, out: Tensor, call: AttentionCall) -> None:
        """See `server.ops.attend.decode_`."""
        decode, q = call.metadata.decode, call.q
        assert decode is not None
        check_rows(q)
        n, kv_heads = len(decode.rows), call.k_cache.shape[2]
        sinks, sinks_row = float_sinks(call)
        a = np.zeros(_N_ARGUMENTS, np.int64)
        a[_Q:_SCALE] = (
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            out.data_ptr(),
            call.k_cache.data_ptr(),
            call.v_cache.data_ptr(),
            call.k_cache.shape[1],
            kv_heads,
            q.shape[1] // kv_heads,
            q.shape[2],
            q.dtype is torch.bfloat16,
            decode.rows.data_ptr(),
            decode.lengths.data_ptr(),
            decode.kv_blocks.data_ptr(),
            decode.kv_blocks.shape[1],
            n,
            0 if call.window is None else call.window,
            0 if call.chunk is None else call.chunk,
            call.v_cache.shape[3],
            0 if sinks is None else sinks.data_ptr(),
            sinks_row,
        )
        a[_SCALE : _SOFTCAP + 1].view(np.float64)[:] = (call.scale, call.softcap or 0.0)
        # All heads of a sequence in one task read memory in order; few sequences are shared out.
        together = kv_heads if n >= 2 * self._parallel.n_threads else 1
        a[_TASK_HEADS] = together
        self._parallel.run(self._kernel, a, n * kv_heads // together)


def float_sinks(call: AttentionCall) -> tuple[Tensor | None, int]:
    """The call's sinks in float32, to be kept while their address is in use, and the elements from
    one row's to the next's.
    """
    if call.sinks is None:
        return None, 0
    sinks = call.sinks.float().contiguous()
    return sinks, 0 if sinks.dim() == 1 else sinks.shape[1]


def _attend(address):
    a = i64_at(address)
    kv_heads, heads, dim = a[_KV_HEADS], a[_TASK_HEADS], a[_DIM]
    shares = kv_heads // heads
    n_tasks = a[_N_SEQUENCES] * shares
    n_queries, value_dim = heads * a[_GROUP], a[_VALUE_DIM]
    queries = np.empty(n_queries * dim, np.float32)
    sums = np.empty(n_queries * value_dim, np.float32)
    line = np.empty(heads * max(dim, value_dim), np.float32)
    scores = np.empty(n_queries * max(a[_MAX_KV_BLOCKS] * a[_BLOCK_TOKENS], 1), np.float32)
    while True:
        task = next_task(address)
        if task >= n_tasks:
            break
        first_head = task % shares * heads
        _decode(address, task // shares, first_head, queries, scores, sums, line)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _decode(address, sequence, first_head, queries, scores, sums, line):
    a = i64_at(address)
    block_tokens, kv_heads, group, dim = a[_BLOCK_TOKENS], a[_KV_HEADS], a[_GROUP], a[_DIM]
    heads, value_dim = a[_TASK_HEADS], a[_VALUE_DIM]
    is_bf16 = a[_IS_BF16] != 0
    item = 2 if is_bf16 else 4
    row = i64_at(a[_ROWS])[U(sequence)]
    length = i64_at(a[_LENGTHS])[U(sequence)]
    kv_blocks = i64_at(a[_KV_BLOCKS] + 8 * sequence * a[_MAX_KV_BLOCKS])
    floats = f64_at(address + 8 * _SCALE)
    scale, softcap = np.float32(floats[U(0)]), np.float32(floats[U(1)])
    for q in range(heads * group):
        source = a[_Q] + (row * a[_Q_ROW] + (first_head * group + q) * a[_Q_HEAD]) * item
        load_row(queries, U(q * dim), source, U(dim), is_bf16)
    first = max(0, length - a[_WINDOW]) if a[_WINDOW] > 0 else 0
    if a[_CHUNK] > 0:
        first = max(first, (length - 1) // a[_CHUNK] * a[_CHUNK])
    stride = U(a[_MAX_KV_BLOCKS] * block_tokens)
    row_bytes = kv_heads * dim * item
    t = first
    while t < length:  # KV block by KV block: no division per token
        end = min(length, (t // block_tokens + 1) * block_tokens)
        source = (
            a[_K_CACHE]
            + (kv_blocks[U(t // block_tokens)] * block_tokens + t % block_tokens) * row_bytes
        )
        source += first_head * dim * item
        while t < end:
            if dim % LANES != 0:
                load_row(line, U(0), source, U(heads * dim), is_bf16)
            for q in range(heads * group):
                scores[U(q) * stride + U(t)] = scale * _dot(
                    queries, q, source, q // group, line, dim, is_bf16
                )
            source += row_bytes
            t += 1
    for i in range(U(heads * group * value_dim)):
        sums[i] = np.float32(0)
    for q in range(U(heads * group)):
        if softcap > 0:
            _cap(scores, q * stride + U(first), U(length - first), softcap)
        sink, has_sink = np.float32(0), a[_SINKS] != 0
        if has_sink:
            sink = f32_at(a[_SINKS])[U(row * a[_SINKS_ROW] + first_head * group) + q]
        _softmax(scores, q * stride + U(first), U(length - first), sink, has_sink)
    row_bytes = kv_heads * value_dim * item
    t = first
    while t < length:
        end = min(length, (t // block_tokens + 1) * block_tokens)
        source = (
            a[_V_CACHE]
            + (kv_blocks[U(t // block_tokens)] * block_tokens + t % block_tokens) * row_bytes
        )
        source += first_head * value_dim * item
        while t < end:
            if value_dim % LANES != 0:
                load_row(line, U(0), source, U(heads * value_dim), is_bf16)
            for q in range(heads * group):
                weight = scores[U(q) * stride + U(t)]
                _add_scaled(sums, q, source, q // group, weight, line, value_dim, is_bf16)
            source += row_bytes
            t += 1
    target = a[_OUT] + (row * kv_heads + first_head) * group * value_dim * item
    store_row(target, sums, U(0), U(heads * group * value_dim), is_bf16)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _cap(scores, first, count, softcap):
    """``softcap * tanh(score / softcap)`` in place."""
    for i in range(count):
        power = exp_f32(np.float32(2) * scores[first + i] / softcap)
        scores[first + i] = softcap * (np.float32(1) - np.float32(2) / (power + np.float32(1)))


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _dot(queries, q, source, head, line, dim, is_bf16):
    """Query q times the key of `head`: at `source`, or in `line` if dim is no multiple of 16."""
    if dim % LANES == 0:
        query, key = queries.ctypes.data + 4 * q * dim, source + head * dim * (2 if is_bf16 else 4)
        return dot_bf16(query, key, dim) if is_bf16 else dot_f32(query, key, dim)
    total = np.float32(0)
    for d in range(U(dim)):
        total += queries[U(q * dim) + d] * line[U(head * dim) + d]
    return total


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _add_scaled(sums, q, source, head, weight, line, dim, is_bf16):
    """Add the value of `head` times its weight to the sums of query q."""
    if dim % LANES != 0:
        for d in range(U(dim)):
            sums[U(q * dim) + d] += weight * line[U(head * dim) + d]
        return
    place, value = sums.ctypes.data + 4 * q * dim, source + head * dim * (2 if is_bf16 else 4)
    if is_bf16:
        add_scaled_bf16(place, value, weight, dim)
    else:
        add_scaled_f32(place, value, weight, dim)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _softmax(scores, first, count, sink, has_sink):
    """In place over ``scores[first : first + count]``. A NaN score makes all of them NaN. A sink
    is one score more, whose weight is left out.
    """
    largest = scores[first]
    for i in range(count):
        largest = max(largest, scores[first + i])
    total = np.float32(0)
    if has_sink:
        largest = max(largest, sink)
        total = exp_f32(sink - largest)
    for i in range(count):
        value = exp_f32(scores[first + i] - largest)
        scores[first + i] = value
        total += value
    inverse = np.float32(1) / total
    for i in range(count):
        scores[first + i] *= inverse
