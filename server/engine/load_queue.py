"""Requests whose variant cannot be there in time are refused at once, with the time to come back.

The loads that come first are those of variants that others have waited for longer. How long they
take is reckoned from their bytes, at the rate that loads were measured to have. With none before it
a load is begun in any case: who comes back then finds it there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from server.deltas.loader import DeltaLoader
from server.deltas.slots import SlotTable
from server.engine.request import Request
from server.engine.variant import BASE_KEY, Variant
from server.errors import LoadsBehind

UNDER_WAY = 0.5  # of a load that has begun, on average, is still to be done


def too_late(
    request: Request, waiting: Iterable[Request], slots: SlotTable, loader: DeltaLoader
) -> LoadsBehind | None:
    """Why a request that has just come will run out of its time, if so.

    waiting  all requests that wait, this one too
    """
    key = request.variant.key
    if request.deadline is None or not _is_to_be_read(key, slots, loader):
        return None
    since: dict[str, tuple[float, Variant]] = {}
    for other in waiting:
        known = since.get(other.variant.key)
        if other.slot is None and (known is None or other.queued_at < known[0]):
            since[other.variant.key] = other.queued_at, other.variant
    first = min(since.get(key, (request.queued_at,))[0], request.queued_at)
    before = [
        variant
        for at, variant in since.values()
        if at < first and _is_to_be_read(variant.key, slots, loader)
    ]
    if not before:
        return None
    n_bytes = sum(_left(variant, loader) for variant in (*before, request.variant))
    wait_s, left_s = loader.expected_s(n_bytes), request.deadline - time.monotonic()
    if wait_s is None or wait_s <= left_s:
        return None
    return LoadsBehind(
        f"`{request.variant.name}` has to wait for {len(before)} other variants to be loaded, and "
        f"then itself takes until {math.ceil(wait_s)} s from now; this request has no more than "
        f"{max(0, math.floor(left_s))} s. Try again later.",
        retry_after_s=max(1, math.ceil(wait_s - left_s)),
    )


def _is_to_be_read(key: str, slots: SlotTable, loader: DeltaLoader) -> bool:
    """Whether it is in neither memory."""
    return key != BASE_KEY and slots.get(key) is None and not loader.host.bytes_of(key)


def _left(variant: Variant, loader: DeltaLoader) -> int:
    """Bytes that are still to be read."""
    n_bytes = 0 if variant.origin is None else variant.origin.n_bytes
    return int(n_bytes * UNDER_WAY) if loader.is_loading(variant.key) else n_bytes
