"""Slot arrays of whole matrices."""

from __future__ import annotations

from torch import Tensor

from compressor.codecs.term import Term
from server.deltas.pools.base import PoolParts, TermPool, segments_at
from server.ops import blockdiag as ops
from server.ops.row_mapping import RowMapping


class DensePool(TermPool):
    """Parts: dW [m, n]. Used where a whole matrix is stored exactly."""

    def stage(self, term: Term) -> PoolParts:
        return (term.to_dense().to(self.dtype),)

    def add_(self, y: Tensor, x: Tensor, rows: RowMapping) -> None:
        for run in rows.runs(self.places.shown):
            ops.dense_add_(y, x, run, self.arrays[0])

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowMapping) -> None:
        for place, part in segments_at(rows, self.places.shown):
            y[part] += self.arrays[0][place, ids[part]]
