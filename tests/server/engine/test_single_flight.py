"""One piece of work for all who ask at once, whatever becomes of those who ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.engine.single_flight import SingleFlight


class Work:
    """Counts its calls and ends when it may."""

    def __init__(self, error: Exception | None = None) -> None:
        self.n_calls = 0
        self.may_end = threading.Event()
        self._error = error

    def __call__(self) -> int:
        self.n_calls += 1
        assert self.may_end.wait(30)
        if self._error is not None:
            raise self._error
        return self.n_calls


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


async def test_run_asked_by_many_at_once_works_once_and_anew_afterwards(
    pool: ThreadPoolExecutor,
) -> None:
    flight: SingleFlight[int] = SingleFlight(pool)
    work = Work()
    asked = [asyncio.create_task(flight.run("a", work)) for _ in range(5)]
    await asyncio.sleep(0)
    work.may_end.set()
    assert await asyncio.gather(*asked) == [1] * 5
    assert await flight.run("a", work) == 2


async def test_run_other_keys_do_not_wait(pool: ThreadPoolExecutor) -> None:
    flight: SingleFlight[int] = SingleFlight(pool)
    slow, quick = Work(), Work()
    waiting = asyncio.create_task(flight.run("slow", slow))
    quick.may_end.set()
    assert await flight.run("quick", quick) == 1
    assert not waiting.done()
    slow.may_end.set()
    assert await waiting == 1


async def test_run_cancelled_by_one_goes_on_for_the_others(pool: ThreadPoolExecutor) -> None:
    flight: SingleFlight[int] = SingleFlight(pool)
    work = Work()
    first, second = (asyncio.create_task(flight.run("a", work)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.may_end.set()
    assert await second == 1


async def test_run_that_fails_fails_all_who_wait_and_is_tried_again_for_the_next(
    pool: ThreadPoolExecutor,
) -> None:
    flight: SingleFlight[int] = SingleFlight(pool)
    work = Work(OSError("no such file"))
    asked = [asyncio.create_task(flight.run("a", work)) for _ in range(2)]
    await asyncio.sleep(0)
    work.may_end.set()
    for result in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(result, OSError)
    good = Work()
    good.may_end.set()
    assert await flight.run("a", good) == 1
