"""What a tenant was served of late, as a formula of its own says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import Request
from server.engine.schedule.counters import HALF_LIFE_S, TokenCounters
from server.tenants.principal import Principal


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def request_of(principal: Principal) -> Request:
    return cast(Request, SimpleNamespace(principal=principal))


@given(
    st.lists(
        st.tuples(st.floats(0, 4000), st.integers(0, 1000), st.integers(0, 1000)),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_charges_are_halved_every_half_life(
    charges: list[tuple[float, int, int]], weight: float
) -> None:
    clock, principal = Clock(), Principal("acme", weight=weight)
    counters = TokenCounters(clock)
    counters.arrive(principal)
    expected = 0.0
    for seconds, n_input, n_output in charges:
        clock.now += seconds
        expected = expected * 0.5 ** (seconds / HALF_LIFE_S) + (n_input + 2 * n_output) / weight
        counters.tick()
        counters.charge(request_of(principal), n_input, n_output)
    assert counters.of("acme").served / counters.unit == pytest.approx(expected, abs=1e-6)


def test_who_comes_back_is_lifted_to_the_least_served_of_those_that_wait() -> None:
    counters, waits = TokenCounters(Clock()), cast(Request, object())
    for name, tokens in (("a", 100), ("b", 70), ("runs only", 5), ("back", 30), ("ahead", 90)):
        standing = counters.arrive(Principal(name))
        standing.served = float(tokens)
        if len(name) == 1:
            standing.waiting[waits] = None
    for name, served in (("back", 70), ("ahead", 90), ("new", 70), ("a", 100)):
        assert counters.arrive(Principal(name)).served == served


def test_new_tenant_while_nobody_waits_starts_where_the_last_that_waited_is() -> None:
    counters = TokenCounters(Clock())
    alone = counters.arrive(Principal("alone"))
    assert alone.served == 0
    counters.leave_queue(alone)
    counters.charge(request_of(Principal("alone")), 10, 0)
    assert counters.arrive(Principal("new")).served == 10


def test_tenants_whose_service_has_faded_are_forgotten() -> None:
    clock = Clock()
    counters = TokenCounters(clock)
    for i in range(50):
        counters.arrive(Principal(f"t{i}"))
        counters.charge(request_of(Principal(f"t{i}")), 1000, 0)
    counters.of("t0").n_running = 1
    clock.now += 11 * HALF_LIFE_S
    counters.arrive(Principal("new"))
    assert {standing.tenant for standing in counters} == {"t0", "new"}
    clock.now += 1e9
    counters.arrive(Principal("much later"))
    assert counters.of("t0").served == 0
