"""What each tenant holds in the engine, read beside the engine's thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from server.engine.request import Request
from server.engine.types import TenantUse


def use_by_tenant(running: Iterable[Request]) -> dict[str, TenantUse]:
    """By tenant's name. The requests may change meanwhile: it is what a gauge shows."""
    kv_blocks: defaultdict[str, set[int]] = defaultdict(set)
    for request in running:
        kv_blocks[request.principal.tenant].update(request.kv_blocks)
    return {tenant: TenantUse(len(held)) for tenant, held in kv_blocks.items()}
