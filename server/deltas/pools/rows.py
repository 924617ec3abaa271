"""Slot arrays of terms that hold some rows of a matrix whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs.columns import pack_columns
from compressor.codecs.rows import RowsTerm
from compressor.codecs.term import Shape, Term
from server.deltas.pools.base import PackedPool, PoolParts, segments_at
from server.ops.blockdiag import BlockDiagOp
from server.ops.joined import TermArrays
from server.ops.kernels import Kernels
from server.ops.packed import PackedBlocks, PackedRows
from server.ops.row_mapping import RowMapping
from server.ops.static_row_mapping import StaticRowMapping

ROWS_STEP = 64  # numbers of rows are rounded up to a multiple: variants then share pools


class RowsGeometry(NamedTuple):
    """What variants must share to be applied in one product."""

    n_rows: int
    bits: int


class RowsPool(PackedPool):
    """Parts: packed codes [1, byte rows, K], scales uint8 [1, K], unit float32 [1], and whose rows
    they are: int64 [K], increasing. Rows that only fill up to K have scale 0.

    The stored rows are one block of a block-diagonal matrix ``[K, n]``: its product is that of all
    backends (float32 up to one rounding into x's dtype); its outputs are then added to where they
    belong, rounded again.
    Tensor parallelism: outputs split: each rank holds the rows that are its own; inputs split: all
    rows, a slice of each.
    """

    def __init__(
        self, shape: Shape, geometry: RowsGeometry, kernels: Kernels, device: torch.device
    ) -> None:
        super().__init__(shape, torch.float32, device)
        self.n_rows, self.bits = geometry
        self.kernels = kernels
        self._op: BlockDiagOp | None = None

    @property
    def as_data(self) -> bool:
        return True

    def _take(self, arrays: PoolParts) -> None:
        self._op = self.kernels.blockdiag(self._blocks_in(arrays))

    def joined_arrays(self, arrays: PoolParts) -> TermArrays:
        return PackedRows(self._blocks_in(arrays), arrays[3], self.shape[0])

    def _blocks_in(self, arrays: PoolParts) -> PackedBlocks:
        codes, scales, units, _ = arrays
        sizes = (self.n_rows,)
        return PackedBlocks(
            codes, scales, units, sizes, self.shape[1], self.bits, self.places.place_of
        )

    def stage(self, term: Term) -> PoolParts:
        assert isinstance(term, RowsTerm)
        index = _filled_up(term.index, self.n_rows, self.shape[0])
        unit = torch.tensor([term.unit], dtype=torch.float32)
        packed, scales = term.packed, term.stored_scales
        if not term.in_columns:
            packed = pack_columns(term.codes.T, self.bits).contiguous()
        if len(index) > len(term.index):
            own = torch.searchsorted(index, term.index)
            packed = packed.new_zeros((len(packed), len(index))).index_copy_(1, own, packed)
            scales = scales.new_zeros(len(index)).index_copy_(0, own, scales)
        return packed[None], scales[None], unit, index

    def add_(self, y: Tensor, x: Tensor, rows: RowMapping) -> None:
        segments = rows.table(self.places.shown)
        if not segments.n or self._op is None:
            return
        added = x.new_zeros((len(x), self.n_rows))
        self._op.add_([added], x, segments)
        # Rows without a slot here add zeros to what place 0 says: anything, if it is nobody's.
        where = self.arrays[3][self.places_of(rows).clamp(min=0)]
        y.scatter_add_(1, where.clamp_(0, self.shape[0] - 1), added)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowMapping) -> None:
        index, blocks = self.arrays[3], self._blocks_in(self.arrays)
        if isinstance(rows, StaticRowMapping):
            places = self.places_of(rows)
            stored = _find(index[places.clamp(min=0)], ids.unsqueeze(1)).squeeze(1)
            self.kernels.blockdiag_rows_add_(
                y, stored.clamp(min=0), torch.where(stored < 0, -1, places), blocks
            )
            return
        for place, part in segments_at(rows, self.places.shown):
            stored = _find(index[place], ids[part])
            places = torch.where(stored < 0, -1, place)
            self.kernels.blockdiag_rows_add_(y[part], stored.clamp(min=0), places, blocks)


def padded_count(term: RowsTerm) -> int:
    """Rows that the arrays have for this term."""
    return min(-(-len(term.index) // ROWS_STEP) * ROWS_STEP, term.shape[0])


def _filled_up(index: Tensor, n_rows: int, m: int) -> Tensor:
    """`index` and as many of the first other rows as make `n_rows`, increasing."""
    others = torch.ones(m, dtype=torch.bool)
    others[index] = False
    more = others.nonzero()[: n_rows - len(index), 0]
    return torch.cat([index, more]).sort().values


def _find(index: Tensor, ids: Tensor) -> Tensor:
    """Where in the increasing ``index [..., K]`` each of ``ids [..., t]`` is; -1 if it is not."""
    place = torch.searchsorted(index, ids).clamp(max=index.shape[-1] - 1)
    return torch.where(index.gather(-1, place) == ids, place, -1)
