"""Who is let in, who is refused with which time to wait, and when permits come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.schedule.admission import Admission
from server.errors import Draining, EngineDead, InvalidRequest, QueueFull
from server.tenants.principal import Principal


def nothing() -> None: ...


def retry_after(admission: Admission) -> int | None:
    with pytest.raises(QueueFull) as caught:
        admission.check()
    return caught.value.retry_after_s


def full_after(waits: list[float | None]) -> Admission:
    """A server of one place whose earlier sequences have waited so long, and that is full now."""
    admission = Admission(max_waiting=0, max_running=1)
    for wait in waits:
        with admission.admit(1) as ticket:
            ticket.hand_over(nothing)
        admission.leave(wait)
    admission.admit(1)
    return admission


@pytest.mark.parametrize(
    ("waits", "seconds"),
    [
        ([], 1),  # nobody has been measured
        ([None, None], 1),  # who never ran says nothing
        ([0.0], 1),
        ([7.2], 8),  # whole seconds, never too early
        ([8.0], 8),
        ([500.0], 96),  # with the jitter of the wire (`server.api.errors`) no more than 120
        ([10.0, 20.0], 11),  # the newest counts a tenth
        ([10.0, None, 20.0], 11),
        ([0.0] + [20.0] * 60, 20),
    ],
)
def test_full_server_names_the_wait_that_others_had(
    waits: list[float | None], seconds: int
) -> None:
    assert retry_after(full_after(waits)) == seconds


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=30))
def test_time_to_wait_is_within_what_was_measured_and_the_limits(waits: list[float]) -> None:
    seconds = retry_after(full_after(list(waits)))
    assert seconds is not None
    low, high = min(max(min(waits), 1), 96), min(max(waits) + 1, 96)
    assert low <= seconds <= max(high, 1)


def test_sequences_are_counted_until_all_places_are_back() -> None:
    admission = Admission(max_waiting=2, max_running=2)
    with admission.admit(3) as ticket:
        ticket.hand_over(nothing)
        with pytest.raises(QueueFull):
            admission.admit(2)
        with admission.admit(1):
            retry_after(admission)
        admission.check()
    assert admission.n_open == 1  # the sequence that the engine has
    admission.admit(3)
    retry_after(admission)
    admission.leave(None)
    admission.check()


def test_ticket_left_twice_gives_back_once() -> None:
    admission = Admission(max_waiting=0, max_running=3)
    kept = admission.admit(1)
    with admission.admit(2) as ticket, ticket:
        pass
    assert admission.n_open == 1
    with kept:
        kept.hand_over(nothing)
    assert admission.n_open == 1


def test_sequence_without_a_place_is_a_bug() -> None:
    admission = Admission(max_waiting=0, max_running=2)
    with admission.admit(1) as ticket:
        ticket.hand_over(nothing)
        with pytest.raises(RuntimeError, match="no permit"):
            ticket.hand_over(nothing)


def test_more_sequences_than_permits_is_the_callers_mistake() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Admission(max_waiting=2, max_running=2).admit(5)
    assert caught.value.param == "n"


def test_draining_refuses_the_new_and_lets_ticket_holders_go_on() -> None:
    admission = Admission(max_waiting=2, max_running=2)
    let_in: list[str] = []
    with admission.admit(1) as ticket:
        admission.drain()
        for refused in (admission.check, lambda: admission.admit(1)):
            with pytest.raises(Draining) as caught:
                refused()
            assert caught.value.retry_after_s == 5
        ticket.hand_over(lambda: let_in.append("late"))
    assert let_in == ["late"]
    assert admission.n_open == 1


@pytest.mark.parametrize(("end", "error"), [("stop", Draining), ("die", EngineDead)])
def test_ended_engine_takes_nobody_even_with_a_ticket(end: str, error: type[Exception]) -> None:
    admission = Admission(max_waiting=2, max_running=2)
    with admission.admit(1) as ticket:
        getattr(admission, end)()
        with pytest.raises(error):
            ticket.hand_over(lambda: pytest.fail("it was queued in an engine that has ended"))
        with pytest.raises(error):
            admission.check()
    assert admission.n_open == 0


# -- several tenants -------------------------------------------------------------------------------


def admitted(admission: Admission, principal: Principal, wanted: int) -> int:
    """How many single sequences of a flood are let in."""
    for n in range(wanted):
        try:
            admission.admit(1, principal)
        except QueueFull:
            return n
    return wanted


def test_flood_of_one_tenant_fills_the_server_for_itself_only() -> None:
    admission = Admission(max_waiting=6, max_running=2)
    flood, quiet, heavy = Principal("flood"), Principal("quiet"), Principal("heavy", weight=2.0)
    assert admitted(admission, flood, 100) == 8
    assert admitted(admission, quiet, 100) == 4  # half, of two
    assert admitted(admission, heavy, 100) == 4  # two quarters, of weights 1 1 2
    for _ in range(8):
        admission.leave(None, flood)
    assert admission.n_open == 8
    admission.leave(None, heavy)
    assert admitted(admission, quiet, 100) == 1  # within the capacity for anybody


def test_refused_flood_hears_what_it_waited_itself() -> None:
    admission = Admission(max_waiting=2, max_running=2)
    flood, quiet = Principal("flood"), Principal("quiet")
    admission.admit(3, flood)
    admission.admit(2, quiet)
    admission.leave(20.0, flood)
    for _ in range(50):
        admission.leave(0.0, quiet)
        admission.admit(1, quiet)
    for principal, seconds in ((flood, 20), (quiet, 1)):
        with pytest.raises(QueueFull) as caught:
            admission.admit(3, principal)
        assert caught.value.retry_after_s == seconds


def test_tenant_of_little_weight_always_has_one() -> None:
    admission = Admission(max_waiting=1, max_running=1)
    for i in range(20):
        admission.admit(1, Principal(f"t{i}", weight=0.1))
    with pytest.raises(QueueFull):
        admission.admit(1, Principal("t3", weight=0.1))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.booleans()), max_size=80),
    st.integers(4, 12),
)
def test_no_more_is_open_than_the_sum_of_shares_allows(
    events: list[tuple[int, int, bool]], capacity: int
) -> None:
    admission = Admission(max_waiting=capacity - 1, max_running=1)
    n_open = dict.fromkeys(range(5), 0)
    for number, n_sequences, comes in events:
        principal = Principal(f"t{number}")
        if comes and n_sequences <= capacity:
            fits = admission.n_open + n_sequences <= capacity
            n_tenants = sum(n > 0 for other, n in n_open.items() if other != number) + 1
            share = max(1, capacity / n_tenants)
            try:
                with admission.admit(n_sequences, principal) as ticket:
                    for _ in range(n_sequences):
                        ticket.hand_over(nothing)
                n_open[number] += n_sequences
                assert fits or n_open[number] <= share
            except QueueFull:
                assert not fits
                assert n_open[number] + n_sequences > share
        elif not comes and n_open[number]:
            admission.leave(None, principal)
            n_open[number] -= 1
        assert admission.n_open == sum(n_open.values())
        assert admission.n_open <= capacity * sum(1 / k for k in range(1, 6))
