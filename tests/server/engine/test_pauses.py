"""Pauses of the whole process, on a clock that the test moves."""

from __future__ import annotations

import asyncio

from server.engine.pauses import TICK_S, PauseWatch


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def watched(clock: Clock) -> PauseWatch:
    watch = PauseWatch(5.0, clock)
    watch.start()
    watch._timer.cancel()  # the test ticks
    return watch


async def test_late_tick_is_a_pause_and_is_forgotten_after_a_while() -> None:
    clock = Clock()
    watch = await watched(clock)
    clock.now_s += 60
    watch.tick()
    assert watch.resumed_within(10)
    for _ in range(25):
        clock.now_s += TICK_S
        watch.tick()
    assert not watch.resumed_within(10)


async def test_whoever_asks_before_the_first_tick_after_a_pause_hears_of_it() -> None:
    clock = Clock()
    watch = await watched(clock)
    clock.now_s += 60
    assert watch.resumed_within(10)


async def test_tick_of_a_busy_loop_is_no_pause() -> None:
    clock = Clock()
    watch = await watched(clock)
    for _ in range(10):
        clock.now_s += TICK_S + 4.9
        assert not watch.resumed_within(10)


async def test_watch_that_is_not_started_knows_of_no_pause() -> None:
    clock = Clock()
    watch = PauseWatch(5.0, clock)
    clock.now_s += 60
    assert not watch.resumed_within(10)


async def test_watch_ticks_by_itself_until_it_is_stopped() -> None:
    clock = Clock()
    watch = PauseWatch(5.0, clock)
    watch.start()
    clock.now_s += 60
    async with asyncio.timeout(20):
        while watch._resumed is None:
            await asyncio.sleep(0.05)
    watch.stop()
    assert watch._timer.cancelled()
