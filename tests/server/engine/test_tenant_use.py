"""What tenants hold, as a scrape sees it."""

from __future__ import annotations

from typing import cast

from server.deltas.slots import Slot, SlotUse
from server.engine.request import Request
from server.engine.tenant_use import use_by_tenant
from server.engine.types import OutputChunk, SamplingParams, TenantUse
from server.engine.variant import Variant
from server.errors import ServeError
from server.tenants.principal import Principal


def request(tenant: str, kv_blocks: list[int]) -> Request:
    def deliver(event: OutputChunk | ServeError) -> None: ...

    variant = cast(Variant, None)  # not looked at
    params = SamplingParams(max_tokens=1)
    return Request(
        "id", variant, [1], params, deliver, principal=Principal(tenant), kv_blocks=kv_blocks
    )


def test_use_by_tenant_counts_a_shared_block_once_for_each_tenant() -> None:
    running = [
        request("a", [1, 2, 3]),
        request("a", [1, 2, 4]),
        request("b", [5]),
        request("c", []),
    ]
    slots = [
        Slot(0, "x", 10, uses={"a": SlotUse(), "d": SlotUse()}),
        Slot(1, "y", 5, uses={"a": SlotUse()}),
        Slot(2, "z", 7),
    ]
    assert use_by_tenant(running, slots) == {
        "a": TenantUse(4, 2, 15),
        "b": TenantUse(1),
        "c": TenantUse(0),
        "d": TenantUse(0, 1, 10),
    }
