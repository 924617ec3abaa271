"""Decode attention over the paged cache, and writing new keys and values into it.

A task is one sequence and one KV head: it writes the new token's key and value, then reads the
sequence's pages once for all query heads that share them. Nothing is gathered or padded. Scores,
softmax and sums are float32; bfloat16 is only read and written.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.attention import AttentionPlan
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.intrinsics import (
    FAST_SUMS,
    exp_f32,
    f64_at,
    i64_at,
    load_row,
    next_task,
    store_row,
    u16_at,
)
from server.ops.cpu.parallel import Parallel

U = np.uint64
COPY_ROWS = 16  # rows of a prefill chunk that one task writes

# Places in the argument array. Strides are in elements.
(_Q, _Q_ROW, _Q_HEAD, _K, _K_ROW, _K_HEAD, _V, _V_ROW, _V_HEAD, _OUT) = range(1, 11)
(_K_CACHE, _V_CACHE, _PAGE, _KV_HEADS, _GROUP, _DIM, _IS_BF16, _PLACES) = range(11, 19)
(_ROWS, _LENGTHS, _PAGES, _MAX_PAGES, _N_SEQUENCES) = range(19, 24)
(_OTHERS, _N_OTHERS, _WINDOW, _SCALE, _SOFTCAP, _N_ARGUMENTS) = range(24, 30)


class AttentionKernel:
    """The compiled kernel, shared by all layers."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._kernel = compile_kernel(_attend, FAST_SUMS)

    def write_and_decode(
        self,
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
        """See `server.ops.attention.write_and_decode`."""
        decode, others = plan.decode, plan.prefill_rows
        kv_heads, dim = k.shape[1], k.shape[2]
        n = 0 if decode is None else len(decode.rows)
        a = np.zeros(_N_ARGUMENTS, np.int64)
        # A view of a slice of heads has a stride of 1 in the last axis: what the kernel assumes.
        for place, x in ((_Q, q), (_K, k), (_V, v)):
            a[place : place + 3] = (x.data_ptr(), x.stride(0), x.stride(1))
        a[_OUT:_PLACES] = (
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            k_cache.shape[1],
            kv_heads,
            q.shape[1] // kv_heads,
            dim,
            q.dtype is torch.bfloat16,
        )
        a[_PLACES] = plan.places.data_ptr()
        if decode is not None:
            a[_ROWS:_N_SEQUENCES] = (
                decode.rows.data_ptr(),
                decode.lengths.data_ptr(),
                decode.pages.data_ptr(),
                decode.pages.shape[1],
            )
        a[_N_SEQUENCES] = n
        a[_OTHERS], a[_N_OTHERS] = others.data_ptr(), len(others)
        a[_WINDOW] = 0 if window is None else window
        a[_SCALE : _SOFTCAP + 1].view(np.float64)[:] = (scale, softcap or 0.0)
        self._parallel.run(self._kernel, a, n * kv_heads + -(-len(others) // COPY_ROWS))


def _attend(address):
    a = i64_at(address)
    kv_heads, group, dim = a[_KV_HEADS], a[_GROUP], a[_DIM]
    n_decode = a[_N_SEQUENCES] * kv_heads
    n_tasks = n_decode + (a[_N_OTHERS] + COPY_ROWS - 1) // COPY_ROWS
    most = a[_MAX_PAGES] * a[_PAGE]
    queries = np.empty(group * dim, np.float32)
    sums = np.empty(group * dim, np.float32)
    line = np.empty(dim, np.float32)
    scores = np.empty(group * max(most, 1), np.float32)
    others, places = i64_at(a[_OTHERS]), i64_at(a[_PLACES])
    while True:
        task = next_task(address)
        if task >= n_tasks:
            break
        if task < n_decode:
            _decode(address, task // kv_heads, task % kv_heads, queries, scores, sums, line)
        else:
            first = (task - n_decode) * COPY_ROWS
            for i in range(first, min(first + COPY_ROWS, a[_N_OTHERS])):
                row = others[U(i)]
                for head in range(kv_heads):
                    _write(address, row, places[U(row)], head)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _write(address, row, place, head):
    """Copy one token's key and value of one head to its place in the cache."""
    a = i64_at(address)
    dim, item = a[_DIM], 2 if a[_IS_BF16] != 0 else 4
    target = (place * a[_KV_HEADS] + head) * dim * item
    k = u16_at(a[_K] + (row * a[_K_ROW] + head * a[_K_HEAD]) * item)
    v = u16_at(a[_V] + (row * a[_V_ROW] + head * a[_V_HEAD]) * item)
    k_to, v_to = u16_at(a[_K_CACHE] + target), u16_at(a[_V_CACHE] + target)
    for i in range(U(dim * item // 2)):
        k_to[i] = k[i]
        v_to[i] = v[i]


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _decode(address, sequence, head, queries, scores, sums, line):
    a = i64_at(address)
    page, kv_heads, group, dim = a[_PAGE], a[_KV_HEADS], a[_GROUP], a[_DIM]
    is_bf16 = a[_IS_BF16] != 0
    item = 2 if is_bf16 else 4
    row = i64_at(a[_ROWS])[U(sequence)]
    length = i64_at(a[_LENGTHS])[U(sequence)]
    pages = i64_at(a[_PAGES] + 8 * sequence * a[_MAX_PAGES])
    floats = f64_at(address + 8 * _SCALE)
    scale, softcap = np.float32(floats[U(0)]), np.float32(floats[U(1)])
    _write(address, row, i64_at(a[_PLACES])[U(row)], head)
    for g in range(group):
        source = a[_Q] + (row * a[_Q_ROW] + (head * group + g) * a[_Q_HEAD]) * item
        load_row(queries, U(g * dim), source, U(dim), is_bf16)
    first = max(0, length - a[_WINDOW]) if a[_WINDOW] > 0 else 0
    stride = U(a[_MAX_PAGES] * page)
    for t in range(first, length):
        place = pages[U(t // page)] * page + t % page
        source = a[_K_CACHE] + (place * kv_heads + head) * dim * item
        load_row(line, U(0), source, U(dim), is_bf16)
        for g in range(U(group)):
            total = np.float32(0)
            for d in range(U(dim)):
                total += queries[g * U(dim) + d] * line[d]
            total *= scale
            if softcap > 0:
                total = softcap * (
                    np.float32(1) - np.float32(2) / (exp_f32(2 * total / softcap) + np.float32(1))
                )
            scores[g * stride + U(t)] = total
    for i in range(U(group * dim)):
        sums[i] = np.float32(0)
    for g in range(U(group)):
        _softmax(scores, g * stride + U(first), U(length - first))
    for t in range(first, length):
        place = pages[U(t // page)] * page + t % page
        source = a[_V_CACHE] + (place * kv_heads + head) * dim * item
        load_row(line, U(0), source, U(dim), is_bf16)
        for g in range(U(group)):
            weight = scores[g * stride + U(t)]
            for d in range(U(dim)):
                sums[g * U(dim) + d] += weight * line[d]
    target = a[_OUT] + (row * kv_heads * group + head * group) * dim * item
    store_row(target, sums, U(0), U(group * dim), is_bf16)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _softmax(scores, first, count):
    """In place over ``scores[first : first + count]``. A NaN score makes all of them NaN."""
    largest = scores[first]
    for i in range(count):
        largest = max(largest, scores[first + i])
    total = np.float32(0)
    for i in range(count):
        value = exp_f32(scores[first + i] - largest)
        scores[first + i] = value
        total += value
    inverse = np.float32(1) / total
    for i in range(count):
        scores[first + i] *= inverse
