"""A step whose rows are data: what a captured graph reads instead of Python's `RowMapping`."""

from __future__ import annotations

import torch
from torch import Tensor

from server.ops.row_mapping import BASE_SLOT, Places, RowMapping, SlotRun, SlotSegments


class StaticRowMapping(RowMapping):
    """T rows, padding included, whose slots only the device knows.

    slot_of_row  int64 [T], -1 for the base and for padding
    table        integer [S, 3]: slot, first row, end row; `count` int32 [1] entries are in use
    longest      no entry has more rows
    with_deltas  whether slots are to be looked at at all

    No row may belong to a slot with reconstructed weights, rows past the base's vocabulary or whole
    matrices: `segments` and `slots`, by which those are found, are empty here.
    """

    def __init__(
        self,
        slot_of_row: Tensor,
        table: Tensor,
        count: Tensor,
        longest: int,
        *,
        with_deltas: bool,
    ) -> None:
        super().__init__((), slot_of_row.device)
        self.n_rows, self.slot_of_row = len(slot_of_row), slot_of_row
        self._segments = SlotSegments(table, len(table), longest, count)
        self._with_deltas = with_deltas
        self._vector_rows: dict[int, Tensor] = {}

    @property
    def as_data(self) -> bool:
        return True

    @property
    def has_deltas(self) -> bool:
        return self._with_deltas

    def vector_index(self, present: frozenset[int], n_vectors: int) -> Tensor:
        """[T] int64 ``slot + 1`` where there is such a vector, else 0. Slots without a value of
        their own hold the base's.
        """
        if n_vectors not in self._vector_rows:
            row = self.slot_of_row + 1
            self._vector_rows[n_vectors] = torch.where(row < n_vectors, row, BASE_SLOT + 1)
        return self._vector_rows[n_vectors]

    def table(self, present: Places) -> SlotSegments:
        """All segments by slot; who has which place the arrays know (`PackedBlocks.place_of`)."""
        return self._segments

    def by_slot(self) -> SlotSegments:
        """The same: a static step's table always names slots."""
        return self._segments

    def places(self, place_of: Tensor) -> Tensor:
        """[T] int64: place of each row's slot by such a map, -1 where it has none."""
        inside = (self.slot_of_row >= 0) & (self.slot_of_row < len(place_of))
        slots = self.slot_of_row.clamp(0, len(place_of) - 1)
        return torch.where(inside, place_of[slots].long() - 1, -1)

    def runs_at(self, place_of: Tensor) -> tuple[SlotRun, ...]:
        """The segments of the slots in such a map, for torch: asks the device."""
        places = place_of.tolist()
        found = []
        for slot, start, end in self._segments.entries():
            if 0 <= slot < len(places) and places[slot]:
                width = end - start
                run = SlotRun(places[slot] - 1, 1, start, end, width, None, None, (width,))
                found.append(run)
        return tuple(found)
