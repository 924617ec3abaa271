"""Low-rank terms of all slots of one geometry, kept packed: ``dW = b^T a``.

Each factor is one block of `PackedBlocks` (s = 1), so both products are those of block-diagonal
deltas and run wherever they do; on a GPU `server.ops.triton.packed_lowrank` takes the factors of a
projection group at once. A component of b has one scale, which is one per *input* of the second
product: it is applied to what the first yields, and the block's own scales are ones.

Numerics: each product is float32 from the codes to one rounding into x's dtype.
Bytes per step: the packed factors of every distinct slot.
Tensor parallelism: outputs split: `down` replicated, `up` split with them; inputs split: `down`
split with them, `up` replicated, each rank expands its own partial sum into the y to be reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.codecs.columns import unpack_columns
from server.ops.blockdiag import BlockDiagOp, blockdiag_rows_add_
from server.ops.packed import PackedBlocks
from server.ops.row_mapping import Places, RowMapping
from server.ops.static_row_mapping import StaticRowMapping


class PackedLowRank:
    """Factors of one matrix ``[m, n]`` for C places of k components, and their two products.

    down_codes   uint8 [C, rows of n, k]: a, packed along the inputs (`pack_columns`)
    down_scales  float16 [C, k], in units of
    down_units   float32 [C, 1]
    up_codes     uint8 [C, rows of k, m]: b, packed along the components
    gains        float32 [C, k]: what the components of b are multiples of
    make_op      makes the product of packed blocks (`Kernels.blockdiag`)
    place_of     see `PackedBlocks`
    """

    def __init__(
        self,
        down_codes: Tensor,
        down_scales: Tensor,
        down_units: Tensor,
        up_codes: Tensor,
        gains: Tensor,
        *,
        n: int,
        bits: int,
        make_op: Callable[[PackedBlocks], BlockDiagOp],
        place_of: Tensor | None = None,
    ) -> None:
        n_slots, self.rank = gains.shape
        m = up_codes.shape[2]
        unit = torch.ones((n_slots, 1), dtype=torch.float32, device=gains.device)
        self.gains, self.bits, self._make_op = gains, bits, make_op
        self._downs: dict[int, Tensor] = {}  # float32 [k, n], by place, see `look_up_at`
        self.down = PackedBlocks(
            down_codes[:, None], down_scales[:, None], down_units, (self.rank,), n, bits, place_of
        )
        # One row of ones for all slots: a scale per output would be m more bytes a variant.
        ones = torch.ones((1, 1, m), dtype=torch.float16, device=gains.device)
        scales = ones.expand(n_slots, 1, m)
        self.up = PackedBlocks(up_codes[:, None], scales, unit, (m,), self.rank, bits, place_of)

    @property
    def slot_map(self) -> Tensor:
        """`place_of`, where there is one."""
        assert self.down.place_of is not None
        return self.down.place_of

    @cached_property
    def _products(self) -> tuple[BlockDiagOp, BlockDiagOp]:
        """Made when asked for: kernels that take the factors themselves need none."""
        return self._make_op(self.down), self._make_op(self.up)

    def add_(self, y: Tensor, x: Tensor, rows: RowMapping, present: Places) -> None:
        """``y [T, m] += x [T, n] a^T b`` for the rows of the slots in `present`."""
        segments = rows.table(present)
        if not segments.n:
            return
        if isinstance(rows, StaticRowMapping):
            places = rows.places(self.slot_map).clamp(min=0)
        else:
            places = rows.place_of_row(present)
        shrink, expand = self._products
        hidden = x.new_zeros((len(x), self.rank))
        shrink.add_([hidden], x, segments)
        hidden.mul_(self.gains[places])
        expand.add_([y], hidden, segments)

    def look_up_at(self, ids: Tensor, place: int) -> Tensor:
        """`look_up` of rows of one place that the host knows. What `down` dequantises to is kept:
        it is small, and a step of a few rows would spend its time on that.
        """
        codes = unpack_columns(self.up.codes[place, 0][:, ids], self.bits, self.rank).T.float()
        hidden = (codes - ((1 << self.bits) - 1) / 2).mul_(self.gains[place])
        if place not in self._downs:
            self._downs[place] = self.down.values(place)[0].T.contiguous()
        return hidden @ self._downs[place]

    def forget(self, place: int) -> None:
        """There are other factors at this place now."""
        self._downs.pop(place, None)

    def look_up(self, ids: Tensor, places: Tensor) -> Tensor:
        """``dW[place][id]``, the embedding's side: ids int64 [t], places int64 [t] or [1] ->
        float32 [t, n]. Dequantises ``down`` once a place.
        """
        hidden = torch.zeros((len(ids), self.rank), device=ids.device)
        blockdiag_rows_add_(hidden, ids, places.expand(len(ids)), self.up)
        hidden *= self.gains[places]
        factors = self.down.values_of(places)[:, 0]  # [t or 1, n, k]
        if len(places) == 1:
            return hidden @ factors[0].T
        return torch.bmm(factors, hidden.unsqueeze(2)).squeeze(2)


class HeldLowRank(NamedTuple):
    """Packed factors, and which slots have which place in them."""

    factors: PackedLowRank
    present: Places


def packed_lowrank_add_(
    outputs: Sequence[Tensor], x: Tensor, rows: RowMapping, terms: Sequence[HeldLowRank]
) -> None:
    """Add each matrix's packed low-rank terms to its own ``[T, m]`` of `outputs`; x ``[T, n]``."""
    for y, (factors, present) in zip(outputs, terms, strict=True):
        factors.add_(y, x, rows, present)
