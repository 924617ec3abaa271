"""One product for the terms of everything resident: settings are data, not calls.

A linear (or several that read one x) adds the terms of all variants in the batch within its own
product: blocks of any number and bits, heads of any rank, rows. A device whose kernels do so hands
out a `JoinedTerms`; elsewhere every set of arrays is a call of its own.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol

from torch import Tensor

from server.ops.linear import LinearOp
from server.ops.lowrank import PackedLowRank
from server.ops.packed import PackedBlocks, PackedRows
from server.ops.row_mapping import RowMapping

TermArrays = PackedBlocks | PackedLowRank | PackedRows


class JoinedTerms(Protocol):
    """Of one product. Engine thread only, between steps."""

    def takes(self, bits: int) -> bool:
        """Whether terms with codes of so many bits can be joined."""
        ...

    def use(self, linear: LinearOp) -> None:
        """Add to this product from the next step on; it has the same weights."""
        ...

    def put(self, key: Hashable, arrays: TermArrays, first: int) -> None:
        """These arrays are what `key` stands for from now on: terms of the outputs from `first`."""
        ...

    def drop(self, key: Hashable) -> None:
        """Nothing is left of what `key` stood for; no slot is shown there."""
        ...

    def show(self, key: Hashable, slot: int, place: int) -> None:
        """Rows of `slot` get the terms at `place` of the arrays from now on."""
        ...

    def hide(self, key: Hashable, slot: int) -> None:
        """They no longer do."""
        ...

    def product(self, x: Tensor, rows: RowMapping) -> Tensor:
        """``x [T, n]`` -> ``[T, m]``: the base's product without a bias, plus every row's terms."""
        ...


class Joined(NamedTuple):
    """The product that adds a parameter's terms, and its first output that is the parameter's."""

    terms: JoinedTerms
    first: int
