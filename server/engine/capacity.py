"""What fits: asked before variants are deployed, answered in numbers.

A variant that was loaded is reckoned with what it took; another with what its artifact tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compressor.artifact.reader import read_config
from compressor.errors import ArtifactError
from server.deltas.failures import failure_of
from server.deltas.footprint import expected_bytes
from server.deltas.registry import RegisteredDelta
from server.engine.catalog import VariantCatalog
from server.engine.core import EngineCore


@dataclass(frozen=True, slots=True)
class Need:
    """What one variant takes.

    is_measured  whether the bytes are those of a load
    cold_load_s  to bring it into device memory from disk, None: nothing was measured yet
    """

    id: str
    device_bytes: int
    is_measured: bool
    is_resident: bool
    cold_load_s: float | None


def capacity(core: EngineCore, catalog: VariantCatalog, names: Sequence[str]) -> dict[str, Any]:
    """Memory as it is shared out, and whether these variants fit together beside what is pinned.

    Reads the artifacts' configurations. Worker thread. Raises ModelNotFound, DeltaBroken,
    DeltaUnusable.
    """
    slots, stats = core.slots, core.stats()
    deltas = {catalog.key_of(delta): delta for delta in map(catalog.registered, names)}
    needs = [_need(core, key, delta) for key, delta in deltas.items()]
    pinned = [slot for key, slot in stats.resident.items() if key in slots.pinned]
    others = [slot for slot in pinned if slot.key not in deltas]
    n_bytes = sum(need.device_bytes for need in needs) + sum(slot.n_bytes for slot in others)
    n_slots = len(needs) + len(others)
    n_tokens = stats.n_kv_blocks * stats.kv_block_tokens
    return {
        "base_bytes": stats.base_bytes,
        "deltas": {
            "budget_bytes": slots.budget_bytes,
            "used_bytes": sum(slot.n_bytes for slot in stats.resident.values()),
            "pinned_bytes": sum(slot.n_bytes for slot in pinned),
            "slots": slots.n_slots,
            "used_slots": len(stats.resident),
            "pinned_slots": len(pinned),
        },
        "kv_cache": {
            "tokens": n_tokens,
            "free_tokens": stats.n_free_kv_blocks * stats.kv_block_tokens,
            "longest_requests": n_tokens // core.max_len,
        },
        "asked": [asdict(need) for need in needs],
        "fits": n_bytes <= slots.budget_bytes and n_slots <= slots.n_slots,
        "needed_bytes": n_bytes,
        "needed_slots": n_slots,
        "left_bytes": slots.budget_bytes - n_bytes,
    }


def _need(core: EngineCore, key: str, delta: RegisteredDelta) -> Need:
    if delta.failure is not None:
        raise delta.failure.error_for(delta.name)
    slot = core.slots.get(key)
    known = core.loader.claims.size_of(key) if slot is None else slot.n_bytes
    measured_s = core.loader.costs.reload_s(key, from_host=False)
    return Need(
        id=delta.name,
        device_bytes=_expected(delta, core.value_bytes) if known is None else known,
        is_measured=known is not None,
        is_resident=slot is not None and slot.ready,
        cold_load_s=measured_s or core.loader.costs.expected_s(delta.n_bytes),
    )


def _expected(delta: RegisteredDelta, width: int) -> int:
    try:
        return expected_bytes(read_config(delta.path), width)
    except (ArtifactError, OSError, MemoryError) as error:
        raise failure_of(error).error_for(delta.name) from error
