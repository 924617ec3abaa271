"""Bring a variant from disk into a slot, beside the running engine.

    engine thread   request(key)            -> reader: read, verify, decode ("staged")
    engine thread   place in the slot table -> copier: copy into the slot, wait until every byte
                                               has arrived ("stored")
    engine thread   show                    -> rows of the slot get their delta from the next step

A variant of mode `reconstruct` has one stage more before it is shown: a worker makes its whole
weights, for `WeightsMaker` to install.

Nothing here waits for a step and no step waits for anything here: on a GPU the bytes go through
pinned memory and a stream of their own (`SlotUploader`). One variant is copied at a time:
making room for another may replace the arrays that a copy is writing to. On a CPU the engine thread
makes room in pieces between the steps, and readers are few and of low priority (`background`):
the cores that decode artifacts are those that the steps need.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from compressor.artifact.reader import Artifact
from compressor.codecs.term import TensorDelta
from compressor.errors import ArtifactError, UnsupportedTensor
from compressor.usable_cpus import usable_cpus
from server.deltas.background import background_pool
from server.deltas.host_memory import trim_heap
from server.deltas.parameter import DeltaParameter, Mode, StagedParameter
from server.deltas.registry import unusable
from server.deltas.slots import Slot, SlotTable
from server.deltas.upload import Ready, SlotUploader, Uploader
from server.errors import DeltaUnusable, ServeError

log = logging.getLogger(__name__)
DECODE_THREADS = 8
MAX_LOADS = 4  # under way at once, those that wait decoded in host memory for a slot included
ROOM_SHARE = 0.05  # of a step's time, for making room for a variant before the next on a CPU
RETRY_AFTER_S = 30  # an operator may have mended the artifact by then


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What to load. `read` runs on a reader's thread and returns the verified weights."""

    key: str
    name: str
    mode: Mode
    read: Callable[[], Artifact]


@dataclass(frozen=True, slots=True)
class Staged:
    """Decoded in host memory."""

    job: LoadJob
    parameters: tuple[StagedParameter, ...]
    n_bytes: int
    started: float
    artifact: Artifact | None = None  # whose weights are to be reconstructed


@dataclass(frozen=True, slots=True)
class Stored:
    """Copied into its slot, and its weights reconstructed if its mode says so."""

    staged: Staged
    slot: Slot
    weights: Any = None


@dataclass(frozen=True, slots=True)
class Placing:
    """A variant for which room is being made; `rest` are the parameters that have none yet."""

    staged: Staged
    slot: Slot
    rest: Iterator[StagedParameter]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`message` is safe to show to clients."""

    key: str
    name: str
    message: str
    slot: Slot | None = None
    retry_after_s: int = RETRY_AFTER_S

    @property
    def error(self) -> DeltaUnusable:
        """What each request that waited for the variant ends with."""
        return DeltaUnusable(self.message, param="model", retry_after_s=self.retry_after_s)


LoaderMessage = Staged | Stored | LoadFailed


class WeightsMaker(Protocol):
    """Makes, installs and forgets a slot's whole weights; `ReconstructedWeights` implements it."""

    def replaces(self, parameter: DeltaParameter) -> bool: ...
    def bytes_for(self, artifact: Artifact) -> int: ...
    def build(self, artifact: Artifact) -> Any: ...
    def install(self, slot: int, ops: Any, *, always: bool) -> None: ...
    def remove(self, slot: int) -> None: ...


def decode_threads(device: torch.device) -> int:
    """Threads for one variant: on a GPU's host cores are idle, on a CPU the steps need them."""
    return min(DECODE_THREADS, usable_cpus().cpus) if device.type == "cuda" else 1


def stage_variant(
    artifact: Artifact,
    parameters: Mapping[str, DeltaParameter],
    n_threads: int = 1,
    replaces: Callable[[DeltaParameter], bool] = lambda parameter: False,
) -> tuple[StagedParameter, ...]:
    """Decode every tensor of the artifact for this base. Raises ArtifactError or
    UnsupportedTensor if any does not fit: a variant is served whole or not at all.

    replaces  whether the slot's reconstructed weights stand in for a parameter's terms
    """

    def stage(delta: TensorDelta) -> StagedParameter:
        parameter = parameters.get(delta.name)
        if parameter is None:
            raise UnsupportedTensor(
                f"{delta.name}: the served model has no such linear, embedding, norm or bias; "
                "serve the reconstructed checkpoint instead (impart reconstruct)"
            )
        return parameter.stage(delta, without_terms=replaces(parameter))

    if n_threads == 1:
        return tuple(map(stage, artifact.tensors))
    with ThreadPoolExecutor(n_threads, "delta-decoder") as pool:
        return tuple(pool.map(stage, artifact.tensors))


def reader_threads(device: torch.device) -> int:
    """Variants that are read at once."""
    return 2 if device.type == "cuda" else 1


class DeltaLoader:
    """State of all loads. Methods are for the engine thread; `post` may be called by others."""

    def __init__(
        self,
        parameters: Mapping[str, DeltaParameter],
        slots: SlotTable,
        post: Callable[[LoaderMessage], None],
        weights: WeightsMaker,
        uploader: Uploader | None = None,
    ) -> None:
        self._parameters = parameters
        self._slots = slots
        self._post = post
        self._weights = weights
        device = _device_of(parameters)
        self._n_threads = decode_threads(device)
        self._uploader = uploader or SlotUploader(device)
        self._in_pieces = device.type == "cpu"  # on a GPU every piece would end captured graphs
        self._last_turn = time.perf_counter()
        self._readers = background_pool(reader_threads(device), "delta-reader")
        self._copier = background_pool(1, "delta-copier")
        # Its own: whole weights take seconds, and other variants come in meanwhile.
        self._builder = background_pool(1, "delta-builder")
        self._loading: set[str] = set()
        self._reads: dict[str, Future[None]] = {}  # by key, until they have ended
        self._waiting_for_room: list[Staged] = []
        self._placing: Placing | None = None
        self._storing: Slot | None = None  # where one variant's bytes are, or will be, copied
        self._untidy = False  # loads have ended since the heap was trimmed
        self.errors: dict[str, str] = {}  # by key, until it loads after all; safe to show

    def is_loading(self, key: str) -> bool:
        return key in self._loading

    def needs_room(self, key: str) -> bool:
        """Whether only a free slot is missing: for this key, or for one that is before it."""
        waiting = {staged.job.key for staged in self._waiting_for_room}
        return key in waiting or (bool(waiting) and key not in self._loading)

    def wants_room(self) -> bool:
        """Whether `place_waiting` may have something to do."""
        return self._placing is not None or (bool(self._waiting_for_room) and self._storing is None)

    def request(self, job: LoadJob) -> None:
        """Begin to load unless that is under way already or `MAX_LOADS` are; ask again then."""
        if job.key not in self._loading and len(self._loading) < MAX_LOADS:
            self._loading.add(job.key)
            self._reads[job.key] = self._readers.submit(self._stage, job)

    def forget(self, key: str) -> None:
        """Nobody waits for this variant any more: do not begin to read it. What has begun goes on,
        so that a client who asks again finds it.
        """
        read = self._reads.get(key)
        if read is not None and read.cancel():
            del self._reads[key]
            self._loading.discard(key)

    def handle(self, message: LoaderMessage) -> LoadFailed | Stored | None:
        """Take a worker's message; return it if a load ended by it."""
        match message:
            case Staged(job=job):
                self._reads.pop(job.key, None)
                if message.n_bytes > self._slots.budget_bytes:
                    return self._fail(
                        job,
                        f"`{job.name}` needs {message.n_bytes} bytes of device memory, the "
                        f"delta budget is {self._slots.budget_bytes}; raise --delta-budget-bytes",
                    )
                self._waiting_for_room.append(message)
                return None
            case Stored(staged=staged, slot=slot):
                self._copied(slot)
                if staged.artifact is not None and message.weights is None:
                    self._builder.submit(self._reconstruct, message, staged.artifact)
                    return None
                if message.weights is not None:
                    self._weights.install(slot.index, message.weights, always=True)
                for parameter in staged.parameters:
                    parameter.parameter.show(slot.index, parameter)
                slot.ready = True
                self._untidy = True
                self._loading.discard(staged.job.key)
                self.errors.pop(staged.job.key, None)
                seconds = time.monotonic() - staged.started
                log.info(
                    "variant %s ready in slot %d after %.2f s", staged.job.name, slot.index, seconds
                )
                return message
            case LoadFailed():
                if message.slot is not None:
                    self._clear(message.slot)
                    self._copied(message.slot)
                return self._end(message)

    def place_waiting(self, *, beside_steps: bool = False) -> None:
        """Give the first staged variant a slot if there is room, evicting idle ones.

        Call it after requests had their chance to take a variant that has just arrived: an idle
        slot is fair game. In order of arrival, so that a large variant cannot starve.

        beside_steps  a step is about to run: on a CPU, make a piece of the room only
        """
        turn_s = time.perf_counter() - self._last_turn
        if self._untidy and not self._loading:
            self._untidy = False
            self._copier.submit(trim_heap)
        if self._placing is None and self._waiting_for_room and self._storing is None:
            self._placing = self._take_slot(self._waiting_for_room[0])
        if self._placing is not None:
            piece = beside_steps and self._in_pieces
            self._make_room(self._placing, ROOM_SHARE * turn_s if piece else None)
        self._last_turn = time.perf_counter()

    def _take_slot(self, staged: Staged) -> Placing | None:
        victims = self._slots.victims_for(staged.n_bytes)
        if victims is None:
            return None
        del self._waiting_for_room[0]
        for victim in victims:
            log.info("evicting the delta in slot %d", victim.index)
            self._clear(victim)
        slot = self._slots.place(staged.job.key, staged.n_bytes)
        self._storing = slot
        return Placing(staged, slot, iter(staged.parameters))

    def _make_room(self, placing: Placing, seconds: float | None) -> None:
        """Reserve arrays for the rest of the parameters, or for some of them in so much time; once
        all have theirs the copy begins.
        """
        staged, slot = placing.staged, placing.slot
        began = time.perf_counter()
        try:
            room = min(1 << slot.index.bit_length(), self._slots.n_slots)
            for parameter in placing.rest:
                parameter.parameter.reserve(slot.index, parameter, room)
                if seconds is not None and time.perf_counter() - began > seconds:
                    return
            made = self._uploader.ready()
        except Exception as error:  # out of memory: this load fails, serving goes on
            self._placing = None
            self._hide(slot)  # now: the step to come must not meet arrays that were never made
            self._post(_failed(staged.job, error, slot))
            return
        self._placing = None
        self._copier.submit(self._store, staged, slot, made)

    def close(self) -> None:
        for pool in (self._readers, self._copier, self._builder):
            pool.shutdown(wait=True, cancel_futures=True)

    def _copied(self, slot: Slot) -> None:
        """The next may be copied, if it was this slot's turn."""
        if self._storing is slot:
            self._storing = None

    def _clear(self, slot: Slot) -> None:
        self._hide(slot)
        self._slots.evict(slot)

    def _hide(self, slot: Slot) -> None:
        for parameter in set(self._parameters.values()):
            parameter.hide(slot.index)
        self._weights.remove(slot.index)

    def _fail(self, job: LoadJob, message: str) -> LoadFailed:
        return self._end(LoadFailed(job.key, job.name, message))

    def _end(self, failed: LoadFailed) -> LoadFailed:
        self._loading.discard(failed.key)
        self._reads.pop(failed.key, None)
        self.errors[failed.key] = failed.message
        return failed

    def _stage(self, job: LoadJob) -> None:
        started = time.monotonic()
        try:
            self._post(self._staged(job, job.read(), started))
        except Exception as error:
            self._post(_failed(job, error))

    def _staged(self, job: LoadJob, artifact: Artifact, started: float) -> Staged:
        if job.mode == "apply":
            parameters = stage_variant(artifact, self._parameters, self._n_threads)
            return Staged(job, parameters, sum(p.n_bytes for p in parameters), started)
        weights = self._weights
        parameters = stage_variant(artifact, self._parameters, self._n_threads, weights.replaces)
        n_bytes = sum(p.n_bytes for p in parameters) + weights.bytes_for(artifact)
        return Staged(job, parameters, n_bytes, started, artifact)

    def _reconstruct(self, stored: Stored, artifact: Artifact) -> None:
        try:
            weights = self._weights.build(artifact)
            self._post(replace(stored, weights=weights))
        except Exception as error:
            self._post(_failed(stored.staged.job, error, stored.slot))

    def _store(self, staged: Staged, slot: Slot, made: Ready) -> None:
        try:
            transfers = [
                transfer
                for parameter in staged.parameters
                for transfer in parameter.parameter.transfers(slot.index, parameter)
            ]
            self._uploader.copy(transfers, after=made).wait()
            self._post(Stored(staged, slot))
        except Exception as error:
            self._uploader.abandon()
            self._post(_failed(staged.job, error, slot))


def _device_of(parameters: Mapping[str, DeltaParameter]) -> torch.device:
    return next((p.device for p in parameters.values()), torch.device("cpu"))


def _failed(job: LoadJob, error: Exception, slot: Slot | None = None) -> LoadFailed:
    retry_after_s = error.retry_after_s if isinstance(error, ServeError) else None
    message = _explain(job.name, error)
    return LoadFailed(job.key, job.name, message, slot, retry_after_s or RETRY_AFTER_S)


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, ServeError):
        return error.message
    if isinstance(error, ArtifactError | OSError):
        return unusable(name, error)
    if isinstance(error, UnsupportedTensor):
        return f"the delta of `{name}` cannot be used: {error}"
    log.exception("loading %s failed", name, exc_info=error)
    return f"the delta of `{name}` could not be loaded; see the server's log"
