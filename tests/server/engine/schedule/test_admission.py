"""Who is let in, who is refused with which time to wait, and when permits come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.schedule.admission import Admission
from server.errors import Draining, EngineDead, InvalidRequest, QueueFull


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
