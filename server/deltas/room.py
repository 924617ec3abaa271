"""Room for one variant's terms, made while steps run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from server.deltas.parameter import DeltaParameter, PoolKey, StagedParameter
from server.deltas.pools.base import ArrayStore, PoolParts, TermPool
from server.deltas.upload import Transfer


class Room:
    """Places in the pools' arrays for the terms of one slot.

    It is begun on the engine thread, which takes places in the pools that there are: none of them
    is idle and dropped meanwhile. `make` then changes nothing that steps read: where a pool is full
    it makes larger arrays beside the ones in use, where there is none a pool that nobody knows of.
    So a loader's thread may do it, for one variant after the other, and copy into the places.
    `opening`, on the engine thread between steps, puts them in place of the old. Whoever gives the
    slot up hides it on every parameter, as always; a room that was not opened is then forgotten.
    """

    def __init__(self, slot: int, parameters: Iterable[StagedParameter]) -> None:
        self._slot = slot
        self._pools: dict[tuple[DeltaParameter, PoolKey], TermPool] = {}
        self._new: dict[tuple[DeltaParameter, PoolKey], TermPool] = {}
        for staged in parameters:
            home, own = staged.parameter.home, staged.parameter.pool_slot(slot)
            for key, _ in staged.terms:
                pool = home.pools.get(key)
                if pool is not None:
                    pool.places.reserve(own)
                    self._pools[home, key] = pool
        self._grown: dict[ArrayStore, PoolParts] = {}
        self._moved: dict[ArrayStore, DeltaParameter] = {}

    def make(self, parameters: Iterable[StagedParameter]) -> None:
        """Make room at the places of all terms. Raises what torch does if there is no memory."""
        highest: dict[ArrayStore, tuple[int, PoolParts]] = {}  # an expert's is one of many
        for staged in parameters:
            own = staged.parameter.pool_slot(self._slot)
            for key, parts in staged.terms:
                pool = self._pool(staged.parameter.home, key)
                place, store = pool.places.reserve(own), pool.store  # of new pools only
                if place >= max(store.capacity, highest.get(store, (0, parts))[0]):
                    highest[store] = place, parts
                    self._moved[store] = staged.parameter
        for store, (place, parts) in highest.items():
            self._grown[store] = store.grown_arrays(parts, place)

    def transfers(self, parameters: Iterable[StagedParameter]) -> Iterator[Transfer]:
        """What to copy into the places."""
        for staged in parameters:
            own = staged.parameter.pool_slot(self._slot)
            for key, parts in staged.terms:
                pool = self._pool(staged.parameter.home, key)
                place = pool.places[own]
                arrays = pool.own_arrays(self._arrays(pool.store))
                yield from zip((array[place] for array in arrays), parts, strict=True)

    def opening(self) -> Iterator[None]:
        """Let the pools have what was made, one after the other; steps may run between them, since
        no row of theirs is of this slot. Raises if there is no memory; then some have.
        """
        for store, arrays in self._grown.items():
            store.adopt(arrays)
            self._moved[store].residency.moved()
            yield
        for (parameter, key), pool in self._new.items():
            parameter.pools[key] = pool
            parameter.residency.created()

    def _pool(self, parameter: DeltaParameter, key: PoolKey) -> TermPool:
        if (parameter, key) not in self._pools:
            made = {(other, key): pool for other, pool in parameter.empty_pools(key).items()}
            self._pools |= made
            self._new |= made
        return self._pools[parameter, key]

    def _arrays(self, store: ArrayStore) -> PoolParts:
        return self._grown.get(store, store.arrays)
