"""What is told of tries."""

from __future__ import annotations

import pytest

from compressor.auto.tries import Tries
from compressor.errors import BudgetError

Told = list[tuple[str, int, int]]


def shares(told: Told, stage: str) -> list[float]:
    return [done / total for name, done, total in told if name == stage]


def test_try_goes_through_its_parts_to_the_end_and_never_back() -> None:
    told: Told = []
    tries = Tries(lambda *what: told.append(what))
    tries.expect(2)
    with tries.next() as progress:
        progress("sample", 0, 7)
        progress("sample", 7, 7)
        for _ in range(2):  # a second pass begins anew
            progress("encode", 0, 3)
            progress("encode", 3, 3)
        progress("variant", 1, 2)
    with tries.next():
        pass
    assert [name for name, _, _ in told[:1] + told[-1:]] == ["try 1 of 2", "try 2 of 2"]
    assert shares(told, "try 1 of 2") == [0.0, 0.1, 0.1, 0.5, 0.5, 0.5, 0.75, 1.0]
    assert shares(told, "try 2 of 2") == [1.0]


def test_try_that_is_impossible_is_over_too() -> None:
    told: Told = []
    tries = Tries(lambda *what: told.append(what))
    tries.expect(1)
    with pytest.raises(BudgetError), tries.next():
        raise BudgetError("too few bytes")
    assert told[-1] == ("try 1 of 1", 1, 1)


def test_tries_of_a_search_are_at_most_so_many_and_more_are_counted_on() -> None:
    told: Told = []
    tries = Tries(lambda *what: told.append(what))
    tries.expect(1, at_most=True)
    tries.expect(1)
    for _ in range(3):
        with tries.next():
            pass
    assert [name for name, _, _ in told] == [
        "try 1 of up to 2",
        "try 2 of up to 2",
        "try 3 of up to 3",
    ]
