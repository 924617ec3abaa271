"""Reads, verifies, decodes and tries variants: the loader's first stage, on threads of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from compressor.artifact.reader import Artifact
from compressor.codecs.term import TensorDelta
from server.deltas.background import background_pool
from server.deltas.failures import is_lasting
from server.deltas.loads import LoadDecoded, LoadFailed, LoadJob, failed_load
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.staging import decode_threads, reader_threads, stage_variant
from server.deltas.trial import VariantTrial


class WeightsMaker(Protocol):
    """Makes, installs and forgets a slot's whole weights; `ReconstructedWeights` implements it."""

    def replaces(self, parameter: DeltaParameter) -> bool: ...
    def bytes_for(self, artifact: Artifact) -> int: ...
    def build(self, artifact: Artifact) -> Any: ...
    def install(self, slot: int, ops: Any, *, always: bool) -> None: ...
    def remove(self, slot: int) -> None: ...


class VariantReader:
    """Submits from the engine thread; works on its own."""

    def __init__(
        self,
        parameters: Mapping[str, DeltaParameter],
        weights: WeightsMaker,
        post: Callable[[LoadDecoded | LoadFailed], None],
        device: torch.device,
    ) -> None:
        self._parameters = parameters
        self._weights = weights
        self._post = post
        self._n_threads = decode_threads(device)
        self.n_at_once = reader_threads(device)
        self._pool = background_pool(self.n_at_once, "delta-reader")
        self.tried: set[str] = set()  # keys whose terms were found right, see `VariantTrial`

    def submit(self, job: LoadJob) -> Future[None]:
        return self._pool.submit(self._read, job)

    def keep(self, keys: Collection[str]) -> None:
        """Forget what is known of all other variants. Any thread."""
        self.tried.intersection_update(keys)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, job: LoadJob) -> None:
        started = time.monotonic()
        try:
            decoded = self._decoded(job, job.read(), started)
        except Exception as error:
            failed = failed_load(job, error)
            if is_lasting(error):  # of staging: `read` knows its own
                job.reject(failed.failure)
            self._post(failed)
        else:
            self._post(decoded)

    def _decoded(self, job: LoadJob, artifact: Artifact, started: float) -> LoadDecoded:
        """Decoded; of a variant that was never loaded before, every term is tried too."""
        weights, n_threads = self._weights, self._n_threads
        check = _accept if job.key in self.tried else VariantTrial()
        if job.mode == "apply":
            parameters = stage_variant(artifact, self._parameters, n_threads, check=check)
            n_bytes, whole = 0, None
        else:
            parameters = stage_variant(
                artifact, self._parameters, n_threads, weights.replaces, check
            )
            n_bytes, whole = weights.bytes_for(artifact), artifact
        self.tried.add(job.key)
        n_bytes += sum(p.n_bytes for p in parameters)
        read_s = time.monotonic() - started
        return LoadDecoded(job, parameters, n_bytes, started, whole, read_s)


def _accept(delta: TensorDelta, staged: StagedParameter) -> None: ...
