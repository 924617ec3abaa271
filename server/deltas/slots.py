"""Which digest sits in which slot, who uses it, and what may be evicted.

A slot is held by a reference count: nothing with a reference is ever evicted, and a slot's index is
given away only after its last holder released it. Nor is a pinned variant. A `Slot` is one stay of
one variant: whoever kept it compares it with `SlotTable.get` to learn whether that stay has ended.

A variant counts for each tenant that has used it since it is resident, with all of its bytes, and
for those it is pinned for. A tenant whose bytes are bounded (`Holder`) gives up its own, of
those that none of its requests holds. What only it has used is then evicted; what others have used
too stays, and counts for them alone.

Used by the engine thread only.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from server.deltas.costs import in_order_of_worth


@dataclass(frozen=True, slots=True)
class Holder:
    """A tenant that variants are resident for, and how many bytes of them it may hold."""

    tenant: str
    max_bytes: int | None = None


@dataclass(slots=True)
class SlotUse:
    """One tenant's use of a slot."""

    refs: int = 0
    last_used: int = 0
    used_at: float | None = None


@dataclass(slots=True, eq=False)
class Slot:
    """One resident (or arriving) variant."""

    index: int
    key: str
    n_bytes: int
    refs: int = 0
    last_used: int = 0
    ready: bool = False  # the delta is in place and visible
    leaving: bool = False  # who has it goes on, nobody else gets it
    used_at: float = field(default_factory=time.monotonic)  # since then nobody has taken it
    uses: dict[str, SlotUse] = field(default_factory=dict)  # by tenant


class SlotTable:
    """Slots under a byte budget. Which goes first: see `server.deltas.costs`.

    reload_s  what bringing a slot's variant back takes; by default they are all alike
    """

    def __init__(self, n_slots: int, budget_bytes: int) -> None:
        self.n_slots = n_slots
        self.budget_bytes = budget_bytes
        self.pinned: Mapping[str, Collection[str]] = {}  # key -> tenants; see `pin`
        self._by_key: dict[str, Slot] = {}
        self.reload_s: Callable[[Slot], float] = lambda slot: 0.0
        self._clock = itertools.count(1)
        self._now = 0
        # Asked for each request that waits, in each step: kept, not summed up.
        self._held_bytes: Counter[str] = Counter()  # by tenant
        self._unused: dict[str, list[Slot]] = {}  # by tenant, until something changes

    @property
    def used_bytes(self) -> int:
        return sum(slot.n_bytes for slot in self._by_key.values())

    def get(self, key: str) -> Slot | None:
        return self._by_key.get(key)

    def residents(self) -> list[Slot]:
        return list(self._by_key.values())

    def pin(self, pinned: Mapping[str, Collection[str]]) -> None:
        """Evict none of these keys from now on, and of others that were pinned any.

        pinned  with the tenants that each is pinned for
        """
        self.pinned = pinned
        self._unused.clear()
        for slot in self._by_key.values():
            self._count_pinned(slot)

    def acquire(self, key: str, holder: Holder | None = None) -> Slot | None:
        """Take a reference to a ready slot, or None if the key is not resident.

        holder  the tenant whose request takes it; ask `own_victims` first. None: the server's own
        """
        slot = self._by_key.get(key)
        if slot is None or not slot.ready:
            return None
        slot.refs += 1
        slot.last_used = self._tick()
        slot.used_at = time.monotonic()
        if holder is not None:
            self._count(slot, holder.tenant)
            use = slot.uses[holder.tenant]
            use.refs += 1
            use.last_used, use.used_at = slot.last_used, slot.used_at
            self._unused.pop(holder.tenant, None)
        return slot

    def release(self, slot: Slot, tenant: str | None = None) -> None:
        """Give a reference back, for the tenant that it was taken for."""
        assert slot.refs > 0, "slot released more often than acquired"
        slot.refs -= 1
        slot.used_at = time.monotonic()
        if tenant is not None:
            assert slot.uses[tenant].refs > 0, "slot released more often than acquired"
            slot.uses[tenant].refs -= 1
            slot.uses[tenant].used_at = slot.used_at
            self._unused.pop(tenant, None)

    # -- room under the budget of all ------------------------------------------------------------

    def fits(self, key: str, n_bytes: int) -> bool:
        """Whether there can be room, beside what is pinned."""
        pinned = [slot for slot in self._resident_pinned() if slot.key != key]
        room = self.budget_bytes - sum(slot.n_bytes for slot in pinned)
        return len(pinned) < self.n_slots and n_bytes <= room

    def victims_for(self, n_bytes: int) -> list[Slot] | None:
        """Slots to evict so that `n_bytes` fit; None if that cannot be now."""
        free = self.n_slots - len(self._by_key)
        room = self.budget_bytes - self.used_bytes
        if free >= 1 and room >= n_bytes:
            return []
        idle = [s for s in self._by_key.values() if s.ready and s.refs == 0 and not self._stays(s)]
        idle = self._in_order(idle, [slot.last_used for slot in idle])
        victims: list[Slot] = []
        while free < 1 or room < n_bytes:
            if len(victims) == len(idle):
                return None
            victims.append(idle[len(victims)])
            free += 1
            room += victims[-1].n_bytes
        return victims

    def evict(self, slot: Slot) -> None:
        assert slot.refs == 0, "a slot in use must not be evicted"
        del self._by_key[slot.key]
        for tenant in list(slot.uses):
            self._uncount(slot, tenant)

    def assign(self, key: str, n_bytes: int, tenant: str | None = None) -> Slot:
        """Give `key` the lowest free slot, for a tenant. Call `victims_for` and `evict` first."""
        taken = {slot.index for slot in self._by_key.values()}
        index = next(i for i in range(self.n_slots) if i not in taken)
        slot = Slot(index, key, n_bytes, last_used=self._tick())
        self._by_key[key] = slot
        self._count_pinned(slot)
        if tenant is not None:
            self._count(slot, tenant)
        return slot

    # -- room under a tenant's own bound ---------------------------------------------------------

    def held_bytes(self, tenant: str) -> int:
        """Bytes of all variants that count for a tenant."""
        return self._held_bytes[tenant]

    def may_ever_hold(self, holder: Holder, key: str, n_bytes: int) -> bool:
        """Whether a tenant may hold so many bytes more, beside what is pinned for it."""
        if holder.max_bytes is None:
            return True
        return n_bytes + self.pinned_bytes(holder.tenant, beside=key) <= holder.max_bytes

    def pinned_bytes(self, tenant: str, beside: str = "") -> int:
        """Bytes of the resident variants that are pinned for a tenant, `beside` not counted."""
        pinned = (slot for slot in self._resident_pinned() if tenant in self.pinned[slot.key])
        return sum(slot.n_bytes for slot in pinned if slot.key != beside)

    def own_victims(self, holder: Holder, key: str, n_bytes: int) -> list[Slot] | None:
        """What a tenant gives up so that it may hold `key`; None if that cannot be now."""
        slot = self._by_key.get(key)
        if holder.max_bytes is None or (slot is not None and holder.tenant in slot.uses):
            return []
        over = self.held_bytes(holder.tenant) + n_bytes - holder.max_bytes
        victims = self._least_recent(holder.tenant, over)
        return None if sum(slot.n_bytes for slot in victims) < over else victims

    def excess(self, holder: Holder) -> list[Slot]:
        """What a tenant gives up that holds too much: so it is when more was pinned for it."""
        if holder.max_bytes is None:
            return []
        return self._least_recent(holder.tenant, self.held_bytes(holder.tenant) - holder.max_bytes)

    def _least_recent(self, tenant: str, n_bytes: int) -> list[Slot]:
        """Slots of so many bytes that a tenant may give up, or all of those."""
        if n_bytes <= 0:
            return []
        idle = [slot for slot in self._unused_by(tenant) if slot.ready]
        before = itertools.accumulate((s.n_bytes for s in idle), initial=0)
        return [slot for slot, n_given in zip(idle, before, strict=False) if n_given < n_bytes]

    def give_up(self, slot: Slot, tenant: str) -> bool:
        """A slot counts for a tenant no more. Returns whether it is to be evicted: nobody else has
        used it.
        """
        assert slot.uses[tenant].refs == 0, "a tenant must not give up what it uses"
        self._uncount(slot, tenant)
        return not slot.uses and slot.refs == 0

    def _unused_by(self, tenant: str) -> list[Slot]:
        """What counts for a tenant and none of its requests holds, nor is pinned for it; that first
        which is to go first.
        """
        if tenant not in self._unused:
            found = [slot for slot in self._by_key.values() if self._is_unused(slot, tenant)]
            last_used = [slot.uses[tenant].last_used for slot in found]
            self._unused[tenant] = self._in_order(found, last_used)
        return self._unused[tenant]

    def _in_order(self, slots: list[Slot], last_used: list[int]) -> list[Slot]:
        return in_order_of_worth(slots, self._now, last_used, [self.reload_s(s) for s in slots])

    def _tick(self) -> int:
        self._now = next(self._clock)
        return self._now

    def _is_unused(self, slot: Slot, tenant: str) -> bool:
        use = slot.uses.get(tenant)
        return use is not None and use.refs == 0 and tenant not in self.pinned.get(slot.key, ())

    def _stays(self, slot: Slot) -> bool:
        return slot.key in self.pinned

    def _resident_pinned(self) -> Iterator[Slot]:
        return (self._by_key[key] for key in self.pinned if key in self._by_key)

    def _count_pinned(self, slot: Slot) -> None:
        for tenant in self.pinned.get(slot.key, ()):
            self._count(slot, tenant)

    def _count(self, slot: Slot, tenant: str) -> None:
        if tenant not in slot.uses:
            slot.uses[tenant] = SlotUse(last_used=slot.last_used)
            self._held_bytes[tenant] += slot.n_bytes
            self._unused.pop(tenant, None)

    def _uncount(self, slot: Slot, tenant: str) -> None:
        del slot.uses[tenant]
        self._unused.pop(tenant, None)
        self._held_bytes[tenant] -= slot.n_bytes
        if self._held_bytes[tenant] == 0:
            del self._held_bytes[tenant]
