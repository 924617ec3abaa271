"""Which rows of a batch belong to which slot, made once per engine step.

Rows are sorted by slot (base first, slot -1), so one variant's rows are contiguous: a segment.
Grouped delta ops work on runs: consecutive slots whose rows are padded to a common width, so that
one batched GEMM over a contiguous slice of the slot arrays serves them all without copying weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BASE_SLOT = -1
# Slots and where each one's data lies in an array: slots whose deltas have the same geometry share
# arrays that have room for them only.
Places = frozenset[tuple[int, int]]


class ShownPlaces(frozenset[tuple[int, int]]):
    """`Places` that are asked for single slots many times."""

    @cached_property
    def by_slot(self) -> dict[int, int]:
        return dict(self)

    @cached_property
    def slots(self) -> frozenset[int]:
        return frozenset(self.by_slot)


# A run is cut where padding its rows to the widest segment would cost more than another call.
MAX_PADDING_FACTOR = 1.25
MIN_PADDED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``[start, end)`` belong to `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Places ``[place, place + n_slots)`` with rows ``[start, end)``, padded to `width` rows each.

    gather   [n_slots * width] int64, row (from `start`) at each place; None if none is padded
    scatter  [end - start] int64, padded place of each row; None if none is padded
    counts   rows of each slot
    """

    place: int
    n_slots: int
    start: int
    end: int
    width: int
    gather: Tensor | None
    scatter: Tensor | None
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SlotSegments:
    """The segments of some slots as data for a kernel.

    table    int64 [k, 3]: place in the arrays, first row, end row
    n        k
    longest  rows of the longest segment, or more
    count    int32 [1]: entries in use where only the device knows (n is then the most); else None
    """

    table: Tensor
    n: int
    longest: int
    count: Tensor | None = None

    def entries(self) -> list[list[int]]:
        """``[slot, first row, end row]`` each, on the host."""
        n = self.n if self.count is None else int(self.count)
        rows: list[list[int]] = self.table[:n].tolist()
        return rows

    @cached_property
    def address(self) -> int:
        """Of the table: every layer asks."""
        return self.table.data_ptr()

    @cached_property
    def end(self) -> int:
        """End of the last segment's rows; of tables on the host."""
        return int(self.table[-1, 2])


class RowMapping:
    """The segments of one batch, and the runs derived from them (cached: every layer asks)."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = tuple(segments)
        self.device = device
        self.n_rows = self.segments[-1].end if self.segments else 0
        self.slots = frozenset(s.slot for s in self.segments if s.slot != BASE_SLOT)
        self._runs: dict[Places, tuple[SlotRun, ...]] = {}
        self._tables: dict[Places, SlotSegments] = {}
        self._rows_of: dict[frozenset[int], Tensor] = {}
        self._place_of_row: dict[Places, Tensor] = {}
        self._held_rows: dict[Places, Tensor] = {}
        self._parts: dict[tuple[int, int], RowMapping] = {}
        self._split: dict[int, SlotSegments] = {}

    @cached_property
    def slot_of_row(self) -> Tensor:
        """[T] int64, -1 for the base."""
        return self._per_row([s.slot for s in self.segments])

    @property
    def as_data(self) -> bool:
        """Whether the segments are known to the device only (`static_row_mapping`)."""
        return False

    @property
    def has_deltas(self) -> bool:
        """Whether any row belongs to a slot."""
        return bool(self.slots)

    def check(self, n_rows: int) -> None:
        """See that a module got as many rows as this maps: kernels trust it blindly."""
        assert n_rows == self.n_rows, f"a module got {n_rows} rows, the step has {self.n_rows}"

    def vector_index(self, present: frozenset[int], n_vectors: int) -> Tensor:
        """[T] int64: each row's place in ``[n_vectors, m]`` values of a 1-D parameter: ``slot + 1``
        where the row's slot is in `present`, else 0 (the base's).
        """
        active = present & self.slots
        if active not in self._rows_of:
            places = [s.slot + 1 if s.slot in active else 0 for s in self.segments]
            self._rows_of[active] = self._per_row(places)
        return self._rows_of[active]

    def place_of_row(self, present: Places) -> Tensor:
        """[T] int64: place of each row's slot, 0 where it has none: what is there is not used."""
        if present not in self._place_of_row:
            self._place_of_row[present] = self.held_rows(present).clamp(min=0)
        return self._place_of_row[present]

    def held_rows(self, present: Places) -> Tensor:
        """[T] int64: place of each row's slot, -1 where it has none."""
        if present not in self._held_rows:
            places = _by_slot(present)
            self._held_rows[present] = self._per_row(
                [places.get(s.slot, -1) for s in self.segments]
            )
        return self._held_rows[present]

    def _per_row(self, values: list[int]) -> Tensor:
        counts = torch.tensor([s.end - s.start for s in self.segments], dtype=torch.int64)
        rows = torch.tensor(values, dtype=torch.int64).repeat_interleave(counts)
        return rows.to(self.device)

    def runs(self, present: Places) -> tuple[SlotRun, ...]:
        """Runs over the slots in `present` that have rows in this batch."""
        if present not in self._runs:
            self._runs[present] = tuple(
                _make_run(group, self.device) for group in _group_consecutive(self._at(present))
            )
        return self._runs[present]

    def table(self, present: Places) -> SlotSegments:
        """The segments of the slots in `present`, as a table."""
        if present not in self._tables:
            wanted = [(s.slot, s.start, s.end) for s in self._at(present)]
            table = torch.tensor(wanted, dtype=torch.int64).view(-1, 3)
            longest = max((end - start for _, start, end in wanted), default=0)
            self._tables[present] = SlotSegments(table.to(self.device), len(wanted), longest)
        return self._tables[present]

    def part(self, start: int, end: int) -> RowMapping:
        """The rows ``[start, end)`` alone, whole segments, counted from 0."""
        if (start, end) not in self._parts:
            inside = [s for s in self.segments if start <= s.start and s.end <= end]
            moved = [Segment(s.slot, s.start - start, s.end - start) for s in inside]
            self._parts[start, end] = RowMapping(moved, self.device)
        return self._parts[start, end]

    def split(self, most_rows: int) -> SlotSegments:
        """`by_slot` in pieces of at most so many rows, which threads can share."""
        if most_rows not in self._split:
            pieces = [
                (s.slot, start, min(start + most_rows, s.end))
                for s in self.segments
                if s.slot != BASE_SLOT
                for start in range(s.start, s.end, most_rows)
            ]
            table = torch.tensor(pieces, dtype=torch.int64).view(-1, 3)
            self._split[most_rows] = SlotSegments(table.to(self.device), len(pieces), most_rows)
        return self._split[most_rows]

    @cached_property
    def _all_slots(self) -> SlotSegments:
        return self.table(frozenset((slot, slot) for slot in self.slots))

    def by_slot(self) -> SlotSegments:
        """All segments but the base's, by slot instead of place: `place_of` maps say the rest."""
        return self._all_slots

    def _at(self, present: Places) -> list[Segment]:
        """The segments of `present`, each named by its place, by rows."""
        places = _by_slot(present)
        return [Segment(places[s.slot], s.start, s.end) for s in self.segments if s.slot in places]


def _by_slot(present: Places) -> dict[int, int]:
    return present.by_slot if isinstance(present, ShownPlaces) else dict(present)


def _group_consecutive(segments: Iterable[Segment]) -> list[list[Segment]]:
    """Split into groups of consecutive places and rows whose padding stays acceptable."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and _may_join(groups[-1], segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _may_join(group: list[Segment], segment: Segment) -> bool:
    last = group[-1]
    if segment.slot != last.slot + 1 or segment.start != last.end:
        return False
    rows = segment.end - group[0].start
    width = max(s.end - s.start for s in [*group, segment])
    padded = width * (len(group) + 1)
    return padded <= max(MAX_PADDING_FACTOR * rows, MIN_PADDED_ROWS)


def _make_run(group: list[Segment], device: torch.device) -> SlotRun:
    start, end = group[0].start, group[-1].end
    counts = torch.tensor([s.end - s.start for s in group])
    width = int(counts.max())
    sizes = tuple(counts.tolist())
    if bool((counts == width).all()):
        return SlotRun(group[0].slot, len(group), start, end, width, None, None, sizes)
    within = torch.arange(width).expand(len(group), width)
    first = torch.tensor([s.start - start for s in group]).unsqueeze(1)
    valid = within < counts.unsqueeze(1)
    gather = torch.where(valid, first + within, 0).flatten()
    scatter = valid.flatten().nonzero().flatten()
    return SlotRun(
        group[0].slot, len(group), start, end, width, gather.to(device), scatter.to(device), sizes
    )


def pad_rows(x: Tensor, run: SlotRun) -> Tensor:
    """Lay the run's rows out by slot: ``x [T, n]`` -> ``[n_slots, width, n]``.

    Padded places repeat the run's first row: finite, and never read back.
    """
    rows = x[run.start : run.end]
    if run.gather is not None:
        rows = rows.index_select(0, run.gather)
    return rows.reshape(run.n_slots, run.width, x.shape[1])


def add_rows_(y: Tensor, out: Tensor, run: SlotRun) -> None:
    """Add ``out [n_slots * width, m]`` to the run's rows of ``y [T, m]``, in place."""
    if run.scatter is not None:
        out = out.index_select(0, run.scatter)
    y[run.start : run.end] += out
