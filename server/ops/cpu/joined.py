"""`server.ops.joined.JoinedTerms` by the compiled products."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from server.ops.cpu.blockdiag import TermKernel
from server.ops.cpu.codegen.add_piece import BITS
from server.ops.cpu.linear import PanelLinear
from server.ops.cpu.widened import WidenedLinear
from server.ops.joined import JoinedTerms, TermArrays
from server.ops.linear import LinearOp
from server.ops.row_mapping import RowMapping


class NumbaTerms(JoinedTerms):
    """Terms are added before the product's one rounding where the base's product is the kernel's
    own, else to what the base's gave.
    """

    def __init__(self, kernel: TermKernel, linear: LinearOp, n_outputs: int) -> None:
        self._kernel = kernel
        self._table = kernel.new_table(n_outputs)
        self.use(linear)

    def takes(self, bits: int) -> bool:
        return bits in BITS

    def use(self, linear: LinearOp) -> None:
        self._linear = linear
        self._joining = linear if isinstance(linear, PanelLinear | WidenedLinear) else None

    def put(self, key: Hashable, arrays: TermArrays, first: int) -> None:
        self._table.put(key, arrays, first)

    def drop(self, key: Hashable) -> None:
        self._table.drop(key)

    def show(self, key: Hashable, slot: int, place: int) -> None:
        self._table.show(key, slot, place)

    def hide(self, key: Hashable, slot: int) -> None:
        self._table.hide(key, slot)

    def product(self, x: Tensor, rows: RowMapping) -> Tensor:
        call = self._table.call(rows)
        if call is None:
            return self._linear(x)
        if self._joining is not None:
            return self._joining.with_terms(x, call)
        y = self._linear(x)
        self._kernel.add_(y, x if x.stride(1) == 1 else x.contiguous(), call)
        return y
