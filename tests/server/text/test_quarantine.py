"""When a variant is refused for its text, and for how long."""

from __future__ import annotations

from server.text.quarantine import MAX_KILLS, WINDOW_S, Quarantine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_variant_is_refused_after_some_kills_and_for_a_window() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    for _ in range(MAX_KILLS - 1):
        quarantine.record("a")
    assert quarantine.reason("a") is None
    clock.now = 100.0
    quarantine.record("a")
    assert quarantine.remaining_s("a") == WINDOW_S - 100
    reason = quarantine.reason("a")
    assert reason is not None
    assert f"again in {WINDOW_S - 100:g} s" in reason
    assert "compress it again" in reason
    assert quarantine.reason("b") is None
    clock.now = WINDOW_S + 1
    assert quarantine.remaining_s("a") == 0


def test_kills_that_lie_far_apart_do_not_add_up() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    for _ in range(2 * MAX_KILLS):
        quarantine.record("a")
        clock.now += WINDOW_S / (MAX_KILLS - 1) + 1
        assert quarantine.remaining_s("a") == 0


def test_variant_that_goes_on_is_refused_again() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    for _ in range(MAX_KILLS):
        quarantine.record("a")
        clock.now += 100
    clock.now = WINDOW_S + 1
    assert quarantine.remaining_s("a") == 0
    quarantine.record("a")
    assert quarantine.remaining_s("a") > 0
