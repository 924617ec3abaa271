"""The authenticated tenant of one request, as every layer down to the engine sees it."""

from __future__ import annotations

from dataclasses import dataclass

MOST_URGENT = -(1 << 63)  # no ceiling: the lowest priority that a request can have
NOBODY = "default"  # the tenant of a server without keys


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request is from; a snapshot of the tenant's settings when the request came.

    tenant          its name; prefix cache, fair shares, ledger and metrics go by it
    key_id          which of its keys, never the key: "" without keys
    weight          its share beside tenants of other weights, where all want more than there is
    max_priority    the most urgent `priority` that its requests may have (lower is sooner, as vLLM
                    counts); more urgent ones are taken as this
    resident_bytes  the most device memory that variants loaded for it may hold; None: no limit
    """

    tenant: str = NOBODY
    key_id: str = ""
    weight: float = 1.0
    max_priority: int = 0
    resident_bytes: int | None = None


SERVER = Principal("")  # what operators ask for: no tenant has this name
ANYBODY = Principal(max_priority=MOST_URGENT)  # whoever asks a server without keys
