"""What work that takes long tells."""

from __future__ import annotations

import pytest

from compressor.progress import PARTS, counted, whole, within

Told = list[tuple[str, int, int]]


def test_counted_tells_before_each_item_and_in_the_end() -> None:
    told: Told = []
    items = counted(lambda *what: told.append(what), "read", ["a", "bbb"], len)
    assert list(items) == ["a", "bbb"]
    assert told == [("read", 0, 4), ("read", 1, 4), ("read", 4, 4)]


def test_within_tells_a_share_of_one_stage_and_never_goes_back() -> None:
    told: Told = []
    progress = within(lambda *what: told.append(what), "whole", 0.2, 0.6)
    for done, total in ((0, 4), (2, 4), (1, 4), (0, 0)):
        progress("part", done, total)
    assert told == [("whole", round(PARTS * share), PARTS) for share in (0.2, 0.4, 0.4, 0.6)]


def test_whole_is_over_however_it_ends() -> None:
    told: Told = []
    with pytest.raises(KeyError), whole(lambda *what: told.append(what), "load"):
        raise KeyError
    assert told == [("load", 0, 1), ("load", 1, 1)]
