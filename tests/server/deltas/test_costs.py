"""Which variant goes first: against the formula's own words, for any sizes, ages and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from server.deltas.costs import TYPICAL_RATE, ReloadCosts, in_order_of_worth, worth


@dataclass(frozen=True)
class One:
    key: str
    n_bytes: int
    last_used: int
    reload_s: float


ONES = st.builds(
    One,
    st.just("k"),
    st.integers(1, 1 << 32),
    st.integers(1, 1000),
    st.floats(0, 600, allow_nan=False),
)


def worth_of(one: One, now: int = 1000) -> float:
    return worth(now - one.last_used + 1, one.n_bytes, one.reload_s)


def order(ones: list[One], now: int = 1000) -> list[One]:
    last_used, reload_s = [one.last_used for one in ones], [one.reload_s for one in ones]
    return in_order_of_worth(ones, now, last_used, reload_s)


@given(st.lists(ONES, max_size=12))
def test_order_what_is_older_larger_and_cheaper_never_stays_for_another(ones: list[One]) -> None:
    found = order(ones)
    assert sorted(map(id, found)) == sorted(map(id, ones))
    for i, later in enumerate(found):
        for earlier in found[:i]:
            is_dominated = (
                later.last_used <= earlier.last_used
                and later.n_bytes >= earlier.n_bytes
                and later.reload_s <= earlier.reload_s
            )
            assert not is_dominated or math.isclose(worth_of(later), worth_of(earlier))


@given(st.lists(ONES.map(lambda one: One("k", one.n_bytes, one.last_used, 0.5)), max_size=12))
def test_order_of_loads_that_nobody_minds_is_the_least_recently_used_first(
    ones: list[One],
) -> None:
    found = [one.last_used for one in order(ones)]
    assert found == sorted(found)


def test_order_dear_variant_stays_for_a_younger_cheap_one_until_it_is_old() -> None:
    n_bytes = int(TYPICAL_RATE)  # a second at the usual rate
    dear, cheap = One("dear", n_bytes, 90, 11.0), One("cheap", n_bytes, 99, 0.1)
    assert order([dear, cheap], now=100) == [cheap, dear]
    old = One("dear", n_bytes, 10, 11.0)
    assert order([old, One("cheap", n_bytes, 199, 0.1)], now=200)[0] == old


def test_costs_are_of_what_is_still_to_be_done_and_shrink() -> None:
    costs = ReloadCosts()
    assert costs.expected_s(1000) is None
    costs.was_read("a", 1000, 20.0)
    assert costs.expected_s(1000) is None, "the first says nothing of the rate"
    costs.was_read("a", 1000, 2.0)
    costs.was_copied("a", 0.5)
    assert costs.reload_s("a", from_host=False) == 2.5
    assert costs.reload_s("a", from_host=True) == 0.5
    assert costs.reload_s("b", from_host=False) == 0.0
    assert costs.expected_s(500) == 1.0
    costs.keep(())
    assert len(costs) == 0
    assert costs.expected_s(500) == 1.0
