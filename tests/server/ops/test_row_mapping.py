"""Row mappings against a direct reading of the segments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from hypothesis import given
from hypothesis import strategies as st

from server.ops.row_mapping import Places, RowMapping, Segment, add_rows_, pad_rows

CPU = torch.device("cpu")


def mapping_of(counts: dict[int, int]) -> RowMapping:
    segments, end = [], 0
    for slot in sorted(counts):
        segments.append(Segment(slot, end, end + counts[slot]))
        end += counts[slot]
    return RowMapping(segments, CPU)


def own_places(slots: Iterable[int]) -> Places:
    """Arrays with a place for every slot, in order."""
    return frozenset((slot, slot) for slot in slots)


batches = st.dictionaries(st.integers(-1, 9), st.integers(1, 12), min_size=1, max_size=8)


@given(batches, st.sets(st.integers(0, 9)))
def test_runs_any_batch_cover_present_rows_once(counts: dict[int, int], present: set[int]) -> None:
    mapping = mapping_of(counts)
    x = torch.arange(mapping.n_rows, dtype=torch.float32).unsqueeze(1) + 1
    y = torch.zeros_like(x)
    for run in mapping.runs(own_places(present)):
        padded = pad_rows(x, run)
        assert padded.shape == (run.n_slots, run.width, 1)
        add_rows_(y, padded.flatten(0, 1), run)
    wanted = torch.tensor([s in present for s in mapping.slot_of_row.tolist()]).unsqueeze(1)
    torch.testing.assert_close(y, torch.where(wanted, x, 0.0))


@given(batches, st.sets(st.integers(0, 9)))
def test_runs_any_batch_place_each_row_under_its_own_slot(
    counts: dict[int, int], present: set[int]
) -> None:
    mapping = mapping_of(counts)
    slots = mapping.slot_of_row.float().unsqueeze(1)
    for run in mapping.runs(own_places(present)):
        padded = pad_rows(slots, run)
        y = torch.full((mapping.n_rows, 1), -7.0)
        own = torch.arange(run.place, run.place + run.n_slots).float().view(-1, 1, 1)
        marked = own.expand(run.n_slots, run.width, 1)
        add_rows_(y, (marked + 7).flatten(0, 1), run)
        torch.testing.assert_close(y[run.start : run.end], slots[run.start : run.end])
        assert padded.isfinite().all()


def test_runs_one_long_segment_among_short_ones_is_not_padded_over() -> None:
    mapping = mapping_of({0: 1, 1: 1, 2: 200, 3: 1})
    padded = sum(r.n_slots * r.width for r in mapping.runs(own_places(range(4))))
    assert padded <= 2 * 203


def test_vector_index_absent_slot_reads_the_base_row() -> None:
    mapping = mapping_of({-1: 1, 0: 2, 3: 1})
    assert mapping.vector_index(frozenset({3}), 5).tolist() == [0, 0, 0, 4]


def test_table_names_places_and_leaves_out_slots_without_one() -> None:
    mapping = mapping_of({-1: 2, 3: 1, 5: 4, 9: 2})
    table = mapping.table(frozenset({(3, 1), (9, 0), (4, 7)}))
    assert table.table.tolist() == [[1, 2, 3], [0, 7, 9]]
    assert (table.n, table.longest) == (2, 2)
    rows = mapping.place_of_row(frozenset({(3, 1), (5, 2)}))
    assert rows.tolist() == [0, 0, 1, 2, 2, 2, 2, 0, 0]


def test_part_has_its_segments_counted_from_its_first_row() -> None:
    whole = mapping_of({-1: 2, 0: 3, 3: 1})
    part = whole.part(2, 6)
    assert part.segments == (Segment(0, 0, 3), Segment(3, 3, 4))
    assert part.slot_of_row.tolist() == whole.slot_of_row[2:6].tolist()
    assert whole.part(2, 6) is part
