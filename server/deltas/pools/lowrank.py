"""Slot arrays of low-rank terms: packed where they are quantised."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.codecs.columns import pack_columns
from compressor.codecs.lowrank import LowRankTerm
from compressor.codecs.term import Shape, Term
from server.deltas.pools.base import FactorPool, PackedPool, PoolParts
from server.ops.factors import LowRankFactors, lowrank_rows
from server.ops.kernels import Kernels
from server.ops.lowrank import HeldLowRank, PackedLowRank
from server.ops.row_mapping import RowMapping

RANK_STEP = 4  # ranks of packed factors are rounded up to a multiple: variants then share pools


class LowRankGeometry(NamedTuple):
    """What variants must share to be applied in one product of packed factors."""

    rank: int
    bits: int


class PackedLowRankPool(PackedPool, FactorPool):
    """Parts: those of `PackedLowRank` without the slot axis, of a rank rounded up so that variants
    of about the same rank share the pool; components that are not there have scale 0.
    """

    def __init__(
        self, shape: Shape, geometry: LowRankGeometry, kernels: Kernels, device: torch.device
    ) -> None:
        super().__init__(shape, torch.float32, device)
        self.rank, self.bits = geometry
        self.kernels = kernels
        self._op: PackedLowRank | None = None

    def _take(self, arrays: PoolParts) -> None:
        self._op = self.joined_arrays(arrays)

    def joined_arrays(self, arrays: PoolParts) -> PackedLowRank:
        return PackedLowRank(
            *arrays,
            n=self.shape[1],
            bits=self.bits,
            make_op=self.kernels.blockdiag,
            place_of=self.places.place_of,
        )

    @property
    def kind(self) -> Hashable:
        return type(self), self.bits

    def stage(self, term: Term) -> PoolParts:
        assert isinstance(term, LowRankTerm)
        missing = self.rank - term.rank
        unit_a, unit_b = term.units
        return (
            self._down_codes(term),
            F.pad(term.stored["a_scales"], (0, missing)),
            torch.tensor([unit_a], dtype=torch.float32),
            self._up_codes(term),
            F.pad(term.stored["b_scales"].float() * unit_b, (0, missing)),
        )

    def _down_codes(self, term: LowRankTerm) -> Tensor:
        """uint8 [rows of n, rank]: a; as on disk but for components that are not there."""
        packed = term.stored["a"]
        if not term.in_columns("a"):
            packed = pack_columns(term.codes("a").T, self.bits).contiguous()
        missing = self.rank - term.rank
        return F.pad(packed, (0, missing)) if missing else packed

    def _up_codes(self, term: LowRankTerm) -> Tensor:
        """uint8 [rows of rank, m]: b, as on disk where it is of this rank: components share bytes,
        and which of them do depends on the rank.
        """
        missing = self.rank - term.rank
        if term.in_columns("b") and not missing:
            return term.stored["b"]
        return pack_columns(F.pad(term.codes("b"), (0, 0, 0, missing)), self.bits).contiguous()

    def add_together_(
        self, pools: Sequence[Self], outputs: Sequence[Tensor], x: Tensor, rows: RowMapping
    ) -> None:
        self.kernels.packed_lowrank_add_(outputs, x, rows, [pool.held for pool in pools])

    @property
    def held(self) -> HeldLowRank:
        assert self._op is not None
        return HeldLowRank(self._op, self.places.shown)

    def look_up(self, ids: Tensor, places: Tensor) -> Tensor:
        return self.held.factors.look_up(ids, places)

    def look_up_at(self, ids: Tensor, place: int) -> Tensor:
        return self.held.factors.look_up_at(ids, place)

    def show(self, slot: int) -> None:
        self.held.factors.forget(self.places[slot])
        super().show(slot)


class LowRankPool(FactorPool):
    """Parts: a [r, n], b [r, m], in the compute dtype. For factors stored in 16 or 32 bits."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, kernels: Kernels
    ) -> None:
        super().__init__(shape, dtype, device)
        self.kernels = kernels

    def stage(self, term: Term) -> PoolParts:
        assert isinstance(term, LowRankTerm)
        return (term.a.to(self.dtype), term.b.to(self.dtype))

    @property
    def factors(self) -> LowRankFactors:
        a, b = self.arrays
        return LowRankFactors(a, b, self.places.shown, self.slot_map)

    def add_together_(
        self, pools: Sequence[Self], outputs: Sequence[Tensor], x: Tensor, rows: RowMapping
    ) -> None:
        self.kernels.lowrank_add_(outputs, x, rows, [pool.factors for pool in pools])

    def look_up(self, ids: Tensor, places: Tensor) -> Tensor:
        return lowrank_rows(ids, places, self.factors)
