"""All CPU kernels, compiled; torch in the place of those that this machine cannot run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from server.ops.attention import AttentionCall
from server.ops.blockdiag import BlockDiagOp
from server.ops.cpu.attention import AttentionKernel
from server.ops.cpu.blockdiag import NumbaBlockDiag, TermKernel
from server.ops.cpu.blockdiag_rows import EmbeddingKernel
from server.ops.cpu.check import passed_kernels, untried_kernels, usable_kernels
from server.ops.cpu.features import host_target
from server.ops.cpu.joined import NumbaTerms
from server.ops.cpu.late import LateBlockDiag, LateTerms
from server.ops.cpu.linear import LinearKernel, PanelLinear
from server.ops.cpu.norm import RowKernels
from server.ops.cpu.parallel import Parallel
from server.ops.cpu.prefill import PrefillKernel
from server.ops.cpu.rope import RotaryKernel
from server.ops.cpu.widened import WidenedKernel, WidenedLinear
from server.ops.factors import ImpartFactors, LowRankFactors
from server.ops.joined import JoinedTerms
from server.ops.kernels import CompileKernels, Kernels, KernelState, TorchKernels
from server.ops.linear import LinearOp, OneDnnLinear, onednn_linear_works
from server.ops.lowrank import HeldLowRank
from server.ops.norm import RmsForm
from server.ops.packed import PackedBlocks
from server.ops.quantize import QuantizedWeight
from server.ops.row_mapping import RowMapping

log = logging.getLogger(__name__)
T = TypeVar("T")


def numba_kernels(when: CompileKernels) -> NumbaKernels:
    """The kernels of this machine, compiled as `when` says where that was never done."""
    untried = untried_kernels()
    if when == "wait" or not untried:
        return NumbaKernels()
    kernels = NumbaKernels(passed_kernels(), awaited=when == "background")
    if when == "never":
        log.warning(
            "%d CPU kernels were never compiled for %s: torch does their work, slower; "
            "`impart-serve compile` compiles them",
            len(untried),
            host_target(),
        )
    return kernels


class NumbaKernels:
    """`server.ops.kernels.Kernels` by numba, on torch's threads. Takes seconds to compile once.

    With `awaited` it begins with the kernels that there are, and another one's are adopted later.
    """

    name = "numba"

    def takes_data(self, device: torch.device) -> bool:
        return False

    def on_compiled(self, call: Callable[[], None]) -> None: ...  # all are, by `__init__`

    def alone(self) -> AbstractContextManager[None]:
        return self.parallel.alone()

    def __init__(
        self,
        usable: Collection[str] | None = None,
        *,
        awaited: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        """usable: the kernels to use, of `check.NAMES`. Default: those that pass their trial."""
        names = usable_kernels() if usable is None else usable
        self._awaited = awaited
        self._late = awaited  # whether what is made of these kernels has to follow `adopt`

        def made(name: str, make: Callable[[Parallel], T]) -> T | None:
            return make(self.parallel) if name in names else None

        self.in_use = frozenset(names)
        self.parallel = parallel or Parallel()
        self._torch = TorchKernels()
        self._embedding = made("embedding", EmbeddingKernel)
        self._attention = made("attention", AttentionKernel)
        self._prefill = made("prefill", PrefillKernel)
        self._rotary = made("rotary", RotaryKernel)
        self._rows = made("rows", RowKernels)
        linear, widened = made("linear", LinearKernel), made("widened", WidenedKernel)
        self._packs_bf16 = onednn_linear_works()
        # Deltas are added by these on any CPU, the base's products are theirs where it pays.
        of_terms: dict[torch.dtype, TermKernel | None]
        of_terms = {torch.bfloat16: linear, torch.float32: widened}
        self._terms = {dtype: kernel for dtype, kernel in of_terms.items() if kernel is not None}
        target = host_target()
        self._panels = linear if LinearKernel.pays_on(target) else None
        self._widening = widened if WidenedKernel.pays_on(target) else None

    def joined_terms(
        self, linear: LinearOp, n_outputs: int, dtype: torch.dtype
    ) -> JoinedTerms | None:
        if self._late:
            return LateTerms(lambda: self._terms.get(dtype), linear, n_outputs)
        kernel = self._terms.get(dtype)
        return None if kernel is None else NumbaTerms(kernel, linear, n_outputs)

    @property
    def state(self) -> KernelState:
        if self._awaited:
            return "compiling"
        return "compiled" if self.in_use else "uncompiled"

    def compiled(self) -> NumbaKernels:
        """See `Kernels`. Compilation and trials are in child processes, and take up to minutes."""
        return NumbaKernels(usable_kernels(), parallel=self.parallel)

    def adopt(self, other: Kernels) -> NumbaKernels:
        """See `Kernels`."""
        assert isinstance(other, NumbaKernels)
        former = copy.copy(self)
        vars(self).update(vars(other), _late=self._late, _awaited=self._awaited)
        return former

    def settle(self) -> None:
        """See `Kernels`."""
        self._awaited = False

    def blockdiag(self, blocks: PackedBlocks) -> BlockDiagOp:
        if self._late:
            return LateBlockDiag(blocks, lambda: self._terms)
        reference = self._torch.blockdiag(blocks)
        takes = self._terms and NumbaBlockDiag.takes(blocks)
        return NumbaBlockDiag(self._terms, blocks, reference) if takes else reference

    def blockdiag_rows_add_(
        self, y: Tensor, ids: Tensor, places: Tensor, blocks: PackedBlocks
    ) -> None:
        if self._embedding is None:
            self._torch.blockdiag_rows_add_(y, ids, places, blocks)
        else:
            self._embedding.add_(y, ids, places, blocks)

    def lowrank_add_(
        self,
        outputs: Sequence[Tensor],
        x: Tensor,
        rows: RowMapping,
        terms: Sequence[LowRankFactors],
    ) -> None:
        self._torch.lowrank_add_(outputs, x, rows, terms)

    def packed_lowrank_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[HeldLowRank]
    ) -> None:
        self._torch.packed_lowrank_add_(outputs, x, rows, terms)

    def impart_add_(
        self, outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[ImpartFactors]
    ) -> None:
        self._torch.impart_add_(outputs, x, rows, terms)

    def linear(self, weight: Tensor) -> LinearOp:
        if self._panels is not None and self._panels.takes(weight):
            return PanelLinear(self._panels, weight)
        if self._widening is not None and self._widening.takes(weight):
            return WidenedLinear(self._widening, weight)
        packs = self._packs_bf16 and weight.dtype is torch.bfloat16
        return OneDnnLinear(weight) if packs else self._torch.linear(weight)

    def quantized_linear(self, weight: QuantizedWeight, dtype: torch.dtype) -> LinearOp:
        return self._torch.quantized_linear(weight, dtype)

    def rotate_and_write_(self, call: AttentionCall) -> None:
        (self._rotary or self._torch).rotate_and_write_(call)

    def decode_(self, out: Tensor, call: AttentionCall) -> None:
        (self._attention or self._torch).decode_(out, call)

    def rotate_and_decode_(self, out: Tensor, call: AttentionCall) -> bool:
        return False

    def prefill_(self, out: Tensor, call: AttentionCall) -> None:
        kernel = self._prefill
        if kernel is not None and kernel.takes(call):
            kernel.prefill_(out, call)
        else:
            self._torch.prefill_(out, call)

    def rms_norm(self, x: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm) -> Tensor:
        return (self._rows or self._torch).rms_norm(x, weights, index, form)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weights: Tensor, index: Tensor | None, form: RmsForm
    ) -> tuple[Tensor, Tensor]:
        return (self._rows or self._torch).add_rms_norm(x, residual, weights, index, form)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return (self._rows or self._torch).silu_mul(gate, up)
