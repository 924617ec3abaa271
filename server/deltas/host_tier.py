"""Decoded variants that stay in host memory, so that coming back to the device is a copy.

As with vLLM's `max_cpu_loras`, what is in device memory may be here too: it is kept from its load
on, not fetched back when it leaves, which would hold up the load that it makes way for. Which goes
first where the budget is short: see `server.deltas.costs`. What only a reconstructed checkpoint
stands for (mode `reconstruct`) is not kept: its weights are no copy of what was decoded.

Used by the engine thread only, but for `bytes_of` and `keys`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass

from server.deltas.costs import ReloadCosts, in_order_of_worth
from server.deltas.failures import MEND_S, Failure
from server.deltas.loads import LoadDecoded

NO_HOST_ROOM = Failure(
    "host memory has no room for it",
    "an operator must raise --host-delta-budget-bytes",
    retry_after_s=MEND_S,
)


@dataclass(slots=True)
class Decoded:
    """One variant that is kept."""

    key: str
    n_bytes: int
    last_used: int
    used_at: float
    decoded: LoadDecoded


class HostTier:
    """Under a budget of bytes; 0: nothing is kept."""

    def __init__(self, budget_bytes: int, costs: ReloadCosts) -> None:
        self.budget_bytes = budget_bytes
        self.pinned: Collection[str] = ()
        self._costs = costs
        self._kept: dict[str, Decoded] = {}
        self._clock = itertools.count(1)
        self._now = 0

    @property
    def used_bytes(self) -> int:
        return sum(kept.n_bytes for kept in list(self._kept.values()))

    def keys(self) -> list[str]:
        return list(self._kept)

    def bytes_of(self, key: str) -> int:
        """Host memory that a variant takes, 0 if it is not here."""
        kept = self._kept.get(key)
        return 0 if kept is None else kept.n_bytes

    def get(self, key: str) -> LoadDecoded | None:
        """A variant that is wanted now."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._touch(kept)
        return kept.decoded

    def put(self, decoded: LoadDecoded) -> bool:
        """Keep a variant if it has room, dropping others for it. Returns whether it is kept."""
        key = decoded.job.key
        if decoded.artifact is not None:
            return False
        if key in self._kept:
            self._touch(self._kept[key])
            return True
        n_bytes = held_bytes(decoded)
        victims = self._victims_for(n_bytes)
        if victims is None:
            return False
        for victim in victims:
            del self._kept[victim.key]
        self._kept[key] = Decoded(key, n_bytes, self._tick(), time.monotonic(), decoded)
        return True

    def drop(self, key: str) -> None:
        self._kept.pop(key, None)

    def expire(self, key: str, before: float) -> None:
        """Drop a variant that was not wanted since then."""
        kept = self._kept.get(key)
        if kept is not None and kept.used_at < before:
            del self._kept[key]

    def keep(self, keys: Collection[str]) -> None:
        """Forget all other variants."""
        for key in [key for key in self._kept if key not in keys]:
            del self._kept[key]

    def _touch(self, kept: Decoded) -> None:
        kept.last_used, kept.used_at = self._tick(), time.monotonic()

    def _tick(self) -> int:
        self._now = next(self._clock)
        return self._now

    def _victims_for(self, n_bytes: int) -> list[Decoded] | None:
        room = self.budget_bytes - self.used_bytes
        if room >= n_bytes:
            return []
        idle = [kept for kept in self._kept.values() if kept.key not in self.pinned]
        reload_s = [self._costs.reload_s(kept.key, from_host=False) for kept in idle]
        order = in_order_of_worth(idle, self._now, [kept.last_used for kept in idle], reload_s)
        victims = []
        for kept in order:
            victims.append(kept)
            room += kept.n_bytes
            if room >= n_bytes:
                return victims
        return None


def held_bytes(decoded: LoadDecoded) -> int:
    """Host memory that stays taken: a tensor may be a part of what it was read with."""
    storages = [t.untyped_storage() for p in decoded.parameters for t in p.tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
