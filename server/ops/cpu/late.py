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
from server.ops.cpu.codegen.add_piece import BITS
from server.ops.cpu.joined import NumbaTerms
from server.ops.joined import JoinedTerms, TermArrays
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


class LateTerms(JoinedTerms):
    """`JoinedTerms` of the kernel that `kernel_of` gives at each call, or of torch. Both are told
    all there is, the kernel's from its first call on.
    """

    def __init__(
        self, kernel_of: Callable[[], TermKernel | None], linear: LinearOp, n_outputs: int
    ) -> None:
        self._kernel_of, self._linear, self._n_outputs = kernel_of, linear, n_outputs
        self._torch = TorchTerms(linear)
        self._compiled: NumbaTerms | None = None
        self._told: list[JoinedTerms] = [self._torch]

    def takes(self, bits: int) -> bool:
        return bits in BITS

    def use(self, linear: LinearOp) -> None:
        self._linear = linear
        for terms in self._told:
            terms.use(linear)

    def put(self, key: Hashable, arrays: TermArrays, first: int) -> None:
        for terms in self._told:
            terms.put(key, arrays, first)

    def drop(self, key: Hashable) -> None:
        for terms in self._told:
            terms.drop(key)

    def show(self, key: Hashable, slot: int, place: int) -> None:
        for terms in self._told:
            terms.show(key, slot, place)

    def hide(self, key: Hashable, slot: int) -> None:
        for terms in self._told:
            terms.hide(key, slot)

    def product(self, x: Tensor, rows: RowMapping) -> Tensor:
        kernel = self._kernel_of()
        if kernel is None:
            return self._torch.product(x, rows)
        if self._compiled is None:
            self._compiled = NumbaTerms(kernel, self._linear, self._n_outputs)
            self._torch.tell(self._compiled)
            self._told.append(self._compiled)
        return self._compiled.product(x, rows)
