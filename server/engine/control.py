"""Variants while the server serves, for the HTTP layer. Implements `VariantControl`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from server.deltas.registry import RegisteredDelta
from server.engine.capacity import capacity
from server.engine.catalog import VariantCatalog
from server.engine.core import EngineCore
from server.engine.history import VariantHistory
from server.engine.life_types import EventKind, Tier, VariantDetail, VariantEvent
from server.engine.orders import Done, Order
from server.engine.residents import Pin
from server.engine.variant import Variant
from server.errors import (
    Conflict,
    Draining,
    EngineDead,
    InvalidRequest,
    ModelNotFound,
    ServeError,
)

COMING = ("fetching", "verifying", "failed")  # stages of a name that nothing is served under


class LiveVariants:
    """Event loop only.

    open  opens a variant by its name
    """

    def __init__(
        self,
        core: EngineCore,
        catalog: VariantCatalog,
        history: VariantHistory,
        open: Callable[[str], Awaitable[Variant]],
    ) -> None:
        self._core = core
        self._catalog = catalog
        self._history = history
        self._open = open
        self._ttls: Mapping[str, float] = {}
        self.has_host_tier = core.loader.host.budget_bytes > 0

    def detail(self, name: str, tenant: str | None = None) -> VariantDetail:
        """See VariantControl."""
        delta = self._registered(name)
        key = self._catalog.key_of(delta)
        slot = self._core.slots.get(key)
        n_users, used_at = 0, None
        if slot is not None and tenant is None:
            n_users, used_at = slot.refs, slot.used_at
        elif slot is not None and tenant is not None and (use := slot.uses.get(tenant)):
            n_users, used_at = use.refs, use.used_at
        return VariantDetail(
            finetuned_bytes=delta.finetuned_bytes,
            n_users=n_users,
            last_used_s=None if used_at is None else time.time() - time.monotonic() + used_at,
            loads=self._history.loads(key),
        )

    async def capacity(self, names: Sequence[str]) -> dict[str, Any]:
        """See VariantControl."""
        return await asyncio.to_thread(capacity, self._core, self._catalog, names)

    async def load(self, name: str) -> None:
        await self._bring(name, "device")

    async def prefetch(self, name: str) -> None:
        if not self.has_host_tier:
            raise Conflict(
                "This server keeps no variants in host memory. Start it with "
                "--host-delta-budget-bytes."
            )
        await self._bring(name, "host")

    async def _bring(self, name: str, tier: Tier) -> None:
        self._registered(name)
        variant = await self._open(name)
        order: list[Order] = []

        def begin(done: Done) -> None:
            order.append(Order(variant, tier, done))
            self._core.orders.bring(order[0])

        try:
            await self._done(begin)
        except asyncio.CancelledError:
            self._core.between_steps(lambda: self._core.orders.drop(order[0]))
            raise

    async def unload(self, name: str, *, force: bool = False) -> None:
        """See VariantControl."""
        key = self._catalog.key_of(self._registered(name))
        orders = self._core.orders
        await self._done(lambda done: orders.unload(key, name, force=force, done=done))

    async def _done(self, begin: Callable[[Done], None]) -> None:
        """Have the engine's thread begin something, and wait until it is done. Raises its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(error: ServeError | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(partial(_settle, future, error))

        self._core.admission.hand_over(lambda: self._core.between_steps(partial(begin, done)))
        await future

    async def take_pins(self, pins: Sequence[Pin]) -> None:
        """Have these variants pinned, and return when they are; they are loaded later."""

        def begin(done: Done) -> None:
            self._core.residents.pin(pins)
            done(None)

        with suppress(Draining, EngineDead):  # nothing will be evicted any more
            await self._done(begin)

    def expire_after(self, ttls: Mapping[str, float]) -> None:
        """See VariantControl."""
        self._ttls = ttls
        found = ((self._catalog.find(name), ttl_s) for name, ttl_s in ttls.items())
        by_key = {self._catalog.key_of(delta): ttl_s for delta, ttl_s in found if delta is not None}
        self._core.between_steps(lambda: self._core.orders.expire_after(by_key))

    def again(self) -> None:
        """The names may mean others now."""
        self.expire_after(self._ttls)

    def tell(self, kind: EventKind, name: str) -> None:
        delta = self._catalog.find(name)
        self._history.tell(kind, name, None if delta is None else delta.digest)

    def events(
        self, may_see: Callable[[str], bool], keep_alive_s: float
    ) -> AsyncGenerator[VariantEvent | None]:
        return self._history.feed.read(may_see, keep_alive_s)

    def _registered(self, name: str) -> RegisteredDelta:
        if name == self._catalog.base_name:
            raise InvalidRequest("The base is always in memory; name a variant.", param="model")
        delta = self._catalog.find(name)
        if delta is None:
            raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")
        return delta


def tell_changes(
    history: VariantHistory,
    before: Sequence[RegisteredDelta],
    after: Sequence[RegisteredDelta],
) -> None:
    """Tell what a rescan has changed. Any thread."""
    old = {delta.name: delta for delta in before if delta.stage not in COMING}
    for delta in (delta for delta in after if delta.stage not in COMING):
        known = old.pop(delta.name, None)
        if known is None:
            history.tell("registered", delta.name, delta.digest)
        elif known.digest != delta.digest:
            history.tell("replaced", delta.name, delta.digest)
    for delta in old.values():
        history.tell("removed", delta.name, delta.digest)


def _settle(future: asyncio.Future[None], error: ServeError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
