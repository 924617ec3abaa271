"""What is known of each model, for listings and gauges.

There may be ten thousand names, a dozen of them at work: who asks for one, or for those at work,
does not look at the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from server.deltas.registry import RegisteredDelta
from server.deltas.slots import Slot
from server.engine.catalog import VariantCatalog
from server.engine.core import EngineCore
from server.engine.observer import CoreStats
from server.engine.types import ModelInfo, VariantState
from server.engine.vetting import Vetter
from server.text.service import TextService

MAX_FAILED = 256  # listed among those at work


class ModelListing:
    """Any thread may ask."""

    def __init__(
        self,
        core: EngineCore,
        catalog: VariantCatalog,
        text: TextService,
        vetter: Vetter,
        max_model_len: int,
    ) -> None:
        self._core = core
        self._catalog = catalog
        self._text = text
        self._vetter = vetter
        self._max_model_len = max_model_len

    def all(self) -> list[ModelInfo]:
        """The base, then every variant by name."""
        return [self._base(), *self._infos(self._catalog.registry.all())]

    def named(self, model: str) -> ModelInfo | None:
        """What a request's `model` means."""
        if model == self._catalog.base_name:
            return self._base()
        delta = self._catalog.find(model)
        return None if delta is None else next(self._infos([delta]))

    def at_work(self) -> list[ModelInfo]:
        """The variants in memory, of the device or the host, or on their way there, and some of
        those that failed.
        """
        registry, loader = self._catalog.registry, self._core.loader
        keys = {
            *self._core.stats().resident,
            *loader.loading(),
            *loader.errors,
            *self._vetter.failed(),
            *loader.host.keys(),
        }
        found = {
            delta.name: delta
            for key in keys
            for delta in registry.with_digest(self._catalog.digest_of(key))
            if self._catalog.key_of(delta) == key
        }
        found |= {delta.name: delta for delta in registry.failed()[:MAX_FAILED]}
        return list(self._infos(found[name] for name in sorted(found)))

    def _base(self) -> ModelInfo:
        catalog = self._catalog
        return ModelInfo(
            catalog.base_name, None, None, "ready", catalog.created_s, self._max_model_len
        )

    def _infos(
        self, deltas: Iterator[RegisteredDelta] | list[RegisteredDelta]
    ) -> Iterator[ModelInfo]:
        stats = self._core.stats()
        for delta in deltas:
            yield self._info(delta, stats)

    def _info(self, delta: RegisteredDelta, stats: CoreStats) -> ModelInfo:
        key = self._catalog.key_of(delta)
        slot = stats.resident.get(key)
        if slot is not None and not slot.ready:
            slot = None
        error = delta.error or self._catalog.open_error(delta) or self._core.loader.errors.get(key)
        wanting = self._vetter.reason(key)
        quarantine = self._text.quarantine.reason(delta.digest)
        return ModelInfo(
            name=delta.name,
            parent=self._catalog.base_name,
            digest=delta.digest or None,
            state="quarantined" if quarantine else self._state(delta, slot, wanting, error),
            created_s=delta.created_s,
            max_model_len=self._max_model_len,
            n_bytes=delta.n_bytes,
            resident_bytes=0 if slot is None else slot.n_bytes,
            host_bytes=self._core.loader.host.bytes_of(key),
            reconstructed_bytes=stats.reconstructed_bytes.get(key, 0),
            mode=self._catalog.mode_of(delta.name),
            codec=delta.codec,
            error=quarantine or wanting or error,
            fidelity=dict(delta.fidelity),
            pinned=key in self._core.slots.pinned,
        )

    def _state(
        self, delta: RegisteredDelta, slot: Slot | None, wanting: str | None, error: str | None
    ) -> VariantState:
        if delta.stage in ("fetching", "verifying"):
            return delta.stage
        if wanting:
            return "failed"
        if slot is not None:
            return "ready"
        key = self._catalog.key_of(delta)
        if self._core.loader.is_loading(key):
            return "loading"
        if self._core.loader.host.bytes_of(key):
            return "host"
        return "failed" if error else "registered"
