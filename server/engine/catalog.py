"""From a model name in a request to a Variant: artifacts opened, verified and given their text.

Opening reads an artifact's configuration and text files. Its weights are read where they are
needed, by the loader (`VariantCatalog.job_for`), and must belong to the digest that was opened.

Bytes are found by their digest, in whichever folder has them whole: a variant's own first, then
others that claim the same. A folder that cannot be used stands in nobody's way, and what a client
reads names no other variant than the one it asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from compressor.artifact.certificate import Certificate, read_certificate
from compressor.artifact.reader import (
    Artifact,
    OpenedArtifact,
    open_artifact,
    read_digest,
    read_terms,
)
from compressor.errors import ArtifactError, Corrupt
from server.deltas.failures import Changed, Failed, Failure, failure_of, is_lasting, is_scarcity
from server.deltas.fingerprint import KnownFailures, fingerprint_of
from server.deltas.loads import LoadJob
from server.deltas.parameter import Mode
from server.deltas.registry import DeltaRegistry, RegisteredDelta
from server.engine.variant import BASE_KEY, Variant
from server.errors import ModelNotFound, Unavailable
from server.settings import Settings
from server.text.assets import TextAssets
from server.text.description import Description, Undescribed
from server.text.loading import load_variant_text
from server.text.service import TextService

log = logging.getLogger(__name__)
FINGERPRINT_CHARS = 12
T = TypeVar("T")


class VariantCatalog:
    """Opened variants by key. Called from worker threads; one lock guards the maps.

    All of them hold what the directory has now, and nothing of what it had before the last rescan:
    requests that run hold their own variant.
    """

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
        self._errors: dict[str, tuple[str, str]] = {}  # by name: digest, reason
        self._known = KnownFailures()
        self._lock = threading.Lock()

    def mode_of(self, name: str) -> Mode:
        return self._settings.mode_overrides.get(name, self._settings.mode)

    def key_of(self, delta: RegisteredDelta) -> str:
        return f"{delta.digest}:{self.mode_of(delta.name)}"

    def digest_of(self, key: str) -> str:
        """The digest in a key that `key_of` made."""
        return key.partition(":")[0]

    def open_error(self, delta: RegisteredDelta) -> str | None:
        """Why it could not be opened when it was last asked for; safe to show."""
        digest, reason = self._errors.get(delta.name, ("", ""))
        return reason if digest == delta.digest else None

    def cached(self, model: str) -> Variant | None:
        """The variant if it needs no reading from disk. Raises ModelNotFound."""
        if model == self.base_name:
            return self._base
        delta = self.registered(model)
        variant = None if delta.failure is not None else self._opened.get(self.key_of(delta))
        if variant is None or variant.name == delta.name:
            return variant
        return replace(variant, name=delta.name)

    def open(self, model: str) -> Variant:
        """Read and verify all of the artifact behind a name but its weights. Worker thread.

        Raises ModelNotFound, DeltaBroken, DeltaUnusable.
        """
        known = self.cached(model)
        if known is not None:
            return known
        delta = self.registered(model)
        if delta.failure is not None:
            delta = self.registry.refresh(delta)
        if delta.failure is not None:
            raise delta.failure.error_for(delta.name)
        try:
            n_rows, text = self._from_copies(self._copies_of(delta), self._read_texts, "text")
        except Failed as error:
            self._errors[delta.name] = (delta.digest, error.failure.reason)
            raise error.failure.error_for(delta.name) from error
        variant = Variant(
            name=delta.name,
            key=self.key_of(delta),
            digest=delta.digest,
            fingerprint=self._fingerprint(delta.digest),
            vocab_size=n_rows,
            text=text,
            mode=self.mode_of(delta.name),
            origin=delta,
        )
        with self._lock:
            self._errors.pop(delta.name, None)
            self._opened[variant.key] = variant
        return variant

    def job_for(self, variant: Variant) -> LoadJob:
        """How the loader gets this variant's weights, now or after an eviction."""
        assert variant.origin is not None, "the base has no weights to load"
        copies = self._copies_of(variant.origin, variant.name)
        use = f"weights to {variant.mode}"
        seen = {copy.path: fingerprint_of(copy.path) for copy in copies}

        def read() -> Artifact:
            return self._from_copies(copies, self._read_weights, use)

        def reject(failure: Failure) -> None:
            for path in seen:
                self._known.note(path, use, seen[path], failure)

        n_bytes = variant.origin.n_bytes
        return LoadJob(variant.key, variant.name, variant.mode, read, reject, n_bytes)

    def certificate_of(self, variant: Variant) -> Certificate | None:
        """What the fine-tune said to a few prompts, if its artifact has it. Raises Failed."""
        if variant.origin is None:
            return None
        copies = self._copies_of(variant.origin, variant.name)
        return self._from_copies(copies, _read_certificate, "certificate")

    def rescan(self) -> None:
        """Read the directory again and forget what is there no more. Raises DeltasUnreadable."""
        self.registry.rescan()
        self._forget_gone()

    def reread(self, name: str, moved_to: Path | None = None) -> None:
        """See `DeltaRegistry.reread`."""
        self.registry.reread(name, moved_to)
        self._forget_gone()

    def _forget_gone(self) -> None:
        deltas = self.registry.all()
        with self._lock:
            keys, digests = self.keys(), {delta.name: delta.digest for delta in deltas}
            self._opened = {key: v for key, v in self._opened.items() if key in keys}
            self._errors = {n: e for n, e in self._errors.items() if digests.get(n) == e[0]}
        self._known.keep({delta.path for delta in deltas})

    def keys(self) -> set[str]:
        """Of all variants that the directory has."""
        return {self.key_of(delta) for delta in self.registry.all() if delta.failure is None}

    def names_of(self, key: str) -> list[tuple[str, str]]:
        """Names that have this key now, with their digest."""
        deltas = self.registry.with_digest(self.digest_of(key))
        return [(delta.name, delta.digest) for delta in deltas if self.key_of(delta) == key]

    def find(self, model: str) -> RegisteredDelta | None:
        """What a request's `model` means; None for the base, and where no delta has that name."""
        return self.registry.get(model.removeprefix(f"{self.base_name}:"))

    def registered(self, model: str) -> RegisteredDelta:
        delta = self.find(model)
        if delta is None:
            raise ModelNotFound(f"The model `{model[:200]}` does not exist.", param="model")
        return delta

    def _copies_of(self, delta: RegisteredDelta, name: str | None = None) -> list[RegisteredDelta]:
        """Folders that claim to have these bytes: this name's own first; `delta` itself if none
        does any more.
        """
        copies = self.registry.with_digest(delta.digest) or [delta]
        return sorted(copies, key=lambda copy: copy.name != (name or delta.name))

    def _from_copies(
        self,
        copies: Sequence[RegisteredDelta],
        read: Callable[[RegisteredDelta], T],
        use: str,
    ) -> T:
        """What the first copy that is whole gives. Raises Failed: the first one's failure.

        One that was found broken is not read again until its files change.
        """
        failures: list[Failure] = []
        for delta in copies:
            failure = self._known.of(delta.path, use)
            if failure is None:
                seen = fingerprint_of(delta.path)
                try:
                    if read_digest(delta.path) != delta.digest:
                        raise Changed
                    return read(delta)
                except Unavailable:  # a text worker's limits: that says nothing of other copies
                    raise
                except Exception as error:
                    log.warning("the artifact %s cannot be used: %s", delta.name, error)
                    failure = failure_of(error)
                    if is_lasting(error):
                        self._known.note(delta.path, use, seen, failure)
            failures.append(failure)
        raise Failed(failures[0])

    def _read_texts(self, delta: RegisteredDelta) -> tuple[int, TextAssets]:
        """Rows of the vocabulary, and what stands between text and ids."""
        opened = open_artifact(delta.path, base_identity=self._identity)
        if opened.digest != delta.digest:
            raise Changed
        n_rows = max(self._base_vocab_size, *_vocabulary_rows(opened))
        return n_rows, self._text_of(opened, n_rows)

    def _read_weights(self, delta: RegisteredDelta) -> Artifact:
        artifact = read_terms(
            delta.path, base_identity=self._identity, n_threads=self._read_threads
        )
        if artifact.digest != delta.digest:
            raise Changed
        return artifact

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
            if is_scarcity(error):
                raise
            log.exception("the text files of %s cannot be used", opened.path.name)
            raise Corrupt("its tokenizer or generation config cannot be used") from error

    def _fingerprint(self, digest: str | None) -> str:
        delta = "base" if digest is None else digest[:FINGERPRINT_CHARS]
        return f"impart-{self._identity[:FINGERPRINT_CHARS]}-{delta}"


def _read_certificate(delta: RegisteredDelta) -> Certificate | None:
    certificate, digest = read_certificate(delta.path)
    if digest != delta.digest:
        raise Changed
    return certificate


def _vocabulary_rows(opened: OpenedArtifact) -> list[int]:
    """Rows of every matrix that grew: the fine-tune's vocabulary if tokens were added."""
    return [0, *(e.shape[0] for e in opened.config.tensors if e.shape != e.base_shape)]
