"""RMSNorm with a weight per row, alone or after an addition, and SiLU times up: one pass each.

A step's rows may belong to variants with their own norm weights: `vectors` holds the base's weight
in row 0 and slot c's in row c + 1, `index` says which one each token uses. Elementwise on rows:
under tensor parallelism both run unchanged on whatever columns a rank holds (the norm on all).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.ops.triton.compat import launch, next_power_of_two

SILU_TILE = 1024


def rms_norm(
    x: Tensor, vectors: Tensor, index: Tensor, eps: float, *, offset: float = 0.0
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (vectors[index] + offset)`` along the last axis.

    x [T, n] or [T, H, n] (a norm per head), last axis contiguous; vectors [1 + C, n]; index [T]
    integer, 0 for the base; offset 1 for Gemma's form.
    Numerics: float32; offset 0 rounds the normalised value to x's dtype before the weight is
    applied, as Llama's definition does, offset 1 does not, as Gemma's. Returns x's shape and dtype.
    Bytes: x twice, plus the weights of the variants present.
    """
    return _norm(x, None, vectors, index, eps, offset)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, vectors: Tensor, index: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(`rms_norm` of ``residual + x``, that sum): the sum is rounded to the dtype first.

    x, residual [T, n] or [T, H, n] of one dtype, last axis contiguous; the rest as there.
    Numerics: the bits that the addition in torch and `rms_norm` would give.
    Bytes: two rows read and two written, plus the weights of the variants present.
    """
    return _norm(x, residual, vectors, index, eps, offset)


def _norm(
    x: Tensor, residual: Tensor | None, vectors: Tensor, index: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Normed, and what was normed."""
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    other = rows if residual is None else residual.reshape(-1, n)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(out)
    heads = len(rows) // max(1, len(x))
    launch(
        _rms_norm_kernel,
        (len(rows),),
        out, summed, rows, other, vectors, index, heads, n,
        rows.stride(0), other.stride(0), vectors.stride(0), eps, offset,
        ADD=residual is not None,
        ROUND=offset == 0.0,
        TILE=next_power_of_two(n),
        num_warps=4 if n > 256 else 1,
    )  # fmt: skip
    return out, summed


@triton.jit
def _rms_norm_kernel(
    out, summed, x, residual, vectors, index, heads, n,
    x_stride, residual_stride, vector_stride, eps, offset,
    ADD: tl.constexpr, ROUND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    mask = column < n
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if ADD:
        before = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        values = (before.to(tl.float32) + values.to(tl.float32)).to(values.dtype)
        tl.store(summed + row * n + column, values, mask=mask)
    wide = values.to(tl.float32)
    normal = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / n + eps)
    if ROUND:
        normal = normal.to(values.dtype).to(tl.float32)
    which = tl.load(index + row // heads).to(tl.int64)
    weight = tl.load(vectors + which * vector_stride + column, mask=mask, other=0.0)
    result = normal * (weight.to(tl.float32) + offset)
    tl.store(out + row * n + column, result.to(values.dtype), mask=mask)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: [T, I] each, last axis contiguous, may be slices of one fused tensor.

    Returns [T, I] in their dtype. Numerics: silu in float32, rounded to the dtype, then the product
    rounded, as in torch. Bytes: 3 I elements a row.
    """
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    launch(
        _silu_mul_kernel,
        (rows, triton.cdiv(width, SILU_TILE)),
        out, gate, up, width, gate.stride(0), up.stride(0),
        TILE=SILU_TILE,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _silu_mul_kernel(out, gate, up, width, gate_stride, up_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < width
    gates = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0)
    ups = tl.load(up + row * up_stride + column, mask=mask, other=0.0)
    wide = gates.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gates.dtype).to(tl.float32)
    tl.store(out + row * width + column, (silu * ups.to(tl.float32)).to(gates.dtype), mask=mask)
