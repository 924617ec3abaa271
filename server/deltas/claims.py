"""For which tenants variants are loaded, and what those give up for it: see `server.deltas.slots`.

What a tenant may not hold now, since its bytes are bounded and all that it holds is in use or
pinned, is not loaded for it. How large a variant is, is known from its first load on: what is then
too much is dropped and read again later, so that it takes no place of others' loads meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from server.deltas.failures import MEND_S, Failure
from server.deltas.slots import Holder, Slot, SlotTable

log = logging.getLogger(__name__)


class Claims:
    """Engine thread only, but for `keep`.

    evict  takes a slot's delta out of device memory
    """

    def __init__(self, slots: SlotTable, evict: Callable[[Slot], None]) -> None:
        self._slots = slots
        self._evict = evict
        self._holders: dict[str, dict[str, Holder]] = {}  # by key and tenant, of loads under way
        self._sizes: dict[str, int] = {}  # device bytes by key

    def want(self, key: str, holders: Iterable[Holder]) -> None:
        """A load under way is for these tenants too."""
        wanted = self._holders.setdefault(key, {})
        wanted.update((holder.tenant, holder) for holder in holders)

    def is_wanted(self, key: str) -> bool:
        """Whether a load under way is for any tenant."""
        return key in self._holders

    def has_room(self, key: str) -> bool:
        """Whether a tenant that a load is for may hold it and give up nothing."""
        return any(self.victims(key, holder) == [] for holder in self._holders[key].values())

    def ended(self, key: str) -> None:
        """A load is under way no more."""
        self._holders.pop(key, None)

    def decoded(self, key: str, n_bytes: int) -> None:
        """It is known how large a variant is."""
        self._sizes[key] = n_bytes

    def size_of(self, key: str) -> int | None:
        """Device bytes of a variant, None if it never was decoded."""
        return self._sizes.get(key)

    def keep(self, keys: Collection[str]) -> None:
        """Forget the sizes of all other variants. Any thread."""
        for key in list(self._sizes):
            if key not in keys:
                self._sizes.pop(key, None)

    def victims(self, key: str, holder: Holder) -> list[Slot] | None:
        """What a tenant gives up to hold this variant, as far as its size is known; None if it may
        not hold it now.
        """
        n_bytes = self.size_of(key)
        return [] if n_bytes is None else self._slots.own_victims(holder, key, n_bytes)

    def give_up(self, victims: Sequence[Slot], tenant: str) -> None:
        """Let a tenant hold these no more, and evict those that nobody else uses."""
        for slot in victims:
            if self._slots.give_up(slot, tenant):
                log.info("tenant %s gives up the delta in slot %d", tenant, slot.index)
                self._evict(slot)

    def holder_for(self, key: str) -> Holder | None:
        """A tenant that a load is for and that may hold it, for which it has made room; None: none
        of them may now.
        """
        for holder in self._holders[key].values():
            victims = self.victims(key, holder)
            if victims is not None:
                self.give_up(victims, holder.tenant)
                return holder
        return None

    def beside_pinned(self, n_bytes: int) -> Failure:
        """Why so many bytes have no room beside what is pinned."""
        slots = self._slots
        pinned = [slot for slot in slots.residents() if slot.key in slots.pinned]
        return Failure(
            f"it needs {n_bytes} bytes of device memory, and {len(pinned)} pinned variants take "
            f"{sum(slot.n_bytes for slot in pinned)} of {slots.budget_bytes} bytes and "
            f"{len(pinned)} of {slots.n_slots} slots",
            "an operator must pin less, or raise --delta-budget-bytes or --max-resident-variants",
            retry_after_s=MEND_S,
        )
