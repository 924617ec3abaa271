"""Weight-only linear with one scale per output: int8, or float8 where the device has it.

The torch reference is `server.ops.quantize.linear_reference`.

Numerics: weights become x's dtype exactly (int8 in bfloat16: 8 significant bits; float8 too),
products in float32, one scale per output at the end, one rounding.
Bytes per step: the weights once, ``m n``, plus ``4 m`` of scales.
Tensor parallelism: column-parallel: rows with their scales; row-parallel: columns, every rank with
all scales.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from server.ops.quantize import QuantizedWeight
from server.ops.triton.compat import UPCAST, is_wide, launch, mac

TILE_OUTPUTS = 64
TILE_INPUTS, WIDE_INPUTS = 128, 32  # of x in 16 and in 32 bits
SMALL_ROWS, LARGE_ROWS = 16, 64


def linear_(y: Tensor, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``y = x @ W^T``: y [T, m], x [T, n] of one dtype, rows contiguous. Returns y."""
    rows = len(x)
    m, n = weight.values.shape
    small = rows <= SMALL_ROWS or is_wide(x.dtype)
    tile_rows = SMALL_ROWS if small else LARGE_ROWS
    launch(
        _linear_kernel,
        (triton.cdiv(m, TILE_OUTPUTS), triton.cdiv(rows, tile_rows)),
        y, x, weight.values, weight.scales, rows, m, n, y.stride(0), x.stride(0),
        TILE_T=tile_rows,
        TILE_M=TILE_OUTPUTS,
        TILE_K=WIDE_INPUTS if is_wide(x.dtype) else TILE_INPUTS,
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=4,
    )  # fmt: skip
    return y


@triton.jit
def _linear_kernel(
    y, x, values, scales, rows, m, n, y_stride, x_stride,
    TILE_T: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    token = tl.program_id(1) * TILE_T + tl.arange(0, TILE_T)
    out_mask = out < m
    row_mask = token < rows
    x_rows = x + token[:, None].to(tl.int64) * x_stride
    w_rows = values + out[None, :].to(tl.int64) * n
    acc = tl.zeros((TILE_T, TILE_M), tl.float32)
    for j in range(0, n, TILE_K):
        k = j + tl.arange(0, TILE_K)
        inside = k < n
        xs = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_rows + k[:, None], mask=inside[:, None] & out_mask[None, :], other=0.0)
        if values.dtype.element_ty == tl.float8e4nv:
            w = w.to(tl.float32)  # Triton 3.6 cannot make bfloat16 of it on sm_89
        acc = mac(acc, xs, w.to(xs.dtype), UPCAST)
    scale = tl.load(scales + out, mask=out_mask, other=0.0)
    mask = row_mask[:, None] & out_mask[None, :]
    place = y + token[:, None].to(tl.int64) * y_stride + out[None, :]
    tl.store(place, (acc * scale[None, :]).to(y.dtype.element_ty), mask=mask)
