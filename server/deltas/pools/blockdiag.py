"""Slot arrays of block-diagonal terms: packed codes, alone or shared by a projection group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs.blockdiag import BlockDiagTerm
from compressor.codecs.columns import pack_columns, packed_rows
from compressor.codecs.term import Shape, Term
from server.deltas.pools.base import ArrayStore, PackedPool, PoolParts, copy_into
from server.deltas.pools.places import SlotPlaces, grown
from server.ops.blockdiag import BlockDiagOp
from server.ops.joined import TermArrays
from server.ops.kernels import Kernels
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import RowMapping


class BlockGeometry(NamedTuple):
    """What variants must share to be applied in one product."""

    n_blocks: int
    bits: int
    scale_bits: int


class BlockDiagPool(PackedPool):
    """Parts: packed codes [s, byte rows, mb], scales float16 or uint8 [s, mb], unit float32 [1].

    shared  set if the arrays are slices of ones that a whole projection group uses
    """

    def __init__(
        self, shape: Shape, geometry: BlockGeometry, kernels: Kernels, device: torch.device
    ) -> None:
        super().__init__(shape, torch.float32, device)
        self.n_blocks, self.bits, self.scale_bits = geometry
        self.shared: SharedBlocks | None = None
        self.kernels = kernels
        self._op: BlockDiagOp | None = None

    @property
    def block_shape(self) -> Shape:
        return -(-self.shape[0] // self.n_blocks), -(-self.shape[1] // self.n_blocks)

    @property
    def store(self) -> ArrayStore:
        return self if self.shared is None else self.shared

    def own_arrays(self, arrays: PoolParts) -> PoolParts:
        return arrays if self.shared is None else self.shared.slices(self, arrays)

    def _take(self, arrays: PoolParts) -> None:
        self._op = self.kernels.blockdiag(self._blocks_in(arrays))

    def joined_arrays(self, arrays: PoolParts) -> TermArrays:
        return self._blocks_in(arrays)

    def stage(self, term: Term) -> PoolParts:
        assert isinstance(term, BlockDiagTerm)
        unit = torch.tensor([term.unit], dtype=torch.float32)
        if term.in_columns:  # as on disk
            return term.packed, term.stored_scales.view(self.n_blocks, -1), unit
        codes, scales = term.code_blocks()
        return pack_columns(codes.transpose(1, 2), self.bits).contiguous(), scales, unit

    @property
    def as_data(self) -> bool:
        return True

    def hide(self, slot: int) -> None:
        # The group's product may go on for this slot: a unit of 0 takes this member out of it.
        # Beyond the capacity there was no memory for it.
        if self.shared is not None and slot in self.places and self.places[slot] < self.capacity:
            self.arrays[2][self.places[slot]] = 0
        super().hide(slot)

    def add_(self, y: Tensor, x: Tensor, rows: RowMapping) -> None:
        if self.shared is not None:
            self.shared.add_([y if pool is self else None for pool in self.shared.pools], x, rows)
            return
        segments = rows.table(self.places.shown)
        if segments.n and self._op is not None:
            self._op.add_([y], x, segments)

    def add_rows_(self, y: Tensor, ids: Tensor, rows: RowMapping) -> None:
        if _meet(rows, self.places.slots):
            self.kernels.blockdiag_rows_add_(
                y, ids, self.places_of(rows), self._blocks_in(self.arrays)
            )

    def _blocks_in(self, arrays: PoolParts) -> PackedBlocks:
        codes, scales, units = arrays
        m, n = self.shape
        return PackedBlocks(codes, scales, units, (m,), n, self.bits, self.places.place_of)


class SharedBlocks:
    """One set of arrays for matrices that read the same input (q, k, v): outputs side by side.

    Each member pool's own arrays are slices of them, so loading stays per parameter while one
    product serves them all. A slot has one place in all members (`SlotPlaces`).
    """

    def __init__(self, pools: Sequence[BlockDiagPool], place_of: Tensor | None = None) -> None:
        self.pools = tuple(pools)
        self.places = SlotPlaces(place_of, [pool.places for pool in pools])
        self._sizes = tuple(pool.shape[0] for pool in pools)
        self._ends = list(itertools.accumulate(p.block_shape[0] for p in pools))
        self.arrays: PoolParts = ()
        self.capacity = 0
        self._op: BlockDiagOp | None = None
        for pool in pools:
            pool.shared = self

    def grown_arrays(self, example: PoolParts, place: int) -> PoolParts:
        """As `TermPool.grown_arrays`, for all members at once."""
        first, width = self.pools[0], self._ends[-1]
        capacity = grown(self.capacity, place, first.device)
        s, nb = first.n_blocks, first.block_shape[1]
        code_rows = packed_rows(nb, first.bits)
        code_dtype = torch.float16 if first.bits == 16 else torch.uint8
        scale_dtype = torch.uint8 if first.scale_bits == 8 else torch.float16
        device = first.device
        # Zeros: a member that lacks a slot has scale 0 there.
        arrays = (
            torch.zeros((capacity, s, code_rows, width), dtype=code_dtype, device=device),
            torch.zeros((capacity, s, width), dtype=scale_dtype, device=device),
            torch.zeros((capacity, len(self.pools)), dtype=torch.float32, device=device),
        )
        copy_into(arrays, self.arrays)
        return arrays

    def adopt(self, arrays: PoolParts) -> None:
        """See `TermPool.adopt`. A slot that a member gave up while the arrays were made still has
        its unit there (`BlockDiagPool.hide`).
        """
        codes, scales, units = arrays
        held = [[place in pool.places.taken for pool in self.pools] for place in range(len(units))]
        units.mul_(torch.tensor(held, dtype=units.dtype, device=units.device))
        first = self.pools[0]
        n, bits = first.shape[1], first.bits
        blocks = PackedBlocks(codes, scales, units, self._sizes, n, bits, self.places.place_of)
        self._op = first.kernels.blockdiag(blocks)  # the last that may find no memory
        self.arrays, self.capacity = arrays, len(codes)
        for pool in self.pools:
            pool.arrays, pool.capacity = self.slices(pool, arrays), self.capacity

    def slices(self, pool: BlockDiagPool, arrays: PoolParts) -> PoolParts:
        """A member's part of the arrays."""
        codes, scales, units = arrays
        index = self.pools.index(pool)
        end = self._ends[index]
        own = slice(end - pool.block_shape[0], end)
        return codes[..., own], scales[..., own], units[:, index : index + 1]

    def add_(self, outputs: Sequence[Tensor | None], x: Tensor, rows: RowMapping) -> None:
        """Add each member's deltas to its own ``[T, m]`` of `outputs`; None leaves it out."""
        segments = rows.table(self.places.shown)
        if segments.n and self._op is not None:
            self._op.add_(outputs, x, segments)


def _meet(rows: RowMapping, slots: frozenset[int]) -> bool:
    """Whether some rows may belong to one of the slots."""
    return rows.as_data or not rows.slots.isdisjoint(slots)
