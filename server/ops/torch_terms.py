"""The reference of `server.ops.joined.JoinedTerms`: term by term in plain torch."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from server.ops.blockdiag import TorchBlockDiag
from server.ops.joined import JoinedTerms, TermArrays
from server.ops.linear import LinearOp
from server.ops.lowrank import PackedLowRank
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import RowMapping, SlotSegments


class TorchTerms(JoinedTerms):
    """Dequantises the terms of every segment anew; each is rounded once into x's dtype. In float64
    where x is.
    """

    def __init__(self, linear: LinearOp) -> None:
        self._linear = linear
        self._arrays: dict[Hashable, tuple[TermArrays, int]] = {}
        self._places: dict[int, dict[Hashable, int]] = {}  # by slot

    def takes(self, bits: int) -> bool:
        return True

    def use(self, linear: LinearOp) -> None:
        self._linear = linear

    def put(self, key: Hashable, arrays: TermArrays, first: int) -> None:
        self._arrays[key] = arrays, first

    def drop(self, key: Hashable) -> None:
        self._arrays.pop(key, None)

    def show(self, key: Hashable, slot: int, place: int) -> None:
        self._places.setdefault(slot, {})[key] = place

    def hide(self, key: Hashable, slot: int) -> None:
        self._places.get(slot, {}).pop(key, None)

    def tell(self, other: JoinedTerms) -> None:
        """Let another have all there is."""
        for key, (arrays, first) in self._arrays.items():
            other.put(key, arrays, first)
        for slot, places in self._places.items():
            for key, place in places.items():
                other.show(key, slot, place)

    def product(self, x: Tensor, rows: RowMapping) -> Tensor:
        y = self._linear(x)
        for segment in rows.segments:
            part = slice(segment.start, segment.end)
            for key, place in self._places.get(segment.slot, {}).items():
                arrays, first = self._arrays[key]
                _add_(y[part, first:], x[part], arrays, place)
        return y


def _add_(y: Tensor, x: Tensor, arrays: TermArrays, place: int) -> None:
    """``y[:, : m] += x dW^T`` of the term at `place`."""
    if isinstance(arrays, PackedBlocks):
        _add_blocks_(y, x, arrays, place)
    elif isinstance(arrays, PackedLowRank):
        hidden = x.new_zeros((len(x), arrays.rank))
        _add_blocks_(hidden, x, arrays.down, place)
        _add_blocks_(y, hidden.mul_(arrays.gains[place]), arrays.up, place)
    else:
        index = arrays.index[place]
        found = x.new_zeros((len(x), len(index)))
        _add_blocks_(found, x, arrays.blocks, place)
        y.index_add_(1, index, found)


def _add_blocks_(y: Tensor, x: Tensor, blocks: PackedBlocks, place: int) -> None:
    (m,) = blocks.sizes
    table = torch.tensor([[place, 0, len(x)]], device=x.device)
    TorchBlockDiag(blocks).add_([y[:, :m]], x, SlotSegments(table, 1, len(x)))
