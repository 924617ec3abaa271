"""Row-wise operations in one pass: RMSNorm with a weight per row (alone or after an addition), and
the gate of an MLP.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit
from torch import Tensor

from server.ops.cpu.codegen.intrinsics import (
    FAST_SUMS,
    exp_f32,
    f32_at,
    f64_at,
    from_bf16,
    i64_at,
    load_row,
    next_task,
    store_row,
    to_bf16,
    u16_at,
)
from server.ops.cpu.compile import compile_kernel
from server.ops.cpu.parallel import Parallel
from server.ops.norm import RmsForm

U = np.uint64
ROWS = 8  # rows of one task

(_X, _X_ROW, _OUT, _N_ROWS, _N, _IS_BF16, _WEIGHTS, _INDEX, _PER_INDEX) = range(1, 10)
(_EPS, _OFFSET, _CASTS_FIRST, _RESIDUAL, _SUMMED, _N_ARGUMENTS) = range(10, 16)
(_UP, _UP_ROW) = (_WEIGHTS, _INDEX)


class RowKernels:
    """The compiled kernels."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._norm = compile_kernel(_rms_norm, FAST_SUMS)
        self._gate = compile_kernel(_silu_mul, FAST_SUMS)

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        """See `server.ops.norm.rms_norm`."""
        x = x.contiguous()
        out = torch.empty_like(x)
        a = _norm_arguments(x, out, weights, index, form)
        self._parallel.run(self._norm, a, -(-a[_N_ROWS] // ROWS))
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        """See `server.ops.norm.add_rms_norm`. Subnormal sums in bfloat16 may become 0."""
        x, residual = x.contiguous(), residual.contiguous()
        out, summed = torch.empty_like(x), torch.empty_like(x)
        a = _norm_arguments(x, out, weights, index, form)
        a[_RESIDUAL], a[_SUMMED] = residual.data_ptr(), summed.data_ptr()
        self._parallel.run(self._norm, a, -(-a[_N_ROWS] // ROWS))
        return out, summed

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``, [T, n] each, rounded after each of the two as torch does."""
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        a = _arguments(gate, out)
        a[_X_ROW], a[_N_ROWS] = gate.stride(0), len(gate)
        a[_UP], a[_UP_ROW] = up.data_ptr(), up.stride(0)
        self._parallel.run(self._gate, a, -(-len(gate) // ROWS))
        return out


def _norm_arguments(
    x: Tensor, out: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
) -> np.ndarray:
    n = x.shape[-1]
    a = _arguments(x, out)
    a[_X_ROW], a[_N_ROWS] = n, x.numel() // n
    a[_WEIGHTS] = weights.data_ptr()
    if index is not None:
        a[_INDEX], a[_PER_INDEX] = index.data_ptr(), a[_N_ROWS] // len(index)
    a[_EPS : _OFFSET + 1] = _bits_of((form.eps, form.offset))
    a[_CASTS_FIRST] = form.casts_first
    return a


@functools.cache
def _bits_of(values: tuple[float, ...]) -> np.ndarray:
    """float64 as int64: a step asks for the same ones again and again."""
    return np.array(values).view(np.int64)


def _arguments(x: Tensor, out: Tensor) -> np.ndarray:
    a = np.zeros(_N_ARGUMENTS, np.int64)
    a[_X], a[_OUT] = x.data_ptr(), out.data_ptr()
    a[_N], a[_IS_BF16] = x.shape[-1], x.dtype is torch.bfloat16
    return a


def _rms_norm(address):
    a = i64_at(address)
    n, is_bf16 = a[_N], a[_IS_BF16] != 0
    item = 2 if is_bf16 else 4
    floats = f64_at(address + 8 * _EPS)
    eps, offset = np.float32(floats[U(0)]), np.float32(floats[U(1)])
    values, weights = np.empty(n, np.float32), np.empty(n, np.float32)
    while True:
        first = next_task(address) * ROWS
        if first >= a[_N_ROWS]:
            break
        for row in range(first, min(first + ROWS, a[_N_ROWS])):
            load_row(values, U(0), a[_X] + row * a[_X_ROW] * item, U(n), is_bf16)
            if a[_RESIDUAL] != 0:
                at = row * n * item
                _add(values, a[_RESIDUAL] + at, a[_SUMMED] + at, U(n), is_bf16)
            place = np.int64(0)
            if a[_INDEX] != 0:
                place = i64_at(a[_INDEX])[U(row // a[_PER_INDEX])]
            load_row(weights, U(0), a[_WEIGHTS] + place * n * item, U(n), is_bf16)
            squares = np.float32(0)
            for i in range(U(n)):
                squares += values[i] * values[i]
            inverse = np.float32(1) / np.sqrt(squares / np.float32(n) + eps)
            if is_bf16 and a[_CASTS_FIRST] != 0:
                for i in range(U(n)):
                    rounded = from_bf16(to_bf16(values[i] * inverse))
                    values[i] = rounded * (weights[i] + offset)
            else:
                for i in range(U(n)):
                    values[i] = values[i] * inverse * (weights[i] + offset)
            store_row(a[_OUT] + row * n * item, values, U(0), U(n), is_bf16)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _add(values, other, out, n, is_bf16):
    """Add the row at `other`, rounded; the sum also goes to `out`."""
    if is_bf16:
        halves = u16_at(other)
        for i in range(n):
            values[i] = from_bf16(halves[i]) + values[i]
    else:
        full = f32_at(other)
        for i in range(n):
            values[i] = full[i] + values[i]
    store_row(out, values, U(0), n, is_bf16)
    if is_bf16:
        load_row(values, U(0), out, n, is_bf16)


def _silu_mul(address):
    a = i64_at(address)
    n, is_bf16 = a[_N], a[_IS_BF16] != 0
    item = 2 if is_bf16 else 4
    gate, up = np.empty(n, np.float32), np.empty(n, np.float32)
    while True:
        first = next_task(address) * ROWS
        if first >= a[_N_ROWS]:
            break
        for row in range(first, min(first + ROWS, a[_N_ROWS])):
            load_row(gate, U(0), a[_X] + row * a[_X_ROW] * item, U(n), is_bf16)
            load_row(up, U(0), a[_UP] + row * a[_UP_ROW] * item, U(n), is_bf16)
            for i in range(U(n)):
                gate[i] = gate[i] / (np.float32(1) + exp_f32(-gate[i]))
            _times(gate, up, U(n), is_bf16)
            store_row(a[_OUT] + row * n * item, gate, U(0), U(n), is_bf16)


@njit(inline="always", fastmath=FAST_SUMS, error_model="numpy")
def _times(gate, up, n, is_bf16):
    if is_bf16:
        for i in range(n):
            gate[i] = from_bf16(to_bf16(gate[i])) * up[i]
    else:
        for i in range(n):
            gate[i] = gate[i] * up[i]
