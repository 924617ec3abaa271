"""Pinning by names: from what tenants ask for to the variants that the engine keeps."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace

from server.deltas.slots import Holder
from server.engine.catalog import VariantCatalog
from server.engine.residents import Pin, holder_of
from server.engine.variant import Variant
from server.errors import ConfigError, ServeError
from server.tenants.principal import SERVER, Principal

log = logging.getLogger(__name__)
KERNELS_WAIT_S = 0.5

Pinned = Mapping[Principal, Collection[str]]  # the names that each tenant pins


class Pinner:
    """Event loop only.

    open        opens a variant by its name
    take        gives the engine its new pins
    is_warming  whether kernels are being compiled: variants are loaded after that
    """

    def __init__(
        self,
        catalog: VariantCatalog,
        n_slots: int,
        *,
        open: Callable[[str], Awaitable[Variant]],
        take: Callable[[Sequence[Pin]], Awaitable[None]],
        is_warming: Callable[[], bool],
    ) -> None:
        self._catalog = catalog
        self._n_slots = n_slots
        self._open = open
        self._take = take
        self._is_warming = is_warming
        self._wanted: Pinned = {}

    async def pin(self, pinned: Pinned) -> None:
        """See `EngineClient.pin`."""
        self._check(pinned)
        self._wanted = pinned
        while self._is_warming():
            await asyncio.sleep(KERNELS_WAIT_S)
        pins = await self._opened(pinned)
        if self._wanted is pinned:  # else others were asked for meanwhile
            await self._take(pins)

    async def again(self) -> None:
        """Pin what the names mean now that the deltas were read again."""
        if not self._wanted:
            return
        try:
            await self.pin(self._wanted)
        except ConfigError as error:
            log.error("%s; the variants pinned before stay so", error)

    def _check(self, pinned: Pinned) -> None:
        keys = set()
        for principal, names in pinned.items():
            for name in names:
                delta = self._catalog.registry.get(name)
                if delta is None and principal == SERVER:
                    continue  # it was removed since an operator pinned it; opening it tells
                if delta is None:
                    raise ConfigError(
                        f"tenant {principal.tenant} pins {name}, and no variant has that name; "
                        "correct `pinned` in the tenants file, or add the delta"
                    )
                keys.add(self._catalog.key_of(delta))
        if len(keys) > self._n_slots:
            raise ConfigError(
                f"{len(keys)} variants are pinned, and there are {self._n_slots} slots; pin "
                "fewer, or raise --max-resident-variants"
            )

    async def _opened(self, pinned: Pinned) -> list[Pin]:
        """Those that can be opened; the log tells of others."""
        holders: defaultdict[str, list[Holder]] = defaultdict(list)
        for principal, names in pinned.items():
            for name in names:
                holders[name].append(holder_of(principal))
        pins: dict[str, Pin] = {}
        for name, own in holders.items():
            try:
                variant = await self._open(name)
            except ServeError as error:
                log.error("the variant %s cannot be pinned: %s", name, error)
                continue
            same = pins.setdefault(variant.key, Pin(variant, ()))  # another name of its digest
            pins[variant.key] = replace(same, holders=(*same.holders, *own))
        return list(pins.values())
