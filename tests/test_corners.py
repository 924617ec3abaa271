from __future__ import annotations

from tests.corners import corners

AXES = ([2, 3, 4], [("a", 1), ("b", 2)], ["x"])


def test_corners_are_every_combination_and_the_fast_ones_have_every_value() -> None:
    params = corners(*AXES)
    assert len({tuple(one.values) for one in params}) == 3 * 2 * 1
    fast = [one.values for one in params if not one.marks]
    assert sorted(fast) == [(2, "a", 1, "x"), (3, "b", 2, "x"), (4, "a", 1, "x")]


def test_corners_of_two_rounds_have_more_pairs_fast() -> None:
    assert sum(not one.marks for one in corners(*AXES, rounds=2)) == 6
