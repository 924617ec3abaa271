"""For whom a load is, and what is given up for it."""

from __future__ import annotations

from server.deltas.claims import Claims
from server.deltas.slots import Holder, Slot, SlotTable


def resident(table: SlotTable, key: str, n_bytes: int, holder: Holder) -> Slot:
    slot = table.assign(key, n_bytes, holder.tenant)
    slot.ready = True
    return slot


def test_holder_for_takes_the_first_tenant_that_may_hold_it() -> None:
    table = SlotTable(4, 100)
    full, free = Holder("full", 10), Holder("free", 30)
    claims = Claims(table, table.evict)
    resident(table, "in use", 10, full)
    assert table.acquire("in use", full)
    claims.want("new", [full])
    claims.decoded("new", 10)
    assert claims.holder_for("new") is None
    claims.want("new", [free])
    assert claims.holder_for("new") is free


def test_holder_for_makes_room_of_the_tenants_own() -> None:
    table, holder = SlotTable(4, 100), Holder("t", 20)
    claims = Claims(table, table.evict)
    resident(table, "old", 10, holder)
    resident(table, "newer", 10, holder)
    resident(table, "other", 10, Holder("u"))
    claims.want("new", [holder])
    claims.decoded("new", 10)
    assert claims.holder_for("new") is holder
    assert {slot.key for slot in table.residents()} == {"newer", "other"}


def test_size_is_known_until_the_variant_is_gone() -> None:
    claims = Claims(SlotTable(1, 1), lambda slot: None)
    claims.decoded("a", 7)
    claims.decoded("b", 8)
    claims.keep({"b"})
    assert (claims.size_of("a"), claims.size_of("b")) == (None, 8)


def test_beside_pinned_names_the_numbers() -> None:
    table = SlotTable(2, 100)
    resident(table, "a", 60, Holder("t"))
    table.pin({"a": {"t"}})
    failure = Claims(table, table.evict).beside_pinned(50)
    assert "needs 50 bytes" in failure.reason
    assert "60 of 100 bytes and 1 of 2 slots" in failure.reason
    assert "--delta-budget-bytes" in failure.remedy
