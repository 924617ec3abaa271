"""What each tenant holds in the engine, read beside the engine's thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from server.deltas.slots import Slot
from server.engine.request import Request
from server.engine.types import TenantUse


def use_by_tenant(running: Iterable[Request], slots: Iterable[Slot]) -> dict[str, TenantUse]:
    """By tenant's name. Requests and slots may change meanwhile: it is what a gauge shows."""
    kv_blocks: defaultdict[str, set[int]] = defaultdict(set)
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for request in running:
        kv_blocks[request.principal.tenant].update(request.kv_blocks)
    for slot in slots:
        for tenant in (tenant for tenant in list(slot.uses) if tenant):  # "": the operators
            sizes[tenant].append(slot.n_bytes)
    return {
        tenant: TenantUse(len(kv_blocks[tenant]), len(sizes[tenant]), sum(sizes[tenant]))
        for tenant in kv_blocks.keys() | sizes.keys()
    }
