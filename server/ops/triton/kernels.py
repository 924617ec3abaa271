"""`server.ops.kernels.Kernels` for a GPU; no default until it has been measured on one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.ops.delta import BlockDiagOp
from server.ops.kernels import TorchKernels
from server.ops.linear import LinearOp, TorchLinear
from server.ops.packed import PackedBlocks
from server.ops.quantize import QuantizedWeight, quantize_int8
from server.ops.rows import SlotSegments
from server.ops.triton.blockdiag import (
    DECODE_ROWS,
    PREFILL_ROWS,
    blockdiag_add_,
    plan_kernel,
)
from server.ops.triton.layout import from_table
from server.ops.triton.linear import linear_


class TritonBlockDiag:
    """`server.ops.delta.BlockDiagOp` for one set of slot arrays."""

    def __init__(self, blocks: PackedBlocks) -> None:
        self._blocks = blocks
        self._decode = plan_kernel(blocks)
        self._prefill = plan_kernel(blocks, prefill=True)
        # The engine's table names only slots that hold these matrices.
        self._present = torch.ones(len(blocks.codes), dtype=torch.int32, device=blocks.codes.device)

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`."""
        prefill = segments.longest > DECODE_ROWS
        where = from_table(segments, PREFILL_ROWS if prefill else DECODE_ROWS)
        kernel = self._prefill if prefill else self._decode
        blockdiag_add_(outputs, x, where, self._blocks, kernel, self._present)


class TritonInt8Linear:
    """Weight-only int8 base linear: half the bytes of a decode step, see `server.ops.quantize`."""

    def __init__(self, weight: Tensor) -> None:
        self._weight: QuantizedWeight = quantize_int8(weight)
        self._dtype = weight.dtype

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, n]`` -> ``[T, m]``."""
        y = torch.empty(len(x), len(self._weight.values), dtype=x.dtype, device=x.device)
        linear_(y, x, self._weight)
        return y if bias is None else y.add_(bias)

    def dense(self) -> Tensor:
        """The quantised weight in the compute dtype: not bit for bit what it was made of."""
        return self._weight.dense(self._dtype)


class TritonKernels(TorchKernels):
    """Deltas in Triton; the base's products in cuBLAS, or int8 in Triton; the rest in torch."""

    def __init__(self, *, int8_base: bool = False) -> None:
        self._int8_base = int8_base
        self.name = "triton, int8 base" if int8_base else "triton"

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        return TritonBlockDiag(blocks)

    def linear(self, weight: Tensor) -> LinearOp:
        return TritonInt8Linear(weight) if self._int8_base else TorchLinear(weight)
