"""All CPU kernels, compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from server.ops.cpu.blockdiag import BlockDiagKernel, NumbaBlockDiag
from server.ops.cpu.parallel import Parallel
from server.ops.delta import BlockDiagOp
from server.ops.linear import LinearOp, OneDnnLinear, TorchLinear, onednn_linear_works
from server.ops.packed import PackedBlocks


class NumbaKernels:
    """`server.ops.kernels.Kernels` by numba, on torch's threads. Takes seconds to compile once."""

    name = "numba"

    def __init__(self) -> None:
        self.parallel = Parallel()
        self._blockdiag = BlockDiagKernel(self.parallel)
        self._packs_bf16 = onednn_linear_works()

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        return NumbaBlockDiag(self._blockdiag, blocks)

    def linear(self, weight: Tensor) -> LinearOp:
        packs = self._packs_bf16 and weight.dtype is torch.bfloat16
        return OneDnnLinear(weight) if packs else TorchLinear(weight)
