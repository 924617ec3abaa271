"""What operators ask of variants: to be loaded, prefetched or unloaded, now or when nobody has used
them for so long; and what the folder has no more, which goes once nobody holds it.

Engine thread only. Whoever asks is told by `done`, with the error if it could not be.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from server.deltas.loader import DeltaLoader
from server.deltas.loads import LoadFailed, LoadJob
from server.deltas.slots import Slot, SlotTable
from server.engine.life_types import Tier
from server.engine.residents import SERVER, Residents
from server.engine.variant import Variant
from server.errors import Conflict, ServeError

log = logging.getLogger(__name__)
TTL_CHECK_S = 0.5

Done = Callable[[ServeError | None], None]


@dataclass(eq=False, slots=True)
class Order:
    """A variant that is to be brought into a tier."""

    variant: Variant
    tier: Tier
    done: Done


@dataclass(eq=False, slots=True)
class _Unload:
    slot: Slot
    done: Done


class Orders:
    """See the module's docstring.

    job_for  how a variant is read
    waits    whether requests wait for a key's slot
    """

    def __init__(
        self,
        slots: SlotTable,
        loader: DeltaLoader,
        residents: Residents,
        job_for: Callable[[Variant], LoadJob],
        waits: Callable[[str], bool],
    ) -> None:
        self._slots = slots
        self._loader = loader
        self._residents = residents
        self._job_for = job_for
        self._waits = waits
        self._open: list[Order] = []
        self._unloads: list[_Unload] = []
        self._ttls: dict[str, float] = {}
        self._gone: set[str] = set()  # keys of slots that the folder has no more
        self._ttl_check = 0.0

    # -- what is asked -----------------------------------------------------------------------------

    def bring(self, order: Order) -> None:
        """Begin to carry out an order, before the next step."""
        self._open.append(order)
        self._residents.ordered.update({order.variant.key})

    def drop(self, order: Order) -> None:
        """Whoever gave an order does not wait for it any more."""
        if order in self._open:
            self._close(order)
            self._residents.forget(order.variant.key, waits=self._waits(order.variant.key))

    def unload(self, key: str, name: str, *, force: bool, done: Done) -> None:
        """Take a variant out of both memories, `force`: when the last request that holds it ends.
        Until then no other gets it.
        """
        slot = self._slots.get(key)
        if key in self._slots.pinned:
            done(Conflict(f"`{name}` is pinned. Unpin it first."))
        elif self._loader.is_loading(key) or (slot is not None and not slot.ready):
            done(Conflict(f"`{name}` is being loaded. Try again when it is ready."))
        elif slot is None:
            self._loader.host.drop(key)
            done(None)
        elif slot.refs and not force:
            done(
                Conflict(
                    f"{slot.refs} requests use `{name}`. Try again later, or with ?force=true, "
                    "which lets them end first."
                )
            )
        else:
            self._leave(slot, done)

    def expire_after(self, ttls: Mapping[str, float]) -> None:
        """Unload these keys when they were not used for so many seconds; no others."""
        self._ttls = dict(ttls)

    def keep(self, keys: Collection[str]) -> None:
        """The folder has these variants and no others."""
        self._loader.keep(keys)
        self._gone = {slot.key for slot in self._slots.residents()} - set(keys)
        self._loader.turn_wanted = self._loader.turn_wanted or bool(self._gone)

    # -- what comes of it --------------------------------------------------------------------------

    def tend(self) -> None:
        """Between steps: begin what waits, and see what is there."""
        for order in list(self._open):
            key = order.variant.key
            slot = self._slots.get(key)
            is_there = slot is not None and slot.ready and not slot.leaving
            if is_there or (order.tier == "host" and self._loader.host.bytes_of(key)):
                self._close(order)
                order.done(None)
            elif slot is None:
                self._begin(order)
        if self._ttls and time.monotonic() >= self._ttl_check:
            self._ttl_check = time.monotonic() + TTL_CHECK_S
            self._expire()

    def _begin(self, order: Order) -> None:
        """Begin to load, unless it is under way; ask again then, since its askers may have left."""
        job = self._job_for(order.variant)
        if order.tier == "device":
            self._loader.request(job, [SERVER])
        elif not self._loader.is_loading(job.key):
            self._loader.prefetch(job)

    def load_failed(self, failed: LoadFailed) -> None:
        """A load ended: those who ordered it hear why."""
        for order in [order for order in self._open if order.variant.key == failed.key]:
            self._close(order)
            order.done(failed.failure.error_for(order.variant.name))

    def trim(self) -> None:
        """Take out what is to go and nobody holds. No step may be in flight."""
        for unload in list(self._unloads):
            slot = unload.slot
            if self._slots.get(slot.key) is slot:
                if slot.refs:
                    continue
                self._loader.unload(slot)
            self._unloads.remove(unload)
            unload.done(None)
        for key in list(self._gone):
            self._trim_gone(key)
        self._loader.evictions_wait = bool(self._unloads or self._gone)

    def stop(self, error: ServeError) -> None:
        """The engine ends: nothing more will be done."""
        orders, self._open = self._open, []
        unloads, self._unloads = self._unloads, []
        for done in [*(order.done for order in orders), *(one.done for one in unloads)]:
            done(error)

    def _trim_gone(self, key: str) -> None:
        slot = self._slots.get(key)
        if slot is None:
            self._gone.discard(key)
            return
        is_idle = slot.ready and not slot.refs and key not in self._slots.pinned
        if is_idle and not self._waits(key):
            self._loader.unload(slot)
            self._gone.discard(key)

    def _expire(self) -> None:
        now = time.monotonic()
        for key, ttl_s in self._ttls.items():
            slot = self._slots.get(key)
            if key in self._slots.pinned or self._loader.is_loading(key):
                continue
            if slot is None:
                self._loader.host.expire(key, now - ttl_s)
            elif slot.ready and not slot.refs and not slot.leaving and now - slot.used_at > ttl_s:
                log.info("nobody has used the delta in slot %d for %g s", slot.index, ttl_s)
                self._leave(slot, lambda error: None)

    def _leave(self, slot: Slot, done: Done) -> None:
        slot.leaving = True
        self._unloads.append(_Unload(slot, done))
        self._loader.turn_wanted = self._loader.evictions_wait = True

    def _close(self, order: Order) -> None:
        self._open.remove(order)
        key = order.variant.key
        if not any(other.variant.key == key for other in self._open):
            self._residents.ordered.discard(key)
