"""Pauses of the whole process, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from server.engine.llm_engine import LLMEngine
from server.engine.pauses import TICK_S, PauseWatch
from server.settings import Settings


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


async def test_engine_is_alive_after_a_pause_before_its_thread_has_beaten_again(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        base=tiny_llama,
        device="cpu",
        kernels="torch",
        kv_cache_bytes=8 << 20,
        heartbeat_timeout_s=4.0,
    )
    engine = LLMEngine.from_settings(settings)
    engine.start()
    try:
        assert engine.is_alive()
        monkeypatch.setattr(engine.core, "_beat", lambda *_: None)
        engine.core.heartbeat = time.monotonic() - 60  # what a pause of a minute leaves
        assert not engine.is_alive()
        assert engine._pauses._last_tick is not None
        engine._pauses._last_tick -= 60
        assert engine.is_alive()
    finally:
        await engine.shutdown(0.0)
