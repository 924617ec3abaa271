"""Counts of several servers in a real Redis, started here; and when it hangs or is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tenants.shared import SharedStore, SharedWindow, shared_storage
from server.tenants.store import WINDOW_S, QuotaPeriod, StoreUnreachable
from tests.server.tenants.redis_server import Redis, free_port, redis

__all__ = ["redis"]  # a fixture
ANSWER_S, AWAY_S = 0.3, 0.1  # where it does not answer
LOADED_S = 30.0  # where it does


@asynccontextmanager
async def store_of(url: str, answer_s: float = LOADED_S) -> AsyncIterator[SharedStore]:
    store = SharedStore(shared_storage(url), answer_s=answer_s, away_s=AWAY_S)
    try:
        yield store
    finally:
        await store.close()


async def test_many_at_once_on_two_servers_are_counted_exactly(redis: Redis) -> None:
    async with store_of(redis.url) as one, store_of(redis.url) as two:
        hits = await asyncio.gather(*(s.hit("many/requests", 10) for s in (one, two) * 25))
        assert sum(hits) == 10
        window = await one.window("many/requests")
        assert window.used == 10
        assert 0 < window.wait_s(1) <= window.reset_s <= 2 * WINDOW_S
        assert await two.hit("other/requests", 10)


async def test_what_one_server_adds_all_count(redis: Redis) -> None:
    async with store_of(redis.url) as one, store_of(redis.unix_url) as two:
        one.add("acme/tokens", 300)
        await asyncio.sleep(0)  # Redis is being told
        one.add("acme/tokens", 30)
        one.add_total("acme", QuotaPeriod.DAY, 7)
        one.add_total("acme", QuotaPeriod.MONTH, 8)
        assert (await one.window("acme/tokens")).used == 330  # at once here
        await one.close()  # by then Redis knows
        assert (await two.window("acme/tokens")).used == 330
        assert [await two.total("acme", period) for period in QuotaPeriod] == [7, 8]
        assert await two.total("globex", QuotaPeriod.DAY) == 0


async def test_totals_of_a_period_are_forgotten_after_it(redis: Redis) -> None:
    async with store_of(redis.url) as store:
        store.add_total("brief", QuotaPeriod.DAY, 1)
        await store.close()
        client = store._storage.bridge.storage  # type: ignore[attr-defined]
        keys = [key async for key in client.scan_iter("*brief/day*")]
        assert len(keys) == 1
        assert 86_400 < await client.ttl(keys[0]) <= 2 * 86_400


async def test_redis_that_hangs_is_waited_for_briefly_and_told_later(redis: Redis) -> None:
    async with store_of(redis.url, ANSWER_S) as store:
        await store.window("slow/tokens")
        redis.hang()
        try:
            async with asyncio.timeout(5 * ANSWER_S):
                with pytest.raises(StoreUnreachable):
                    await store.window("slow/tokens")
                store.add("slow/tokens", 12)
                with pytest.raises(StoreUnreachable):  # which nobody waits for now
                    await store.hit("slow/requests", 1)
        finally:
            redis.go_on()
        async with asyncio.timeout(20):
            while store._owed:
                await asyncio.sleep(0.01)
        assert (await store.window("slow/tokens")).used == 12


async def test_redis_that_is_not_there_is_unreachable_and_nothing_waits_to_be_told() -> None:
    async with store_of(f"redis://127.0.0.1:{free_port()}", ANSWER_S) as store:
        for _ in range(2):
            with pytest.raises(StoreUnreachable):
                await store.total("acme", QuotaPeriod.DAY)
        store.add("acme/tokens", 5)
        async with asyncio.timeout(10 * ANSWER_S):
            await store.close()


COUNTS = st.integers(0, 10_000)


@given(COUNTS, COUNTS, st.floats(0, WINDOW_S), st.floats(0, 1))
def test_wait_is_until_the_two_counters_have_sunk_so_far(
    n_before: int, n_current: int, left_s: float, share: float
) -> None:
    """The oracle is the library's rule: of the minute before counts the share that is left of it,
    and the running one becomes it when that is nothing.
    """
    window = SharedWindow(n_before, left_s, n_current, WINDOW_S + left_s)

    def counted_after(wait_s: float) -> float:
        of_before = n_before * max(0.0, left_s - wait_s) / WINDOW_S
        sunk = max(0.0, wait_s - left_s) / WINDOW_S
        return of_before + n_current * max(0.0, 1 - sunk)

    excess = int(share * window.used)
    wait_s = window.wait_s(excess)
    assert 0 <= wait_s <= max(window.reset_s, left_s)
    assert counted_after(wait_s) <= counted_after(0) - excess + 1e-6
