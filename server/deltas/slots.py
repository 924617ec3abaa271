"""Which digest sits in which slot, who uses it, and what may be evicted.

A slot is held by a reference count: nothing with a reference is ever evicted, and a slot's index is
given away only after its last holder released it. A `Slot` is one stay of one variant: whoever kept
it compares it with `SlotTable.get` to learn whether that stay has ended. Used by the engine thread
only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Slot:
    """One resident (or arriving) variant."""

    index: int
    key: str
    n_bytes: int
    refs: int = 0
    last_used: int = 0
    ready: bool = False  # the delta is in place and visible


class SlotTable:
    """LRU over slots under a byte budget."""

    def __init__(self, n_slots: int, budget_bytes: int) -> None:
        self.n_slots = n_slots
        self.budget_bytes = budget_bytes
        self._by_key: dict[str, Slot] = {}
        self._clock = itertools.count(1)

    @property
    def used_bytes(self) -> int:
        return sum(slot.n_bytes for slot in self._by_key.values())

    def get(self, key: str) -> Slot | None:
        return self._by_key.get(key)

    def residents(self) -> list[Slot]:
        return list(self._by_key.values())

    def acquire(self, key: str) -> Slot | None:
        """Take a reference to a ready slot, or None if the key is not resident."""
        slot = self._by_key.get(key)
        if slot is None or not slot.ready:
            return None
        slot.refs += 1
        slot.last_used = next(self._clock)
        return slot

    def release(self, slot: Slot) -> None:
        assert slot.refs > 0, "slot released more often than acquired"
        slot.refs -= 1

    def victims_for(self, n_bytes: int) -> list[Slot] | None:
        """Least recently used slots to evict so that `n_bytes` fit; None if that cannot be now."""
        idle = sorted(
            (s for s in self._by_key.values() if s.ready and s.refs == 0),
            key=lambda s: s.last_used,
        )
        free = self.n_slots - len(self._by_key)
        room = self.budget_bytes - self.used_bytes
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

    def assign(self, key: str, n_bytes: int) -> Slot:
        """Give `key` the lowest free slot. Call `victims_for` and `evict` first."""
        taken = {slot.index for slot in self._by_key.values()}
        index = next(i for i in range(self.n_slots) if i not in taken)
        slot = Slot(index, key, n_bytes, last_used=next(self._clock))
        self._by_key[key] = slot
        return slot
