"""RMSNorm with a weight per row: variants in one batch have norms of their own.

Alone, or with the addition before it: decoder layers norm what they have just added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RmsForm:
    """Which of the usual forms a model's RMSNorm has.

    eps          added to the mean square
    offset       1 where the weight is stored as its difference from 1 (Gemma)
    casts_first  rounds to the compute dtype before multiplying by the weight (Llama), not after
    """

    eps: float
    offset: float
    casts_first: bool


def rms_norm(x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
    """``x / rms(x) * (weight + offset)`` over the last axis, in float32 (float64 where x is).

    x [..., n]; weights [C, n], rows chosen by index [R] int64 (the rows of x, flattened, are R
    equal runs) or the first for all. Returns x's shape and dtype.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(compute)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + form.eps)
    weight = weights[0] if index is None else weights[index]
    if index is not None:
        flat = normed.reshape(len(index), -1, x.shape[-1])
        weight = weight.unsqueeze(1)
        return _scaled(flat, weight, x.dtype, form).view(x.shape)
    return _scaled(normed, weight, x.dtype, form)


def add_rms_norm(
    x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
) -> tuple[Tensor, Tensor]:
    """``residual + x``, normed, and the sum itself: bit for bit the two operations one by one.

    x, residual [..., n] of one dtype; the rest as for `rms_norm`. Returns (normed, summed), both of
    that shape and dtype.
    Numerics: the sum is rounded to the dtype, as torch does, and the rounded sum is normed.
    """
    summed = residual + x
    return rms_norm(summed, weights, index, form), summed


def _scaled(normed: Tensor, weight: Tensor, dtype: torch.dtype, form: RmsForm) -> Tensor:
    if form.casts_first:
        return normed.to(dtype) * (weight + form.offset)
    return (normed * (weight.to(normed.dtype) + form.offset)).to(dtype)
