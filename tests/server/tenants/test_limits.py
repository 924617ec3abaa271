"""What a tenant may use now: on a simulated clock, with a broken store, and with many at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from server.errors import (
    ConfigError,
    LimitsUnreachable,
    QuotaExceeded,
    RateLimited,
    TooManyAtOnce,
)
from server.tenants.limits import Limiter, Visit, duration, limiter_of
from server.tenants.store import RESOLUTION_S, WINDOW_S, StoreUnreachable
from server.tenants.tenant import Tenant, TenantLimits
from tests.server.api.conftest import make_settings
from tests.server.tenants.test_store import Clock

LIMIT = 100


def tenant(name: str = "acme", **limits: Any) -> Tenant:
    return Tenant(name, limits=TenantLimits(**limits))


async def entered(limiter: Limiter, of: Tenant, n_tokens: int | None = None) -> Visit:
    visit = Visit(limiter, of)
    await visit.enter()
    if n_tokens is not None:
        try:
            await visit.reserve(n_tokens)
        except BaseException:
            visit.leave()
            raise
    return visit


Steps = Sequence[tuple[float, int, int, int]]  # time passes; asked for; really used; who ends first
STEPS = st.lists(
    st.tuples(st.floats(0, 45), st.integers(1, 60), st.integers(0, 60), st.integers(0, 5)),
    max_size=40,
)


@given(STEPS)
def test_tokens_of_any_minute_and_of_what_runs_stay_within_the_limit(steps: Steps) -> None:
    clock = Clock()
    limiter = Limiter(clock.store())
    acme = tenant(tokens_per_minute=LIMIT)
    used: list[tuple[float, int]] = []
    refusals: list[tuple[int, float | None]] = []

    async def play() -> None:
        running: list[tuple[Visit, int, int]] = []
        for step_s, asked, really, place in steps:
            clock.monotonic_s += step_s
            really = min(asked, really)
            since = clock.monotonic_s - WINDOW_S
            held = sum(n for _, n, _ in running) + sum(n for at, n in used if at > since)
            try:
                visit = await entered(limiter, acme, asked)
            except RateLimited as error:
                late = sum(n for at, n in used if since - RESOLUTION_S - 1e-6 <= at <= since)
                refusals.append((held + late + asked, error.retry_after_s))
            else:
                assert held + asked <= LIMIT
                running.append((visit, asked, really))
            if running and place < 3:
                visit, _, n_used = running.pop(place % len(running))
                visit.leave(n_used)
                used.append((clock.monotonic_s, n_used))
        for visit, _, _ in running:
            visit.leave()

    asyncio.run(play())
    assert limiter._running == {}
    # Nobody is refused what is free, and each is told when to come back.
    assert all(wanted > LIMIT and wait_s for wanted, wait_s in refusals)


@given(st.lists(st.floats(0, 20), max_size=60), st.integers(1, 9))
def test_requests_of_any_minute_stay_within_the_limit(steps: list[float], limit: int) -> None:
    clock = Clock()
    limiter = Limiter(clock.store())
    acme = tenant(requests_per_minute=limit)
    times: list[float] = []

    async def play() -> None:
        for step_s in steps:
            clock.monotonic_s += step_s
            try:
                visit = await entered(limiter, acme)
            except RateLimited as error:
                clock.monotonic_s += error.retry_after_s or 0  # which is enough
                visit = await entered(limiter, acme)
            visit.leave()
            times.append(clock.monotonic_s)
            assert sum(at > clock.monotonic_s - WINDOW_S for at in times) <= limit

    asyncio.run(play())


async def test_many_at_once_admit_as_many_as_may_run_and_give_their_places_back() -> None:
    limiter = Limiter(Clock().store())
    acme = tenant(max_concurrent_requests=10)
    found = await asyncio.gather(
        *(entered(limiter, acme) for _ in range(50)), return_exceptions=True
    )
    visits = [visit for visit in found if isinstance(visit, Visit)]
    assert len(visits) == 10
    assert sum(isinstance(error, TooManyAtOnce) for error in found) == 40
    other = await entered(limiter, tenant("globex", max_concurrent_requests=1))
    for visit in visits:
        visit.leave()
    again = [await entered(limiter, acme) for _ in range(10)]
    for visit in [*again, other]:
        visit.leave()
    assert limiter._running == {}


async def test_refused_request_takes_neither_a_place_nor_tokens() -> None:
    limiter = Limiter(Clock().store())
    acme = tenant(max_concurrent_requests=1, requests_per_minute=2, tokens_per_minute=LIMIT)
    for _ in range(3):
        with pytest.raises(RateLimited, match="limit is 100 tokens a minute"):
            await entered(limiter, tenant(tokens_per_minute=LIMIT), LIMIT + 1)
    first = await entered(limiter, acme, LIMIT)
    for _ in range(3):
        with pytest.raises(TooManyAtOnce):
            await entered(limiter, acme)
    first.leave()
    second = await entered(limiter, acme, LIMIT)  # nothing was used by the first
    second.leave()
    with pytest.raises(RateLimited, match="2 requests a minute"):
        await entered(limiter, acme)


async def test_rates_tell_what_is_left_with_what_is_reserved() -> None:
    clock = Clock()
    limiter = Limiter(clock.store())
    acme = tenant(requests_per_minute=5, tokens_per_minute=LIMIT)
    first = await entered(limiter, acme, 30)
    first.leave(10)
    clock.monotonic_s += 30
    second = await entered(limiter, acme, 40)
    third = await entered(limiter, acme, 25)
    rates = third.rates
    assert (rates["requests"].limit, rates["requests"].remaining) == (5, 2)
    assert (rates["tokens"].limit, rates["tokens"].remaining) == (LIMIT, LIMIT - 10 - 40 - 25)
    assert rates["requests"].reset_s == pytest.approx(WINDOW_S, abs=RESOLUTION_S)
    assert rates["tokens"].reset_s == pytest.approx(WINDOW_S - 30, abs=RESOLUTION_S)
    assert (await entered(limiter, tenant("other"), 10**9)).rates == {}
    for visit in (second, third):
        visit.leave()


async def test_quota_is_spent_for_the_day_and_back_on_the_next() -> None:
    clock = Clock()
    limiter = Limiter(clock.store())
    acme = tenant(tokens_per_day=LIMIT, tokens_per_month=10 * LIMIT)
    visit = await entered(limiter, acme, LIMIT)
    with pytest.raises(QuotaExceeded, match="100 tokens a day"):
        await entered(limiter, acme, 1)
    visit.leave(LIMIT - 1)
    with pytest.raises(QuotaExceeded) as caught:
        await entered(limiter, acme, 2)
    assert caught.value.retry_after_s is None
    (await entered(limiter, acme, 1)).leave()
    clock.monotonic_s += 12 * 3600
    (await entered(limiter, acme, LIMIT)).leave()


class BrokenStore:
    """A store that cannot be asked."""

    async def hit(self, *_: Any) -> Any:
        raise StoreUnreachable

    window = total = hit

    def add(self, *_: Any) -> None: ...

    add_total = add

    async def close(self) -> None: ...


ALL = {"requests_per_minute": 1, "tokens_per_minute": 1, "tokens_per_day": 1}


@pytest.mark.parametrize("name", ALL)
async def test_store_that_cannot_be_asked_refuses_or_lets_in_as_the_setting_says(name: str) -> None:
    closed = Limiter(BrokenStore())
    acme = tenant(**{name: 1})
    with pytest.raises(LimitsUnreachable) as caught:
        await entered(closed, acme, 10)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    assert closed._running == {}
    (await entered(closed, tenant("free", max_concurrent_requests=1), 10)).leave()

    n_told = Counter[str]()
    opened = Limiter(BrokenStore(), fail_open=True, on_unreachable=lambda: n_told.update(["times"]))
    visit = await entered(opened, acme, 10)
    assert visit.rates == {}
    assert n_told == {"times": 1}
    visit.leave(5)
    assert opened._running == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-1, "0s"),
        (0.0119, "12ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (86.4, "1m26.4s"),
        (86400, "24h0m0s"),
    ],
)
def test_duration_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "url", ["memcached://h:1", "redis+cluster://h:1", "nonsense", "redis://h:port"]
)
def test_storage_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match="limits_storage"):
        limiter_of(make_settings(limits_storage=SecretStr(url)))
