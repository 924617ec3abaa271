"""How many names get series of their own."""

from __future__ import annotations

from server.metrics.bounded import OTHER, BoundedSeries


def test_of_more_names_than_there_is_room_for_share_one_label() -> None:
    series = BoundedSeries(lambda label: [label], 2)
    names = ("a", "b", "c", "a", "d")
    assert [series.label(name) for name in names] == ["a", "b", OTHER, "a", OTHER]
    assert series.of("c") is series.of("d") is dict(series.items())[OTHER]
    assert series.of("a") is not series.of("b")
    assert [label for label, _ in series.items()] == ["a", "b", OTHER]
