"""Products of a server that began before its kernels were compiled: they follow what there is.

So what holds such products, the slot arrays of deltas and the linears, knows nothing of a change of
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from server.ops.blockdiag import BlockDiagOp, TorchBlockDiag
from server.ops.cpu.blockdiag import NumbaBlockDiag, TermKernel
from server.ops.cpu.joined import NumbaTerms
from server.ops.joined import TermArrays
from server.ops.linear import LinearOp
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import RowMapping, SlotSegments
from server.ops.torch_terms import TorchTerms


class LateBlockDiag:
    """`BlockDiagOp` of the kernels that `kernels_of` gives at each call, or of torch."""

    def __init__(
        self, blocks: PackedBlocks, kernels_of: Callable[[], Mapping[torch.dtype, TermKernel]]
    ) -> None:
        self._blocks, self._kernels_of = blocks, kernels_of
        self._torch = TorchBlockDiag(blocks)
        self._compiled: NumbaBlockDiag | None = None

    @property
    def current(self) -> BlockDiagOp:
        """What computes it now."""
        kernels = self._kernels_of()
        if not kernels or not NumbaBlockDiag.takes(self._blocks):
            return self._torch
        if self._compiled is None:
            self._compiled = NumbaBlockDiag(kernels, self._blocks, self._torch)
        return self._compiled

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`."""
        self.current.add_(outputs, x, segments)


class LateTerms(TorchTerms):
    """`JoinedTerms` of the kernel that `kernel_of` gives at each call, or of torch."""

    def __init__(
        self, kernel_of: Callable[[], TermKernel | None], linear: LinearOp, n_outputs: int
    ) -> None:
        super().__init__(linear)
        self._kernel_of, self._n_outputs = kernel_of, n_outputs
        self._compiled: NumbaTerms | None = None

    def takes(self, bits: int) -> bool:
        return NumbaTerms.takes_bits(bits)

    def use(self, linear: LinearOp) -> None:
        super().use(linear)
        if self._compiled is not None:
            self._compiled.use(linear)

    def put(self, key: Hashable, arrays: TermArrays, first: int) -> None:
        super().put(key, arrays, first)
        if self._compiled is not None:
            self._compiled.put(key, arrays, first)

    def drop(self, key: Hashable) -> None:
        super().drop(key)
        if self._compiled is not None:
            self._compiled.drop(key)

    def show(self, key: Hashable, slot: int, place: int) -> None:
        super().show(key, slot, place)
        if self._compiled is not None:
            self._compiled.show(key, slot, place)

    def hide(self, key: Hashable, slot: int) -> None:
        super().hide(key, slot)
        if self._compiled is not None:
            self._compiled.hide(key, slot)

    def product(self, x: Tensor, rows: RowMapping) -> Tensor:
        kernel = self._kernel_of()
        if kernel is None:
            return super().product(x, rows)
        if self._compiled is None:
            self._compiled = NumbaTerms(kernel, self._linear, self._n_outputs)
            self.tell(self._compiled)
        return self._compiled.product(x, rows)
