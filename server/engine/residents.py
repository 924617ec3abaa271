"""Who gets which slot: requests, within their tenants' bounds, and pinned variants."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.deltas.loader import DeltaLoader
from server.deltas.loads import LoadFailed, LoadJob
from server.deltas.slots import Holder, Slot, SlotTable
from server.engine.request import Request
from server.engine.schedule.scheduler import Missing
from server.engine.variant import BASE_KEY, Variant
from server.errors import Forbidden, NoSlot, ServeError
from server.tenants.principal import SERVER as OPERATORS
from server.tenants.principal import Principal

log = logging.getLogger(__name__)
RETRY_AFTER_S = 5
SERVER = Holder(OPERATORS.tenant)


@dataclass(frozen=True, slots=True)
class Pin:
    """A variant that stays resident, and the tenants it stays for."""

    variant: Variant
    holders: tuple[Holder, ...]


class Residents:
    """Engine thread only. The loader brings in what is missing here."""

    def __init__(
        self, slots: SlotTable, loader: DeltaLoader, job_for: Callable[[Variant], LoadJob]
    ) -> None:
        self._slots = slots
        self._loader = loader
        self._job_for = job_for
        self._pins: dict[str, Pin] = {}
        self._unloaded: list[str] = []  # keys of pins that are still to be loaded
        self._refused: list[tuple[Request, ServeError]] = []
        self._unchecked: dict[str, Holder] = {}  # by tenant, who may hold too much
        self.ordered: set[str] = set()  # keys that operators wait for

    # -- requests --------------------------------------------------------------------------------

    def acquire(self, request: Request) -> Slot | Missing:
        """Take a slot for the request, or see to it that its delta is being loaded."""
        key, holder = request.variant.key, holder_of(request.principal)
        slot, victims = self._slots.get(key), self._loader.claims.victims(key, holder)
        if slot is None and (error := self._refusal(request, holder)) is not None:
            self._refused.append((request, error))
            return Missing.NO_ROOM
        if victims is None:
            return Missing.OVER_BOUND
        if slot is None:
            self._loader.request(self._job_for(request.variant), [holder])
            if self._loader.is_loading(key):  # now: else those might be in use when it is there
                self._loader.claims.give_up(victims, holder.tenant)
        elif slot.ready and not slot.leaving:
            self._loader.claims.give_up(victims, holder.tenant)
            taken = self._slots.acquire(key, holder)
            assert taken is slot, "a ready slot can be acquired"
            return taken
        return Missing.NO_ROOM if self._loader.needs_room(key) else Missing.LOADING

    def take_loaded(self, request: Request) -> None:
        """Give a request the slot of its variant that has just arrived, before it can be evicted,
        unless its tenant must give something up for it: a step may be in flight.
        """
        key, holder = request.variant.key, holder_of(request.principal)
        if self._loader.claims.victims(key, holder) == []:
            request.slot = self._slots.acquire(key, holder)

    def release(self, request: Request) -> None:
        """Give the request's slot back, if it has one."""
        if request.slot is not None:
            self._slots.release(request.slot, request.principal.tenant)
            request.slot = None
            if self._loader.wants_room() or self._loader.evictions_wait:
                self._loader.turn_wanted = True
            self._check_bounds([holder_of(request.principal)])

    def forget(self, key: str, *, waits: bool) -> None:
        """Somebody does not want a variant any more that was not there yet.

        waits  whether other requests do
        """
        if not waits and key not in self.ordered and key not in self._unloaded:
            self._loader.forget(key)

    def trim(self) -> None:
        """Have tenants give up what they hold beyond their bounds: those were lowered, or more was
        pinned for them. No step may be in flight.
        """
        for holder in self._unchecked.values():
            self._loader.claims.give_up(self._slots.excess(holder), holder.tenant)
        self._unchecked.clear()

    def _check_bounds(self, holders: Iterable[Holder]) -> None:
        bounded = (holder for holder in holders if holder.max_bytes is not None)
        self._unchecked.update((holder.tenant, holder) for holder in bounded)

    def take_refused(self) -> list[tuple[Request, ServeError]]:
        """Requests whose variant can have no slot while things are as they are; they are forgotten
        here.
        """
        refused, self._refused = self._refused, []
        return refused

    def why_waiting(self, request: Request) -> NoSlot | None:
        """What a request hears that waited for room until its time was up; None if it did not."""
        key, name = request.variant.key, request.variant.name
        if request.slot is not None or key == BASE_KEY:
            return None
        if self._loader.claims.victims(key, holder_of(request.principal)) is None:
            whose = "its tenant's other variants, which all were in use,"
        elif self._loader.needs_room(key):
            whose = "other variants"
        else:
            return None
        return NoSlot(
            f"`{name}` waited for {whose} to make room until its time was up; try again later",
            retry_after_s=RETRY_AFTER_S,
        )

    def _refusal(self, request: Request, holder: Holder) -> ServeError | None:
        """Why a variant of known size can never be resident beside what is pinned, if so."""
        if holder.max_bytes is None and not self._slots.pinned:
            return None
        key, name = request.variant.key, request.variant.name
        n_bytes = self._loader.claims.size_of(key)
        if n_bytes is None:
            return None
        if not self._slots.fits(key, n_bytes):
            return self._loader.claims.beside_pinned(n_bytes).error_for(name)
        if not self._slots.may_ever_hold(holder, key, n_bytes):
            return Forbidden(f"`{name}` cannot be loaded: {self._over_bound(holder, n_bytes)}")
        return None

    def _over_bound(self, holder: Holder, n_bytes: int) -> str:
        pinned = self._slots.pinned_bytes(holder.tenant)
        return (
            f"it needs {n_bytes} bytes of device memory, and tenant {holder.tenant} may hold "
            f"{holder.max_bytes} bytes, of which pinned variants take {pinned}; an operator must "
            "raise its resident_bytes or pin less"
        )

    # -- pinned variants -------------------------------------------------------------------------

    def pin(self, pins: Sequence[Pin]) -> None:
        """Evict none of these from now on, and load those that are not there; others are pinned no
        more.
        """
        self._pins = {pin.variant.key: pin for pin in pins}
        tenants = {k: frozenset(h.tenant for h in p.holders) for k, p in self._pins.items()}
        self._slots.pin(tenants)
        self._loader.host.pinned = tenants
        self._unloaded = list(self._pins)
        for pin in pins:
            self._check_bounds(pin.holders)

    def tend(self) -> None:
        """Between steps: load pinned variants, one after the other."""
        while self._unloaded:
            pin = self._pins[self._unloaded[0]]
            if not self._is_settled(pin):
                return
            del self._unloaded[0]
            if not self._unloaded:
                self._tell_over()

    def load_failed(self, failed: LoadFailed) -> None:
        """A load ended; one of a pinned variant is an operator's matter."""
        if failed.key in self._pins:
            name = self._pins[failed.key].variant.name
            failure = failed.failure
            log.error("the pinned variant %s: %s; %s", name, failure.reason, failure.remedy)
            self._unloaded = [key for key in self._unloaded if key != failed.key]

    def _is_settled(self, pin: Pin) -> bool:
        """Whether a pin is there or cannot be; else it is being loaded, or waits."""
        key, claims = pin.variant.key, self._loader.claims
        slot = self._slots.get(key)
        if slot is not None or self._loader.is_loading(key):
            is_there = slot is not None and slot.ready and not slot.leaving
            if is_there:
                self._check_bounds(pin.holders)
            return is_there
        n_bytes = claims.size_of(key)
        if n_bytes is not None:
            over = [h for h in pin.holders if not self._slots.may_ever_hold(h, key, n_bytes)]
            if len(over) == len(pin.holders):
                why = self._over_bound(over[0], n_bytes)
                log.error("the variant %s cannot be pinned: %s", pin.variant.name, why)
                return True
        if any(claims.victims(key, holder) is not None for holder in pin.holders):
            self._loader.request(self._job_for(pin.variant), pin.holders)
        return False

    def _tell_over(self) -> None:
        """Tenants may pin what others have loaded, and so more than they may hold."""
        for holder in {holder for pin in self._pins.values() for holder in pin.holders}:
            n_bytes = self._slots.pinned_bytes(holder.tenant)
            if holder.max_bytes is not None and n_bytes > holder.max_bytes:
                log.error(
                    "the pinned variants of tenant %s take %d bytes of device memory, and it may "
                    "hold %d: it can load no other; raise its resident_bytes or pin less",
                    holder.tenant,
                    n_bytes,
                    holder.max_bytes,
                )


def holder_of(principal: Principal) -> Holder:
    """For whom a request's variant is resident."""
    return Holder(principal.tenant, principal.resident_bytes)
