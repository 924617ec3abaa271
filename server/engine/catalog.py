"""From a model name in a request to a Variant: artifacts opened, verified and given their text.

Opening reads an artifact's configuration and text files. Its weights are read where they are
needed, by the loader (`VariantCatalog.job_for`), and must belong to the digest that was opened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from compressor.artifact.reader import Artifact, OpenedArtifact, open_artifact, read_terms
from compressor.errors import ArtifactError, Corrupt
from server.deltas.loads import LoadJob
from server.deltas.parameter import Mode
from server.deltas.registry import DeltaRegistry, RegisteredDelta, safe_reason, unusable
from server.engine.variant import BASE_KEY, Variant
from server.errors import DeltaUnusable, ModelNotFound, Unavailable
from server.settings import Settings
from server.text.assets import TextAssets
from server.text.description import Description, Undescribed
from server.text.loading import load_variant_text
from server.text.service import TextService

log = logging.getLogger(__name__)
FINGERPRINT_CHARS = 12


class VariantCatalog:
    """Opened variants by key. Called from worker threads; one lock guards the maps."""

    def __init__(
        self,
        settings: Settings,
        registry: DeltaRegistry,
        base_name: str,
        base_identity: str,
        base_text: TextAssets,
        base_vocab_size: int,
        text_service: TextService,
        read_threads: int = 1,
    ) -> None:
        self.registry = registry
        self.base_name = base_name
        self.created_s = int(time.time())
        self._settings = settings
        self._identity = base_identity
        self._base_text = base_text
        self._base_vocab_size = base_vocab_size
        self._text_service = text_service
        self._read_threads = read_threads
        self._base = Variant(
            base_name, BASE_KEY, None, self._fingerprint(None), base_vocab_size, base_text
        )
        self._opened: dict[str, Variant] = {}
        self._paths: dict[str, RegisteredDelta] = {}
        self._modes: dict[str, Mode] = {}
        self._errors: dict[str, str] = {}
        self._lock = threading.Lock()

    def mode_of(self, name: str) -> Mode:
        return self._settings.mode_overrides.get(name, self._settings.mode)

    def key_of(self, delta: RegisteredDelta) -> str:
        return f"{delta.digest}:{self.mode_of(delta.name)}"

    def load_error(self, key: str) -> str | None:
        return self._errors.get(key)

    def cached(self, model: str) -> Variant | None:
        """The variant if it needs no reading from disk. Raises ModelNotFound, DeltaUnusable."""
        if model == self.base_name:
            return self._base
        delta = self._registered(model)
        variant = self._opened.get(self.key_of(delta))
        if variant is None or variant.name == delta.name:
            return variant
        return _renamed(variant, delta.name)

    def open(self, model: str) -> Variant:
        """Read and verify all of the artifact behind a name but its weights. Worker thread."""
        known = self.cached(model)
        if known is not None:
            return known
        delta = self._registered(model)
        key = self.key_of(delta)
        try:
            opened = open_artifact(delta.path, base_identity=self._identity)
            _check_digest(delta, opened.digest)
            n_rows = max(self._base_vocab_size, *_vocabulary_rows(opened))
            text = self._text_of(opened, n_rows)
        except (ArtifactError, OSError) as error:
            self._errors[key] = safe_reason(error)
            raise DeltaUnusable(unusable(delta.name, error), param="model") from error
        variant = Variant(
            name=delta.name,
            key=key,
            digest=delta.digest,
            fingerprint=self._fingerprint(delta.digest),
            vocab_size=n_rows,
            text=text,
        )
        with self._lock:
            self._errors.pop(key, None)
            self._paths[key] = delta
            self._modes[key] = self.mode_of(delta.name)
            self._opened[key] = variant
        return variant

    def job_for(self, variant: Variant) -> LoadJob:
        """How the loader gets this variant's weights, now or after an eviction."""
        copies = self.registry.with_digest(variant.digest) or [self._paths[variant.key]]
        copies.sort(key=lambda delta: delta.name != variant.name)  # its own first

        def read() -> Artifact:
            return self._read_weights(copies)

        return LoadJob(variant.key, variant.name, self._modes[variant.key], read)

    def rescan(self) -> None:
        self.registry.rescan()

    def _registered(self, model: str) -> RegisteredDelta:
        prefix = f"{self.base_name}:"
        delta = self.registry.get(model.removeprefix(prefix))
        if delta is None:
            raise ModelNotFound(f"The model `{model[:200]}` does not exist.", param="model")
        if delta.error is not None:
            raise DeltaUnusable(f"`{delta.name}` cannot be served: {delta.error}", param="model")
        return delta

    def _read_weights(self, copies: Sequence[RegisteredDelta]) -> Artifact:
        """From the first copy that is whole; all claim the same digest. A reader's thread."""
        errors: list[Exception] = []
        for delta in copies:
            try:
                artifact = read_terms(
                    delta.path, base_identity=self._identity, n_threads=self._read_threads
                )
                _check_digest(delta, artifact.digest)
            except (ArtifactError, OSError, DeltaUnusable) as error:
                log.warning("the weights of %s cannot be used: %s", delta.name, error)
                errors.append(error)
            else:
                return artifact
        raise errors[0]

    def _text_of(self, opened: OpenedArtifact, n_rows: int) -> TextAssets:
        """Raises Corrupt, TooLarge, and what a text worker's limits raise."""
        service = self._text_service

        def describe(folder: Path) -> Description:
            return service.describe(folder, opened.digest, n_rows)

        try:
            return load_variant_text(
                self._settings.base, self._base_text, opened, service.store, describe
            )
        except (Unavailable, ArtifactError):
            raise
        except Undescribed as error:
            raise Corrupt(f"its tokenizer cannot be served: {error}") from error
        except Exception as error:  # files may be wrong in any way
            log.exception("the text files of %s cannot be used", opened.path.name)
            raise Corrupt("its tokenizer or generation config cannot be used") from error

    def _fingerprint(self, digest: str | None) -> str:
        delta = "base" if digest is None else digest[:FINGERPRINT_CHARS]
        return f"impart-{self._identity[:FINGERPRINT_CHARS]}-{delta}"


def _check_digest(delta: RegisteredDelta, digest: str) -> None:
    if digest != delta.digest:
        raise DeltaUnusable(
            f"the files of `{delta.name}` changed after they were registered; rescan and try again",
            retry_after_s=1,
        )


def _vocabulary_rows(opened: OpenedArtifact) -> list[int]:
    """Rows of every matrix that grew: the fine-tune's vocabulary if tokens were added."""
    return [0, *(e.shape[0] for e in opened.config.tensors if e.shape != e.base_shape)]


def _renamed(variant: Variant, name: str) -> Variant:
    return Variant(
        name, variant.key, variant.digest, variant.fingerprint, variant.vocab_size, variant.text
    )
