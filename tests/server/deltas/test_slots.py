"""The slot table against its promises: budget kept, nothing in use evicted, least recent first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.deltas.slots import Slot, SlotTable


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


@given(
    st.lists(
        st.tuples(st.sampled_from(["load", "acquire", "release"]), st.integers(0, 7)), max_size=80
    )
)
def test_table_any_history_keeps_budget_and_holders(history: list[tuple[str, int]]) -> None:
    table = SlotTable(3, 50)
    held: list[Slot] = []
    for action, i in history:
        key = f"v{i}"
        if action == "load" and table.get(key) is None:
            load(table, key, 7 + i * 4)
        elif action == "acquire" and (slot := table.acquire(key)) is not None:
            held.append(slot)
        elif action == "release" and held:
            table.release(held.pop(i % len(held)))
        assert table.used_bytes <= table.budget_bytes
        indices = [s.index for s in table.residents()]
        assert len(indices) == len(set(indices))
        assert set(indices) <= {0, 1, 2}
        for slot in held:
            assert table.get(slot.key) is slot
