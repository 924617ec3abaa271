"""Low-rank terms of all slots of one layout, kept packed: ``dW = b^T a``.

Each factor is one block of `PackedBlocks` (s = 1), so both products are those of block-diagonal
deltas and run wherever they do. A component of b has one scale, which is one per *input* of the
second product: it is applied to what the first yields, and the block's own scales are ones.

Numerics: each product is float32 from the codes to one rounding into x's dtype.
Bytes per step: the packed factors of every distinct slot.
Tensor parallelism: outputs split: `down` replicated, `up` split with them; inputs split: `down`
split with them, `up` replicated, each rank expands its own partial sum into the y to be reduced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.ops.delta import BlockDiagOp, blockdiag_rows_add_
from server.ops.packed import PackedBlocks
from server.ops.rows import SlotSegments


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
        n_slots, k = gains.shape
        m = up_codes.shape[2]
        unit = torch.ones((n_slots, 1), dtype=torch.float32, device=gains.device)
        self._rank, self._gains = k, gains
        self._down = PackedBlocks(
            down_codes[:, None], down_scales[:, None], down_units, (k,), n, bits, place_of
        )
        # One row of ones for all slots: a scale per output would be m more bytes a variant.
        ones = torch.ones((1, 1, m), dtype=torch.float16, device=gains.device)
        scales = ones.expand(n_slots, 1, m)
        self._up = PackedBlocks(up_codes[:, None], scales, unit, (m,), k, bits, place_of)
        self._shrink, self._expand = make_op(self._down), make_op(self._up)

    def add_(self, y: Tensor, x: Tensor, place_of_row: Tensor, segments: SlotSegments) -> None:
        """``y [T, m] += x [T, n] a^T b`` for the rows of `segments`.

        place_of_row int64 [T], below C; of rows outside the segments nothing is read.
        """
        hidden = x.new_zeros((len(x), self._rank))
        self._shrink.add_([hidden], x, segments)
        hidden.mul_(self._gains[place_of_row])
        self._expand.add_([y], hidden, segments)

    def add_rows_(self, y: Tensor, ids: Tensor, place: int) -> None:
        """``y [t, n] += dW[ids]`` of one place: the embedding's side of the same matrix."""
        hidden = torch.zeros((len(ids), self._rank), device=y.device)
        blockdiag_rows_add_(hidden, ids, torch.full_like(ids, place), self._up)
        hidden *= self._gains[place]
        y.copy_(y.float() + hidden @ self._down.values(place)[0].T)

    def add_rows_of_(self, y: Tensor, ids: Tensor, places: Tensor) -> None:
        """The same with a place per row, int64 [t]: dequantises ``down`` once a row."""
        hidden = torch.zeros((len(ids), self._rank), device=y.device)
        blockdiag_rows_add_(hidden, ids, places, self._up)
        hidden *= self._gains[places]
        factors = self._down.values_of(places)[:, 0]  # [t, n, k]
        y.copy_(y.float() + torch.bmm(factors, hidden.unsqueeze(2)).squeeze(2))
