"""The base model's matrix products: ``y = x W^T + b`` with one fixed W."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class LinearOp(Protocol):
    """One weight ``[m, n]`` in whatever layout its product likes best.

    held_itemsize  bytes of a weight, if they are not those of the compute dtype
    """

    held_itemsize: int | None = None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, n]`` -> ``[T, m]`` in x's dtype; accumulates in float32."""
        ...

    def dense(self) -> Tensor:
        """The weight itself, ``[m, n]``; bit for bit what it was made of."""
        ...

    def dense_rows(self, start: int, end: int) -> Tensor:
        """The rows ``[start, end)`` of `dense`."""
        return self.dense()[start:end]


class TorchLinear(LinearOp):
    """The reference."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self._weight, bias)

    def dense(self) -> Tensor:
        return self._weight


class OneDnnLinear(LinearOp):
    """Weight in oneDNN's blocked layout: plain ones are reordered again for every product.

    At 8 to 32 rows that makes a product 1.3 to 2 times as fast (bfloat16, AVX-512).
    """

    def __init__(self, weight: Tensor) -> None:
        # The row count is only a hint; the layout it gives suits any.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y

    def dense(self) -> Tensor:
        weight: Tensor = self._packed.to_dense()
        return weight


def onednn_linear_works() -> bool:
    """Whether this torch and CPU have the packed bfloat16 product, tried on a small one."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight = torch.eye(16, dtype=torch.bfloat16)
        op = OneDnnLinear(weight)
        return torch.equal(op(weight), weight) and torch.equal(op.dense(), weight)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
