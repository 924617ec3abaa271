"""Where it is kept what tenants used: in a sliding minute, and in days and months.

A minute is counted on the monotonic clock, so that a clock that is set neither frees nor locks
anybody. `MemoryStore` is one server's; `server.tenants.shared` has that of several. The `limits`
library's own memory is not used: it goes by the wall clock, and keeps an entry for each token.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NamedTuple, Protocol

WINDOW_S = 60.0
RESOLUTION_S = 0.1  # uses within it are one entry, which counts for as much longer


class StoreUnreachable(Exception):
    """What tenants used cannot be read now."""


class QuotaPeriod(Enum):
    """What a quota is for."""

    DAY = "day"
    MONTH = "month"

    def start(self, now: datetime) -> datetime:
        """Return when the one that `now` is in began."""
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        return midnight if self is QuotaPeriod.DAY else midnight.replace(day=1)


class Calendar:
    """UTC, as it was when this was made and as the monotonic clock went on since: a clock that is
    set makes no new day.
    """

    def __init__(
        self,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._epoch = now() - timedelta(seconds=monotonic())

    def now(self) -> datetime:
        """Return the time."""
        return self._epoch + timedelta(seconds=self._monotonic())


class Window(Protocol):
    """One count over the last minute."""

    @property
    def used(self) -> int: ...

    @property
    def reset_s(self) -> float:
        """Seconds until nothing of it counts any more."""
        ...

    def wait_s(self, excess: int) -> float:
        """Return the seconds until `excess` of it, at most all, no longer counts."""
        ...


class UsedTokens(Protocol):
    """Who knows what was used before this process began: the ledger."""

    def used_tokens(self, tenant: str, since: datetime) -> int: ...


class LimitStore(Protocol):
    """Counts by key over the last minute, and of tenants' tokens in a period.

    What asks raises StoreUnreachable, in bounded time; what adds never fails and never waits.
    """

    async def hit(self, key: str, limit: int) -> bool:
        """Count one use, unless `limit` are counted: nobody else's comes between."""
        ...

    async def window(self, key: str) -> Window: ...

    def add(self, key: str, n_used: int) -> None: ...

    async def total(self, tenant: str, period: QuotaPeriod) -> int: ...

    def add_total(self, tenant: str, period: QuotaPeriod, n_used: int) -> None: ...

    async def close(self) -> None: ...


class _Use(NamedTuple):
    """Some of a window's count, and until when it counts."""

    n_used: int
    ends: float


class MemoryWindow:
    """Exact but for `RESOLUTION_S`, which is counted for longer and never for less."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._uses: deque[_Use] = deque()
        self._n_used = 0

    @property
    def used(self) -> int:
        self._forget_old()
        return self._n_used

    @property
    def reset_s(self) -> float:
        self._forget_old()
        return self._uses[-1].ends - self._monotonic() if self._uses else 0.0

    def wait_s(self, excess: int) -> float:
        for use in self._uses:
            excess -= use.n_used
            if excess <= 0:
                return max(0.0, use.ends - self._monotonic())
        return self.reset_s

    def add(self, n_used: int) -> None:
        """Count a use of now."""
        self._forget_old()
        ends = self._monotonic() + WINDOW_S + RESOLUTION_S
        if self._uses and ends - self._uses[-1].ends < RESOLUTION_S:
            last = self._uses.pop()
            self._uses.append(_Use(last.n_used + n_used, last.ends))
        else:
            self._uses.append(_Use(n_used, ends))
        self._n_used += n_used

    def _forget_old(self) -> None:
        now = self._monotonic()
        while self._uses and self._uses[0].ends <= now:
            self._n_used -= self._uses.popleft().n_used


@dataclass(slots=True)
class _Total:
    """Tokens since `start`; None where the ledger was not asked yet."""

    start: datetime
    n_used: int | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class MemoryStore:
    """Counts of this process alone; periods go on from what the ledger has. Event loop only.

    ledger  None: periods begin with the process
    """

    def __init__(
        self,
        ledger: UsedTokens | None = None,
        calendar: Calendar | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._calendar = calendar or Calendar()
        self._monotonic = monotonic
        self._windows: dict[str, MemoryWindow] = {}
        self._totals: dict[tuple[str, QuotaPeriod], _Total] = {}

    async def hit(self, key: str, limit: int) -> bool:
        window = self._window(key)
        if window.used >= limit:
            return False
        window.add(1)
        return True

    async def window(self, key: str) -> Window:
        return self._window(key)

    def add(self, key: str, n_used: int) -> None:
        self._window(key).add(n_used)

    async def total(self, tenant: str, period: QuotaPeriod) -> int:
        total = self._total(tenant, period)
        async with total.asking:
            if total.n_used is None:
                total.n_used = await self._used_before(tenant, total.start)
        return total.n_used

    def add_total(self, tenant: str, period: QuotaPeriod, n_used: int) -> None:
        total = self._total(tenant, period)
        if total.n_used is not None:  # else the ledger has these too when it is asked
            total.n_used += n_used

    async def close(self) -> None:
        """Nothing is held."""

    def _window(self, key: str) -> MemoryWindow:
        return self._windows.setdefault(key, MemoryWindow(self._monotonic))

    def _total(self, tenant: str, period: QuotaPeriod) -> _Total:
        """Return the present one; what begins while this process runs begins with nothing."""
        start = period.start(self._calendar.now())
        total = self._totals.get((tenant, period))
        if total is None:
            total = self._totals[tenant, period] = _Total(start)
        elif total.start != start:
            total = self._totals[tenant, period] = _Total(start, 0)
        return total

    async def _used_before(self, tenant: str, start: datetime) -> int:
        if self._ledger is None:
            return 0
        try:
            return await asyncio.to_thread(self._ledger.used_tokens, tenant, start)
        except Exception as error:
            raise StoreUnreachable("the ledger cannot be read") from error
