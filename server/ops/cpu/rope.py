"""Rotary embedding of q and k in place, and k and v into the paged cache, in one pass.

A task is a few rows, with all their heads. Angles and turning are float32, rounded once.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.attention import AttentionCall
from server.ops.cpu.codegen.intrinsics import FAST, i64_at, load_row, next_task, store_row, u16_at
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.parallel import Parallel

U = np.uint64
ROWS = 4  # rows of one task

# Places in the argument array. Strides are in elements.
(_Q, _Q_ROW, _Q_HEAD, _K, _K_ROW, _K_HEAD, _V, _V_ROW, _V_HEAD) = range(1, 10)
(_N_ROWS, _HEADS, _KV_HEADS, _DIM, _IS_BF16, _K_CACHE, _V_CACHE, _PLACES) = range(10, 18)
(_COS, _SIN, _COS_ROW, _ROTATED, _COS_IS_BF16, _VALUE_DIM, _N_ARGUMENTS) = range(18, 25)


class RotaryKernel:
    """The compiled kernel, shared by all layers."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._kernel = compile_kernel(_rotate_and_write, FAST)

    def rotate_and_write_(self, call: AttentionCall) -> None:
        """See `server.ops.attention.rotate_and_write_`."""
        q, k, v, rotary = call.q, call.k, call.v, call.rotary
        check_rows(q, k, v)
        a = np.zeros(_N_ARGUMENTS, np.int64)
        a[_Q:_COS] = (
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            v.data_ptr(),
            v.stride(0),
            v.stride(1),
            q.shape[0],
            q.shape[1],
            *k.shape[1:],
            q.dtype is torch.bfloat16,
            call.k_cache.data_ptr(),
            call.v_cache.data_ptr(),
            call.metadata.cache_rows.data_ptr(),
        )
        if rotary is not None:
            check_rows(rotary.cos, rotary.sin)
            a[_COS:_VALUE_DIM] = (
                rotary.cos.data_ptr(),
                rotary.sin.data_ptr(),
                rotary.cos.stride(0),
                rotary.cos.shape[1],
                rotary.cos.dtype is torch.bfloat16,
            )
        a[_VALUE_DIM] = v.shape[2]
        self._parallel.run(self._kernel, a, -(-len(q) // ROWS))


def check_rows(*tensors: Tensor) -> None:
    """Raise ValueError unless the last axis is contiguous: what kernels on addresses assume."""
    for x in tensors:
        if x.stride(-1) != 1:
            raise ValueError(f"the last axis has stride {x.stride(-1)}; call .contiguous() on it")


def _rotate_and_write(address):
    a = i64_at(address)
    dim, value_dim, rotated, kv_heads = a[_DIM], a[_VALUE_DIM], a[_ROTATED], a[_KV_HEADS]
    item = 2 if a[_IS_BF16] != 0 else 4
    cos_is_bf16 = a[_COS_IS_BF16] != 0
    cos_item = 2 if cos_is_bf16 else 4
    cos, sin = np.empty(dim, np.float32), np.empty(dim, np.float32)
    before, after = np.empty(dim, np.float32), np.empty(dim, np.float32)
    while True:
        first = next_task(address) * ROWS
        if first >= a[_N_ROWS]:
            break
        for row in range(first, min(first + ROWS, a[_N_ROWS])):
            q = a[_Q] + row * a[_Q_ROW] * item
            k = a[_K] + row * a[_K_ROW] * item
            v = a[_V] + row * a[_V_ROW] * item
            if rotated > 0:
                angles = row * a[_COS_ROW] * cos_item
                load_row(cos, U(0), a[_COS] + angles, U(rotated), cos_is_bf16)
                load_row(sin, U(0), a[_SIN] + angles, U(rotated), cos_is_bf16)
                for head in range(a[_HEADS]):
                    _turn(q + head * a[_Q_HEAD] * item, address, cos, sin, before, after)
                for head in range(kv_heads):
                    _turn(k + head * a[_K_HEAD] * item, address, cos, sin, before, after)
            place = i64_at(a[_PLACES])[U(row)] * kv_heads
            for head in range(kv_heads):
                to_k = a[_K_CACHE] + (place + head) * dim * item
                to_v = a[_V_CACHE] + (place + head) * value_dim * item
                _copy(to_k, k + head * a[_K_HEAD] * item, dim * item)
                _copy(to_v, v + head * a[_V_HEAD] * item, value_dim * item)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _turn(place, address, cos, sin, before, after):
    """One head in place."""
    a = i64_at(address)
    rotated, is_bf16 = U(a[_ROTATED]), a[_IS_BF16] != 0
    half = rotated // U(2)
    load_row(before, U(0), place, rotated, is_bf16)
    for i in range(half):
        after[i] = before[i] * cos[i] - before[half + i] * sin[i]
        after[half + i] = before[half + i] * cos[half + i] + before[i] * sin[half + i]
    store_row(place, after, U(0), rotated, is_bf16)


@njit(inline="always", fastmath=FAST, error_model="numpy")
def _copy(target, source, n_bytes):
    to, of = u16_at(target), u16_at(source)
    for i in range(U(n_bytes // 2)):
        to[i] = of[i]
