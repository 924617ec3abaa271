"""The operations that have a fast form on some devices, behind one interface.

`TorchKernels` is the reference that runs everywhere; `server.ops.cpu` and `server.ops.triton` hold
compiled ones, `server.ops.choose` says which a device gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from server.ops import attend, attention, factors
from server.ops.attention import AttentionCall, AttentionKernels
from server.ops.blockdiag import BlockDiagOp, TorchBlockDiag, blockdiag_rows_add_
from server.ops.factors import ImpartFactors, LowRankFactors
from server.ops.joined import JoinedTerms
from server.ops.linear import LinearOp, TorchLinear
from server.ops.lowrank import HeldLowRank, packed_lowrank_add_
from server.ops.norm import RmsForm, add_rms_norm, rms_norm
from server.ops.packed import PackedBlocks
from server.ops.quantize import QuantizedWeight, TorchQuantizedLinear
from server.ops.row_mapping import RowMapping

# When kernels are compiled that never were on this kind of machine: before serving, beside it, or
# not at all.
CompileKernels = Literal["wait", "background", "never"]
# "compiling": torch does the work of kernels that may come yet; "uncompiled": it does all of it.
KernelState = Literal["compiled", "compiling", "uncompiled"]


class Kernels(AttentionKernels, Protocol):
    """See the functions of the same names in `server.ops` for shapes and numerics."""

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> KernelState: ...

    def compiled(self) -> Kernels:
        """What these are to `adopt`, if they are "compiling"; may be called beside steps."""
        ...

    def adopt(self, other: Kernels) -> Kernels:
        """Compute as `other` does from now on; return what undoes that. Between steps.

        A `LinearOp` stays as it was made: its weights lie as that product wants them.
        """
        ...

    def settle(self) -> None:
        """Wait for no other kernels any more: these it is."""
        ...

    def takes_data(self, device: torch.device) -> bool:
        """Whether a step can run on `StaticRowMapping`: nothing asks the device for its rows."""
        ...

    def on_compiled(self, call: Callable[[], None]) -> None:
        """Have `call` called after every kernel that is compiled while serving."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """For a thread beside the steps': what it calls meanwhile takes no threads of theirs."""
        ...

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp: ...

    def blockdiag_rows_add_(
        self, y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks
    ) -> None: ...

    def lowrank_add_(
        self,
        outputs: Sequence[Tensor],
        x: Tensor,
        rows: RowMapping,
        terms: Sequence[LowRankFactors],
    ) -> None: ...

    def packed_lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[HeldLowRank]
    ) -> None:
        """Of one number of bits."""
        ...

    def impart_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[ImpartFactors]
    ) -> None: ...

    def linear(self, weight: Tensor) -> LinearOp: ...

    def joined_terms(
        self, linear: LinearOp, n_outputs: int, dtype: torch.dtype
    ) -> JoinedTerms | None:
        """What adds every variant's terms within this product of x in `dtype`; None if each set of
        arrays is a call of its own.
        """
        ...

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype) -> LinearOp:
        """Of an 8-bit base weight; `dtype` is the compute dtype."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        """(normed, summed): the same bits as ``residual + x`` and then `rms_norm`."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``: [T, n] each, rows may be strided -> [T, n]."""
        ...


class TorchKernels:
    """Plain torch."""

    name = "torch"
    state: KernelState = "uncompiled"

    def compiled(self) -> Self:
        return self

    def adopt(self, other: Kernels) -> Kernels:
        assert other is self, "torch has no other form"
        return self

    def settle(self) -> None: ...

    def takes_data(self, device: torch.device) -> bool:
        return device.type == "cpu"  # on a GPU it would have to wait for the segments

    def on_compiled(self, call: Callable[[], None]) -> None: ...

    def alone(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        return TorchBlockDiag(blocks)

    def blockdiag_rows_add_(
        self, y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks
    ) -> None:
        blockdiag_rows_add_(y, ids, places, blocks)

    def lowrank_add_(
        self,
        outputs: Sequence[Tensor],
        x: Tensor,
        rows: RowMapping,
        terms: Sequence[LowRankFactors],
    ) -> None:
        factors.lowrank_add_(outputs, x, rows, terms)

    def packed_lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[HeldLowRank]
    ) -> None:
        packed_lowrank_add_(outputs, x, rows, terms)

    def impart_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[ImpartFactors]
    ) -> None:
        factors.impart_add_(outputs, x, rows, terms)

    def linear(self, weight: Tensor) -> LinearOp:
        return TorchLinear(weight)

    def joined_terms(
        self, linear: LinearOp, n_outputs: int, dtype: torch.dtype
    ) -> JoinedTerms | None:
        return None

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype) -> LinearOp:
        return TorchQuantizedLinear(weight, dtype)

    def rotate_and_write_(self, call: AttentionCall) -> None:
        attention.rotate_and_write_(call)

    def decode_(self, out: Tensor, call: AttentionCall) -> None:
        attend.decode_(out, call)

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        return False

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        attend.prefill_(out, call)

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        return rms_norm(x, weights, index, form)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weights, index, form)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up
