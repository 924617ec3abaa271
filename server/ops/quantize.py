"""8-bit weights for the base: one scale per output, weights only.

Decode reads every weight once per step, so halving the weights' bytes nearly halves the step; a
card of 24 GB then holds an 8B base beside its deltas. Deltas are untouched by this: they were
made against the unquantised base and are added to ``x Q(W)^T`` as to ``x W^T``; what is lost is
the base's own rounding, the same for every variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from server.ops.linear import LinearOp

BaseQuant = Literal["int8", "float8"]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """``W ~ values * scales[:, None]``: values int8 or float8_e4m3fn [m, n], scales float32 [m].

    Tensor parallelism: outputs split: rows with their scales; inputs split: columns, all scales.
    """

    values: Tensor
    scales: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[m, n]`` in `dtype`."""
        return (self.values.float() * self.scales.unsqueeze(1)).to(dtype)


def has_float8(device: torch.device) -> bool:
    """Whether kernels there can read float8_e4m3fn: from compute capability 8.9 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def quantize(weight: Tensor, kind: BaseQuant) -> QuantizedWeight:
    """`weight [m, n]` in 8 bits of either kind."""
    return quantize_int8(weight) if kind == "int8" else quantize_float8(weight)


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


def linear_reference(
    x: Tensor, weight: QuantizedWeight, compute: torch.dtype = torch.float32
) -> Tensor:
    """The same in torch: ``[T, m]`` in `compute`."""
    return x.to(compute) @ (weight.values.to(compute) * weight.scales.to(compute).unsqueeze(1)).T


class TorchQuantizedLinear(LinearOp):
    """`server.ops.linear.LinearOp` over an 8-bit weight: the reference, converts it each time.

    Values are exact in x's dtype; the product is rounded once before and once after the scale.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self._weight, self._dtype = weight, dtype

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product = F.linear(x, self._weight.values.to(x.dtype))
        y = (product.float() * self._weight.scales).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dense(self) -> Tensor:
        """What is multiplied by, ``[m, n]``: not what it was made of."""
        return self._weight.dense(self._dtype)
