"""Products of a server that began before its kernels were compiled: they follow what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from server.ops.blockdiag import BlockDiagOp, TorchBlockDiag
from server.ops.cpu.blockdiag import BlockDiagKernel, NumbaBlockDiag
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import SlotSegments


class LateBlockDiag:
    """`BlockDiagOp` of the kernel that `kernel_of` gives at each call, or of torch.

    So what holds such products, the slot arrays of deltas, knows nothing of a change of kernels.
    """

    def __init__(
        self, blocks: PackedBlocks, kernel_of: Callable[[], BlockDiagKernel | None]
    ) -> None:
        self._blocks, self._kernel_of = blocks, kernel_of
        self._torch = TorchBlockDiag(blocks)
        self._compiled: NumbaBlockDiag | None = None

    @property
    def current(self) -> BlockDiagOp:
        """What computes it now."""
        kernel = self._kernel_of()
        if kernel is None:
            return self._torch
        if self._compiled is None:
            self._compiled = NumbaBlockDiag(kernel, self._blocks)
        return self._compiled

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, segments: SlotSegments) -> None:
        """See `BlockDiagOp`."""
        self.current.add_(outputs, x, segments)
