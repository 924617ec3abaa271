"""Weight-only linear with one scale per output: int8, or float8 where the device has it.

Decode reads every weight once per step, so halving the weights' bytes nearly halves the step; a
card of 24 GB then holds an 8B base beside its deltas. Deltas are untouched by this: they were
made against the unquantised base and are added to ``x Q(W)^T`` as to ``x W^T``; what is lost is
the base's own rounding, the same for every variant.

Numerics: weights become x's dtype exactly (int8 in bfloat16: 8 significant bits; float8 too),
products in float32, one scale per output at the end, one rounding.
Bytes per step: the weights once, ``m n``, plus ``4 m`` of scales.
Tensor parallelism: column-parallel: rows with their scales; row-parallel: columns, every rank with
all scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.triton.compat import UPCAST, launch, mac

TILE_OUTPUTS = 64
TILE_INPUTS = 128
SMALL_ROWS, LARGE_ROWS = 16, 64


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """``W ~ values * scales[:, None]``: values int8 or float8_e4m3fn [m, n], scales float32 [m]."""

    values: Tensor
    scales: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[m, n]`` in `dtype`."""
        return (self.values.float() * self.scales.unsqueeze(1)).to(dtype)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """Round to nearest, symmetric, one scale per output: ``max |w| / 127``. weight [m, n]."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127.0
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (wide / safe.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(values, scales)


def quantize_float8(weight: Tensor) -> QuantizedWeight:
    """float8_e4m3fn with one scale per output that maps ``max |w|`` to its largest number, 448."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return QuantizedWeight((wide / safe.unsqueeze(1)).to(torch.float8_e4m3fn), scales)


def linear_(y: Tensor, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``y = x @ W^T``: y [T, m], x [T, n] of one dtype, rows contiguous. Returns y."""
    rows = len(x)
    m, n = weight.values.shape
    tile_rows = SMALL_ROWS if rows <= SMALL_ROWS else LARGE_ROWS
    launch(
        _linear_kernel,
        (triton.cdiv(m, TILE_OUTPUTS), triton.cdiv(rows, tile_rows)),
        *(y, x, weight.values, weight.scales, rows, m, n, y.stride(0), x.stride(0)),
        TILE_T=tile_rows,
        TILE_M=TILE_OUTPUTS,
        TILE_K=TILE_INPUTS,
        UPCAST=UPCAST,
        num_warps=4,
        num_stages=4,
    )
    return y


def linear_reference(
    x: Tensor, weight: QuantizedWeight, compute: torch.dtype = torch.float32
) -> Tensor:
    """The same in torch: ``[T, m]`` in `compute`."""
    return x.to(compute) @ (weight.values.to(compute) * weight.scales.to(compute).unsqueeze(1)).T


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
        w = tl.load(w_rows + k[:, None], mask=inside[:, None] & out_mask[None, :], other=0)
        acc = mac(acc, xs, w.to(xs.dtype), UPCAST)
    scale = tl.load(scales + out, mask=out_mask, other=0.0)
    mask = row_mask[:, None] & out_mask[None, :]
    place = y + token[:, None].to(tl.int64) * y_stride + out[None, :]
    tl.store(place, (acc * scale[None, :]).to(y.dtype.element_ty), mask=mask)
