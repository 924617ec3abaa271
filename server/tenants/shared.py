"""What tenants used of several servers together: counted in Redis, by the `limits` library.

Its sliding window is that of two counters, the last minute's of which is taken for evenly used; it
goes by Redis's clock, never by a server's. What has been used is added behind the answer: counted
here at once, there within a moment, and when Redis is away, as soon as it is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import urlsplit

from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from server.errors import ConfigError
from server.tenants.store import WINDOW_S, Calendar, QuotaPeriod, StoreUnreachable, Window

SCHEMES = ("redis", "rediss", "redis+unix")  # the library has more, which nobody has tried here
ANSWER_S = 1.0  # within which Redis answers, or is taken for away
AWAY_S = 2.0  # for how long nobody waits for it then
NO_LIMIT = 1 << 53  # Lua's numbers are exact up to here
PERIOD_S = {
    QuotaPeriod.DAY: 2 * 86_400,
    QuotaPeriod.MONTH: 33 * 86_400,
}  # kept for longer than they last

log = logging.getLogger(__name__)
T = TypeVar("T")


class Storage(Protocol):
    """The part of a `limits.aio` storage that is used here."""

    async def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool: ...

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]: ...

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int: ...

    async def get(self, key: str) -> int: ...


@dataclass(frozen=True, slots=True)
class SharedWindow:
    """The library's two counters: of the minute before, and of the one that runs.

    before_s   until none of `n_before` counts any more, when the running minute becomes it; of it
               counts the share of a minute that this is
    current_s  until nothing of `n_current` counts any more
    n_owed     what Redis is still to be told
    """

    n_before: int
    before_s: float
    n_current: int
    current_s: float
    n_owed: int = 0

    @property
    def used(self) -> int:
        return math.floor(self.n_before * self.before_s / WINDOW_S) + self.n_current + self.n_owed

    @property
    def reset_s(self) -> float:
        if self.n_owed:
            return 2 * WINDOW_S
        return self.current_s if self.n_current else self.before_s

    def wait_s(self, excess: int) -> float:
        counts_before = self.n_before * self.before_s / WINDOW_S
        if excess <= counts_before:
            return excess * WINDOW_S / max(1, self.n_before)
        if not self.n_current:
            return self.reset_s
        left_s = max(0.0, self.current_s - WINDOW_S)
        return min(self.reset_s, left_s + (excess - counts_before) * WINDOW_S / self.n_current)


class _Owed(NamedTuple):
    """What Redis is to be told of: a window (no period's seconds) or a period's total."""

    key: str
    period_s: int | None


class SharedStore:
    """See `LimitStore`. Event loop only, and one loop only."""

    def __init__(
        self,
        storage: Storage,
        calendar: Calendar | None = None,
        *,
        answer_s: float = ANSWER_S,
        away_s: float = AWAY_S,
    ) -> None:
        self._storage = storage
        self._answer_s = answer_s
        self._away_s = away_s
        self._calendar = calendar or Calendar()
        self._owed: Counter[_Owed] = Counter()
        self._telling: asyncio.Task[None] | None = None
        self._is_away = False
        self._away_until = -math.inf  # until then it is not asked

    async def hit(self, key: str, limit: int) -> bool:
        entry = self._storage.acquire_sliding_window_entry(key, limit, int(WINDOW_S))
        return await self._answer(entry)

    async def window(self, key: str) -> Window:
        counters = await self._answer(self._storage.get_sliding_window(key, int(WINDOW_S)))
        return SharedWindow(*counters, n_owed=self._owed[_Owed(key, None)])

    def add(self, key: str, n_used: int) -> None:
        self._owe(_Owed(key, None), n_used)

    async def total(self, tenant: str, period: QuotaPeriod) -> int:
        key = self._period_key(tenant, period)
        told = await self._answer(self._storage.get(key))
        return told + self._owed[_Owed(key, PERIOD_S[period])]

    def add_total(self, tenant: str, period: QuotaPeriod, n_used: int) -> None:
        self._owe(_Owed(self._period_key(tenant, period), PERIOD_S[period]), n_used)

    async def close(self) -> None:
        """Tell Redis what it is owed, if it answers, and close the connections."""
        if self._telling is not None:
            await asyncio.wait({self._telling}, timeout=self._answer_s)
            self._telling.cancel()
        client = getattr(getattr(self._storage, "bridge", None), "storage", None)
        if client is not None:
            await client.aclose()

    def _period_key(self, tenant: str, period: QuotaPeriod) -> str:
        return f"{tenant}/{period.value}/{period.start(self._calendar.now()):%Y-%m-%d}"

    def _owe(self, owed: _Owed, n_used: int) -> None:
        self._owed[owed] += n_used
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        """Tell Redis all it is owed, however long it is away."""
        while self._owed:
            owed, n_used = next(iter(self._owed.items()))
            try:
                await self._answer(self._told(owed, n_used))
            except StoreUnreachable:
                await asyncio.sleep(self._away_s)
                continue
            self._owed[owed] -= n_used
            if not self._owed[owed]:
                del self._owed[owed]

    async def _told(self, owed: _Owed, n_used: int) -> None:
        if owed.period_s is None:
            minute = int(WINDOW_S)
            await self._storage.acquire_sliding_window_entry(owed.key, NO_LIMIT, minute, n_used)
        else:
            await self._storage.incr(owed.key, owed.period_s, n_used)

    async def _answer(self, asked: Coroutine[Any, Any, T]) -> T:
        """Return what Redis answers. Raises StoreUnreachable."""
        if time.monotonic() < self._away_until:
            asked.close()
            raise StoreUnreachable("the storage of the limits did not answer just now")
        try:
            async with asyncio.timeout(self._answer_s):
                answer = await asked
        except (StorageError, OSError, TimeoutError) as error:
            self._away_until = time.monotonic() + self._away_s
            if not self._is_away:
                log.warning(
                    "the storage of the limits cannot be reached (%s)", type(error).__name__
                )
            self._is_away = True
            raise StoreUnreachable("the storage of the limits cannot be reached") from error
        if self._is_away:
            log.warning("the storage of the limits can be reached again")
        self._is_away = False
        return answer


def shared_storage(url: str) -> Storage:
    """Return the library's storage, which connects when it is first asked. Raises ConfigError."""
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise ConfigError(
            f"limits_storage is of the kind {scheme or 'none'}: give memory:// or one of "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )
    try:
        storage = storage_from_string(
            f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="impart",
            socket_connect_timeout=ANSWER_S,
        )
    except (ConfigurationError, ValueError) as error:
        raise ConfigError(
            "limits_storage cannot be used: it is no address, or the redis package is not "
            "installed (pip install 'impart-serve[redis]')"
        ) from error
    return cast(Storage, storage)
