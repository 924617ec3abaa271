"""Counts over a minute and over periods, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tenants.store import (
    RESOLUTION_S,
    WINDOW_S,
    Calendar,
    MemoryStore,
    MemoryWindow,
    QuotaPeriod,
    StoreUnreachable,
)

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC)
USES = st.lists(st.tuples(st.floats(0, 40), st.integers(1, 50)), min_size=1, max_size=40)


@dataclass
class Clock:
    """A monotonic clock, and a wall clock that may be set apart from it."""

    monotonic_s: float = 1000.0
    wall: datetime = NOON

    def monotonic(self) -> float:
        return self.monotonic_s

    def now(self) -> datetime:
        return self.wall

    def store(self, ledger: FakeLedger | None = None) -> MemoryStore:
        return MemoryStore(ledger, Calendar(self.now, self.monotonic), self.monotonic)


@dataclass
class FakeLedger:
    used: int = 0
    broken: bool = False
    asked: list[tuple[str, datetime]] = field(default_factory=list)

    def used_tokens(self, tenant: str, since: datetime) -> int:
        self.asked.append((tenant, since))
        if self.broken:
            raise OSError("no disk")
        return self.used


@given(USES)
def test_window_counts_each_use_for_a_minute_and_hardly_longer(
    uses: list[tuple[float, int]],
) -> None:
    clock = Clock()
    window = MemoryWindow(clock.monotonic)
    done: list[tuple[float, int]] = []
    for step_s, n_used in uses:
        clock.monotonic_s += step_s
        window.add(n_used)
        done.append((clock.monotonic_s, n_used))
        since = clock.monotonic_s - WINDOW_S
        least = sum(n for at, n in done if at > since)
        most = sum(n for at, n in done if at > since - RESOLUTION_S - 1e-6)
        assert least <= window.used <= most


@given(USES, st.integers(1, 2000))
def test_window_says_how_long_until_so_much_is_free(
    uses: list[tuple[float, int]], excess: int
) -> None:
    clock = Clock()
    window = MemoryWindow(clock.monotonic)
    for step_s, n_used in uses:
        clock.monotonic_s += step_s
        window.add(n_used)
    excess = min(excess, window.used)
    target = window.used - excess
    wait_s = window.wait_s(excess)
    assert wait_s <= window.reset_s <= WINDOW_S + RESOLUTION_S + 1e-6
    clock.monotonic_s += wait_s - 1e-3
    assert window.used > target
    clock.monotonic_s += 2e-3
    assert window.used <= target


def test_busy_window_keeps_few_entries() -> None:
    clock = Clock()
    window = MemoryWindow(clock.monotonic)
    for _ in range(100_000):
        clock.monotonic_s += 0.002
        window.add(1000)
    assert len(window._uses) <= WINDOW_S / RESOLUTION_S + 2
    assert window.used == pytest.approx(1000 * WINDOW_S / 0.002, rel=0.01)


@pytest.mark.parametrize("jump", [timedelta(days=2), timedelta(days=-2)])
async def test_clock_that_is_set_neither_frees_nor_locks(jump: timedelta) -> None:
    clock = Clock()
    store = clock.store()
    assert await store.hit("a/requests", 1)
    assert await store.total("a", QuotaPeriod.DAY) == 0
    store.add_total("a", QuotaPeriod.DAY, 7)
    clock.wall += jump
    assert not await store.hit("a/requests", 1)
    assert await store.total("a", QuotaPeriod.DAY) == 7
    clock.monotonic_s += WINDOW_S + RESOLUTION_S
    assert await store.hit("a/requests", 1)


async def test_periods_go_on_from_the_ledger_and_begin_anew_at_their_ends() -> None:
    clock, ledger = Clock(), FakeLedger(used=100)
    store = clock.store(ledger)
    assert (
        await store.total("a", QuotaPeriod.DAY) == await store.total("a", QuotaPeriod.MONTH) == 100
    )
    midnight, first = NOON.replace(hour=0), NOON.replace(hour=0, day=1)
    assert ledger.asked == [("a", midnight), ("a", first)]
    for period in QuotaPeriod:
        store.add_total("a", period, 5)
    assert await store.total("a", QuotaPeriod.DAY) == 105
    clock.monotonic_s += 13 * 3600  # the first of April
    assert [await store.total("a", period) for period in QuotaPeriod] == [0, 0]
    store.add_total("a", QuotaPeriod.DAY, 3)
    assert await store.total("a", QuotaPeriod.DAY) == 3
    assert len(ledger.asked) == 2
    assert await store.total("b", QuotaPeriod.DAY) == 100


async def test_ledger_is_asked_once_by_many_and_again_after_it_failed() -> None:
    ledger = FakeLedger(used=9, broken=True)
    store = Clock().store(ledger)
    with pytest.raises(StoreUnreachable):
        await store.total("a", QuotaPeriod.DAY)
    store.add_total("a", QuotaPeriod.DAY, 4)  # the ledger will have it
    ledger.broken = False
    totals = await asyncio.gather(*(store.total("a", QuotaPeriod.DAY) for _ in range(5)))
    assert totals == [9] * 5
    assert len(ledger.asked) == 2


async def test_keys_are_counted_apart() -> None:
    store = Clock().store()
    assert await store.hit("a/requests", 1)
    assert await store.hit("b/requests", 1)
    store.add("a/tokens", 10)
    assert (await store.window("a/tokens")).used == 10
    assert (await store.window("b/tokens")).used == 0
