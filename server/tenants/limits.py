"""What a tenant may use now: requests at once and a minute, tokens a minute, a day and a month.

A request is counted when it comes. Its tokens are reserved before it is generated, at the most that
they may become, and settled when it ends, however that is, at what they were:

    used in the last minute + reserved by what runs + asked for  <=  the limit

so that many requests at once do not pass a limit that none of them passes alone. Requests at once
and reservations are counted by this server alone, what was used by the store (`LimitStore`), which
may be several servers'. Each tenant is counted by its name: nobody feels another's limit.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from server.errors import LimitsUnreachable, QuotaExceeded, RateLimited, TooManyAtOnce
from server.settings import Settings, is_shared
from server.tenants.store import (
    LimitStore,
    MemoryStore,
    QuotaPeriod,
    StoreUnreachable,
    UsedTokens,
    Window,
)
from server.tenants.tenant import Tenant, TenantLimits

Unit = Literal["requests", "tokens"]
SOON_S = 1.0  # when a running request may end: nobody knows

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rate:
    """What is left of one minute's limit, and the seconds until nothing of it is used."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class Running:
    """What a tenant's requests take while they are answered."""

    n_requests: int = 0
    n_reserved_tokens: int = 0


class Limiter:
    """Decides for each request. Event loop only.

    fail_open       admit requests that the store cannot be asked about
    on_unreachable  told of each time that it could not
    """

    def __init__(
        self,
        store: LimitStore,
        *,
        fail_open: bool = False,
        on_unreachable: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self._fail_open = fail_open
        self._on_unreachable = on_unreachable
        self._running: dict[str, Running] = {}

    def begin(self, tenant: Tenant) -> Running:
        """Count one request more that is answered; return what the tenant's take together."""
        running = self._running.setdefault(tenant.name, Running())
        running.n_requests += 1
        return running

    def end(self, tenant: Tenant, n_reserved_tokens: int) -> None:
        """Count one less. Tenants without any are forgotten."""
        running = self._running[tenant.name]
        running.n_requests -= 1
        running.n_reserved_tokens -= n_reserved_tokens
        if running.n_requests == 0:
            del self._running[tenant.name]

    async def ask(self, question: Awaitable[T]) -> T | None:
        """Return the store's answer; None where it cannot be asked and that is to be no obstacle.

        Raises LimitsUnreachable.
        """
        try:
            return await question
        except StoreUnreachable as error:
            self._on_unreachable()
            if self._fail_open:
                return None
            raise LimitsUnreachable(
                "The server cannot tell now what this tenant has used. Try again.",
                retry_after_s=5,
            ) from error


class Visit:
    """One request of a tenant: `enter`, perhaps `reserve`, and `leave` if it could enter.

    rates  what is known to be left, by unit
    """

    def __init__(self, limiter: Limiter, tenant: Tenant) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self._running = Running()  # until it enters
        self._n_reserved = 0
        self.rates: dict[Unit, Rate] = {}

    @property
    def limits(self) -> TenantLimits:
        """The tenant's, as they were when the request came."""
        return self._tenant.limits

    async def enter(self) -> None:
        """Count the request. Raises RateLimited, LimitsUnreachable."""
        self._running = self._limiter.begin(self._tenant)
        try:
            self._check_at_once()
            if self.limits.requests_per_minute is not None:
                await self._count_request(self.limits.requests_per_minute)
        except BaseException:
            self._limiter.end(self._tenant, 0)
            raise

    async def reserve(self, n_tokens: int) -> None:
        """Take what the request may use at the most, until it leaves.

        Raises RateLimited, QuotaExceeded, LimitsUnreachable.
        """
        limiter, name = self._limiter, self._tenant.name
        totals = {
            period: await limiter.ask(limiter.store.total(name, period))
            for period in _quotas(self.limits)
        }
        a_minute = self.limits.tokens_per_minute
        window = None
        if a_minute is not None:
            window = await limiter.ask(limiter.store.window(_key(name, "tokens")))
        # From here on nothing is awaited: no other request reserves in between.
        for period, total in totals.items():
            if total is not None:
                self._check_quota(period, total, n_tokens)
        if a_minute is not None and window is not None:
            self._check_rate(a_minute, window, n_tokens)
        self._running.n_reserved_tokens += n_tokens
        self._n_reserved += n_tokens
        if a_minute is not None and window is not None:
            self._note("tokens", a_minute, window, self._running.n_reserved_tokens)

    def leave(self, n_used_tokens: int = 0) -> None:
        """Give back what was taken, and count what was really used."""
        self._limiter.end(self._tenant, self._n_reserved)
        if not n_used_tokens:
            return
        store, name = self._limiter.store, self._tenant.name
        if self.limits.tokens_per_minute is not None:
            store.add(_key(name, "tokens"), n_used_tokens)
        for period in _quotas(self.limits):
            store.add_total(name, period, n_used_tokens)

    def _check_at_once(self) -> None:
        limit = self.limits.max_concurrent_requests
        if limit is not None and self._running.n_requests > limit:
            raise TooManyAtOnce(
                f"The tenant's limit of {limit} requests at once is reached. "
                f"Please try again in {duration(SOON_S)}.",
                retry_after_s=SOON_S,
            )

    async def _count_request(self, limit: int) -> None:
        limiter, key = self._limiter, _key(self._tenant.name, "requests")
        is_counted = await limiter.ask(limiter.store.hit(key, limit))
        if is_counted is None:
            return
        window = await limiter.ask(limiter.store.window(key))
        if window is not None:
            self._note("requests", limit, window)
        if not is_counted:
            wait_s = SOON_S if window is None else window.wait_s(window.used + 1 - limit)
            raise RateLimited(
                f"The tenant's limit of {limit} requests a minute is reached. "
                f"Please try again in {duration(wait_s)}.",
                retry_after_s=wait_s,
            )

    def _note(self, unit: Unit, limit: int, window: Window, n_reserved: int = 0) -> None:
        remaining = max(0, limit - window.used - n_reserved)
        self.rates[unit] = Rate(limit, remaining, window.reset_s)

    def _check_rate(self, limit: int, window: Window, n_tokens: int) -> None:
        used, n_reserved = window.used, self._running.n_reserved_tokens
        excess = used + n_reserved + n_tokens - limit
        if excess <= 0:
            return
        self._note("tokens", limit, window, n_reserved)
        if n_tokens > limit:
            raise RateLimited(
                f"The request may take {n_tokens} tokens (prompts and outputs), but the tenant's "
                f"limit is {limit} tokens a minute. Shorten the prompt or lower max_tokens."
            )
        wait_s = max(SOON_S, window.wait_s(min(excess, used)))
        raise RateLimited(
            f"The tenant's limit of {limit} tokens a minute is reached: {used} were used, "
            f"{n_reserved} are reserved by running requests, {n_tokens} are asked for. "
            f"Please try again in {duration(wait_s)}.",
            retry_after_s=wait_s,
        )

    def _check_quota(self, period: QuotaPeriod, used: int, n_tokens: int) -> None:
        limit = _quotas(self.limits)[period]
        left = limit - used - self._running.n_reserved_tokens
        if n_tokens <= left:
            return
        raise QuotaExceeded(
            f"Of the tenant's quota of {limit} tokens a {period.value} (UTC) {max(0, left)} are "
            f"left, and the request may take {n_tokens}. Ask whoever runs this server for more."
        )


def limiter_of(
    settings: Settings,
    ledger: UsedTokens | None = None,
    on_unreachable: Callable[[], None] = lambda: None,
) -> Limiter:
    """Return what decides by the settings' store. Raises ConfigError.

    ledger  what goes on with days and months after a start, unless the store is shared
    """
    store = _store_of(settings, ledger)
    return Limiter(store, fail_open=settings.limits_fail_open, on_unreachable=on_unreachable)


def _store_of(settings: Settings, ledger: UsedTokens | None) -> LimitStore:
    if is_shared(settings):
        # Here, because few servers need the libraries.
        from server.tenants.shared import SharedStore, shared_storage

        return SharedStore(shared_storage(settings.limits_storage.get_secret_value()))
    return MemoryStore(ledger)


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it in its headers: ``12ms``, ``1.5s``, ``6m0s``."""
    ms = math.ceil(max(0.0, seconds) * 1000)
    if 0 < ms < 1000:
        return f"{ms}ms"
    hours, ms = divmod(ms, 3_600_000)
    minutes, ms = divmod(ms, 60_000)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def _key(tenant: str, unit: Unit) -> str:
    return f"{tenant}/{unit}"


def _quotas(limits: TenantLimits) -> dict[QuotaPeriod, int]:
    quotas = {QuotaPeriod.DAY: limits.tokens_per_day, QuotaPeriod.MONTH: limits.tokens_per_month}
    return {period: limit for period, limit in quotas.items() if limit is not None}
