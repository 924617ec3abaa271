"""All CPU kernels, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.ops import factors
from server.ops.attention import AttentionCall, prefill_
from server.ops.blockdiag import BlockDiagOp
from server.ops.cpu.attention import AttentionKernel
from server.ops.cpu.blockdiag import BlockDiagKernel, NumbaBlockDiag
from server.ops.cpu.blockdiag_rows import EmbeddingKernel
from server.ops.cpu.linear import LinearKernel, PanelLinear
from server.ops.cpu.norm import RowKernels
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.prefill import PrefillKernel
from server.ops.cpu.rope import RotaryKernel
from server.ops.factors import ImpartFactors, LowRankFactors
from server.ops.linear import LinearOp, OneDnnLinear, TorchLinear, onednn_linear_works
from server.ops.lowrank import HeldLowRank, packed_lowrank_add_
from server.ops.norm import RmsForm
from server.ops.packed import PackedBlocks
from server.ops.quantize import QuantizedWeight, TorchQuantizedLinear
from server.ops.row_plan import RowPlan


class NumbaKernels:
    """`server.ops.kernels.Kernels` by numba, on torch's threads. Takes seconds to compile once."""

    name = "numba"

    def takes_data(self, device: torch.device) -> bool:
        return False

    def on_compiled(self, call: Callable[[], None]) -> None: ...  # all are, by `__init__`

    def __init__(self) -> None:
        self.parallel = Parallel()
        self._blockdiag = BlockDiagKernel(self.parallel)
        self._embedding = EmbeddingKernel(self.parallel)
        self._attention = AttentionKernel(self.parallel)
        self._prefill = PrefillKernel(self.parallel)
        self._rotary = RotaryKernel(self.parallel)
        self._rows = RowKernels(self.parallel)
        self._linear = LinearKernel(self.parallel)
        self._packs_bf16 = onednn_linear_works()

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        return NumbaBlockDiag(self._blockdiag, blocks)

    def blockdiag_rows_add_(
        self, y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks
    ) -> None:
        self._embedding.add_(y, ids, places, blocks)

    def lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowPlan, terms: Sequence[LowRankFactors]
    ) -> None:
        factors.lowrank_add_(outputs, x, rows, terms)

    def packed_lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowPlan, terms: Sequence[HeldLowRank]
    ) -> None:
        packed_lowrank_add_(outputs, x, rows, terms)

    def impart_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowPlan, terms: Sequence[ImpartFactors]
    ) -> None:
        factors.impart_add_(outputs, x, rows, terms)

    def linear(self, weight: Tensor) -> LinearOp:
        if self._linear.takes(weight):
            return PanelLinear(self._linear, weight)
        packs = self._packs_bf16 and weight.dtype is torch.bfloat16
        return OneDnnLinear(weight) if packs else TorchLinear(weight)

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype) -> LinearOp:
        return TorchQuantizedLinear(weight, dtype)

    def rotate_and_write_(self, call: AttentionCall) -> None:
        self._rotary.rotate_and_write_(call)

    def decode_(self, out: Tensor, call: AttentionCall) -> None:
        self._attention.decode_(out, call)

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        return False

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        if self._prefill.takes(call):
            self._prefill.prefill_(out, call)
        else:
            prefill_(out, call)

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        return self._rows.rms_norm(x, weights, index, form)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        return self._rows.add_rms_norm(x, residual, weights, index, form)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._rows.silu_mul(gate, up)
