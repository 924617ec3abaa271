"""The slot table against its promises: budget kept, nothing in use evicted, least recent first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.deltas.slots import Holder, Slot, SlotTable


def load(table: SlotTable, key: str, n_bytes: int) -> Slot | None:
    victims = table.victims_for(n_bytes)
    if victims is None:
        return None
    for victim in victims:
        table.evict(victim)
    slot = table.assign(key, n_bytes)
    slot.ready = True
    return slot


def test_victims_for_evicts_the_least_recently_used_idle_slot() -> None:
    table = SlotTable(2, 100)
    for key in ("a", "b"):
        load(table, key, 10)
    held = table.acquire("a")
    assert held is not None
    table.release(held)
    assert [v.key for v in table.victims_for(10) or []] == ["b"]


def test_victims_for_slots_in_use_are_never_victims() -> None:
    table = SlotTable(2, 100)
    for key in ("a", "b"):
        load(table, key, 10)
        assert table.acquire(key) is not None
    assert table.victims_for(10) is None


def test_acquire_slot_that_is_still_being_stored_is_refused() -> None:
    table = SlotTable(1, 100)
    table.assign("a", 10)
    assert table.acquire("a") is None


def test_place_same_variant_again_is_another_stay() -> None:
    table = SlotTable(1, 100)
    first = load(table, "a", 10)
    assert load(table, "b", 10) is not None
    second = load(table, "a", 10)
    assert first is not None
    assert second is not None
    assert (first.index, first.key) == (second.index, second.key)
    assert table.get("a") is second is not first
    assert first != second


def test_release_more_often_than_acquired_is_a_bug() -> None:
    table = SlotTable(1, 100)
    slot = load(table, "a", 1)
    assert slot is not None
    with pytest.raises(AssertionError):
        table.release(slot)


def test_shared_slot_stays_when_one_of_its_tenants_gives_it_up() -> None:
    table = SlotTable(3, 100)
    slot = load(table, "a", 10)
    assert slot is not None
    for holder in (Holder("t", 15), Holder("u")):
        assert table.acquire("a", holder) is slot
        table.release(slot, holder.tenant)
    assert table.own_victims(Holder("t", 15), "b", 10) == [slot]
    assert not table.give_up(slot, "t"), "u has used it too"
    assert (table.held_bytes("t"), table.held_bytes("u")) == (0, 10)
    assert table.give_up(slot, "u")


def test_pinned_slot_counts_for_its_tenant_before_any_use() -> None:
    table, holder = SlotTable(3, 100), Holder("t", 25)
    load(table, "a", 20)
    table.pin({"a": {"t"}})
    assert table.held_bytes("t") == 20
    assert table.may_ever_hold(holder, "b", 5)
    assert not table.may_ever_hold(holder, "b", 6)
    assert table.own_victims(holder, "b", 6) is None
    assert not table.fits("b", 81)
    assert table.fits("b", 80)
    table.pin({})
    assert [slot.key for slot in table.own_victims(holder, "b", 6) or []] == ["a"]


HOLDERS = (Holder("t", 40), Holder("u", 25), Holder("w"))
N_SLOTS, BUDGET = 3, 60


class World:
    """A table whose promises are checked by what an observer keeps himself."""

    def __init__(self) -> None:
        self.table = SlotTable(N_SLOTS, BUDGET)
        self.held: list[tuple[Slot, Holder]] = []

    def evict(self, slot: Slot) -> None:
        assert slot not in [held for held, _ in self.held]
        assert slot.key not in self.table.pinned
        self.table.evict(slot)

    def ask(self, key: str, n_bytes: int, holder: Holder) -> None:
        """What the loader and the engine do for one request."""
        table, before = self.table, {slot: set(slot.uses) for slot in self.table.residents()}
        victims = table.own_victims(holder, key, n_bytes)
        if victims is None:
            over = table.held_bytes(holder.tenant) + n_bytes - (holder.max_bytes or 0)
            assert sum(slot.n_bytes for slot in self.unused_by(holder)) < over
            return
        assert all(holder.tenant in before[slot] for slot in victims), "it belongs to others"
        self.give_up(victims, holder)
        if table.get(key) is None:
            others = table.victims_for(n_bytes) if table.fits(key, n_bytes) else None
            if others is None:
                return
            for slot in others:
                self.evict(slot)
            table.assign(key, n_bytes, holder.tenant).ready = True
            self.trim()
        taken = table.acquire(key, holder)
        assert taken is not None
        self.held.append((taken, holder))

    def give_up(self, victims: list[Slot], holder: Holder) -> None:
        for slot in victims:
            users = set(slot.uses)
            if self.table.give_up(slot, holder.tenant):
                assert users == {holder.tenant}, "others have used it"
                self.evict(slot)

    def unused_by(self, holder: Holder) -> list[Slot]:
        in_use = [slot for slot, held_by in self.held if held_by is holder]
        own = [slot for slot in self.table.residents() if holder.tenant in slot.uses]
        pinned = self.table.pinned
        return [s for s in own if s not in in_use and holder.tenant not in pinned.get(s.key, ())]

    def trim(self) -> None:
        """What follows when something is pinned or given back."""
        for holder in HOLDERS:
            self.give_up(self.table.excess(holder), holder)

    def check(self) -> None:
        table = self.table
        assert table.used_bytes <= BUDGET
        indices = [slot.index for slot in table.residents()]
        assert len(set(indices)) == len(indices) <= N_SLOTS
        assert set(indices) <= set(range(N_SLOTS))
        for slot, _ in self.held:
            assert table.get(slot.key) is slot
        for holder in HOLDERS:
            used = sum(s.n_bytes for s in table.residents() if holder.tenant in s.uses)
            assert table.held_bytes(holder.tenant) == used
            pinned = table.pinned_bytes(holder.tenant)
            in_use = {slot for slot, held_by in self.held if held_by is holder}
            # What is pinned or in use while it is pinned may be more than the bound; nothing else.
            bound = used if holder.max_bytes is None else holder.max_bytes
            assert used <= max(bound, pinned + sum(slot.n_bytes for slot in in_use))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "ask", "release", "pin"]),
            st.integers(0, 7),
            st.sampled_from(HOLDERS),
        ),
        max_size=80,
    )
)
def test_table_any_history_keeps_budget_bounds_holders_and_pins(
    history: list[tuple[str, int, Holder]],
) -> None:
    world = World()
    for action, i, holder in history:
        if action == "ask":
            world.ask(f"v{i}", 7 + i * 4, holder)
        elif action == "release" and world.held:
            slot, held_by = world.held.pop(i % len(world.held))
            world.table.release(slot, held_by.tenant)
            world.trim()
        elif action == "pin":
            pinned = {f"v{i}": {holder.tenant}} if i < 4 else {}
            world.table.pin(pinned)
            world.trim()
        world.check()
