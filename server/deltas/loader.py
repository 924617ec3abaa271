"""Bring a variant from disk into a slot, beside the running engine.

    engine thread   request(key)            -> reader: read, verify, decode, try (`LoadDecoded`)
    engine thread   assign a slot           -> copier: copy into the slot, wait until every byte
                                               has arrived (`LoadCopied`)
    engine thread   show                    -> rows of the slot get their delta from the next step

A variant of mode `reconstruct` has one stage more before it is shown: a worker makes its whole
weights, for `WeightsMaker` to install.

Nothing here waits for a step and no step waits for anything here: on a GPU the bytes go through
pinned memory and a stream of their own (`SlotUploader`). One variant is copied at a time:
making room for another may replace the arrays that a copy is writing to. On a GPU the engine thread
makes the room, in its own stream. On a CPU the copier does, beside the steps (`Room`), and readers
are few and of low priority (`background`): the cores that decode artifacts are those that the
steps need.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Protocol

import torch

from compressor.artifact.reader import Artifact
from compressor.codecs.term import TensorDelta
from server.deltas.background import background_pool
from server.deltas.claims import Claims
from server.deltas.failures import Failure, is_lasting
from server.deltas.host_memory import trim_heap
from server.deltas.loads import (
    LoadCopied,
    LoadDecoded,
    LoaderMessage,
    LoadFailed,
    LoadJob,
    failed_load,
)
from server.deltas.parameter import DeltaParameter, StagedParameter
from server.deltas.room import Room
from server.deltas.slots import Holder, Slot, SlotTable
from server.deltas.staging import decode_threads, reader_threads, stage_variant
from server.deltas.trial import VariantTrial
from server.deltas.upload import Ready, SlotUploader, Uploader

log = logging.getLogger(__name__)
MAX_PART_S = 0.002  # that a step waits for at a time
MAX_LOADS = 4  # under way at once, those that wait decoded in host memory for a slot included


class WeightsMaker(Protocol):
    """Makes, installs and forgets a slot's whole weights; `ReconstructedWeights` implements it."""

    def replaces(self, parameter: DeltaParameter) -> bool: ...
    def bytes_for(self, artifact: Artifact) -> int: ...
    def build(self, artifact: Artifact) -> Any: ...
    def install(self, slot: int, ops: Any, *, always: bool) -> None: ...
    def remove(self, slot: int) -> None: ...


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
        self.claims = Claims(slots, self._clear)
        self._post = post
        self._weights = weights
        device = _device_of(parameters)
        self._n_threads = decode_threads(device)
        self._uploader = uploader or SlotUploader(device)
        # On a GPU new arrays are filled in the steps' own stream, which the copies wait for.
        self._copier_makes_room = device.type == "cpu"
        self._readers = background_pool(reader_threads(device), "delta-reader")
        self._copier = background_pool(1, "delta-copier")
        # Its own: whole weights take seconds, and other variants come in meanwhile.
        self._builder = background_pool(1, "delta-builder")
        self._loading: set[str] = set()
        self._reads: dict[str, Future[None]] = {}  # by key, until they have ended
        self._waiting_for_room: list[LoadDecoded] = []
        self._copying: Slot | None = None  # where one variant's bytes are, or will be, copied
        self._showing: dict[Slot, Iterator[None]] = {}  # work of which steps see nothing yet
        self._untidy = False  # loads have ended since the heap was trimmed
        self.errors: dict[str, str] = {}  # by key, until it loads after all; safe to show
        self._tried: set[str] = set()  # keys whose terms were found right, see `VariantTrial`

    def loading(self) -> list[str]:
        """Keys that are on their way. Any thread."""
        return list(self._loading)

    def is_loading(self, key: str) -> bool:
        return key in self._loading

    def needs_room(self, key: str) -> bool:
        """Whether only a free slot is missing: for this key, or for one that is before it."""
        waiting = {decoded.job.key for decoded in self._waiting_for_room}
        return key in waiting or (bool(waiting) and key not in self._loading)

    def wants_room(self) -> bool:
        """Whether `assign_slots` may have something to do."""
        return bool(self._waiting_for_room) and self._copying is None

    def request(self, job: LoadJob, holders: Iterable[Holder]) -> None:
        """Begin to load unless that is under way already or `MAX_LOADS` are; ask again then.

        holders  the tenants that want it
        """
        if job.key not in self._loading:
            if len(self._loading) >= MAX_LOADS:
                return
            self._loading.add(job.key)
            self._reads[job.key] = self._readers.submit(self._read, job)
        self.claims.want(job.key, holders)

    def forget(self, key: str) -> None:
        """Nobody waits for this variant any more: do not begin to read it. What has begun goes on,
        so that a client who asks again finds it.
        """
        read = self._reads.get(key)
        if read is not None and read.cancel():
            self._ended(key)

    def handle(self, message: LoaderMessage) -> LoadFailed | LoadCopied | None:
        """Take a worker's message; return it if a load ended by it."""
        match message:
            case LoadDecoded():
                return self._queue_for_room(message)
            case LoadCopied():
                return self._show(message)
            case LoadFailed():
                if message.slot is not None:
                    self._clear(message.slot)
                    self._copied(message.slot)
                return self._end(message)

    def _queue_for_room(self, decoded: LoadDecoded) -> LoadFailed | None:
        job, n_bytes = decoded.job, decoded.n_bytes
        self._reads.pop(job.key, None)
        self.claims.decoded(job.key, n_bytes)
        if n_bytes > self._slots.budget_bytes:
            failure = Failure(
                f"it needs {n_bytes} bytes of device memory, the delta budget is "
                f"{self._slots.budget_bytes}",
                "an operator must raise --delta-budget-bytes",
            )
            job.reject(failure)
            return self._end(LoadFailed(job.key, job.name, failure))
        self._waiting_for_room.append(decoded)
        return None

    def _show(self, copied: LoadCopied) -> LoadFailed | LoadCopied | None:
        """From the next step on rows of the slot get their delta; first its whole weights are made,
        if its mode wants them.
        """
        decoded, slot = copied.decoded, copied.slot
        work = self._showing.get(slot)
        if work is None:
            work = self._showing[slot] = self._show_in_parts(copied)
        try:
            if not _is_done(work):
                self._post(copied)  # a step may run before the next part
                return None
        except Exception as error:  # out of memory: this load fails, serving goes on
            self._clear(slot)
            self._copied(slot)
            return self._end(failed_load(decoded.job, error))
        del self._showing[slot]
        if decoded.artifact is not None and copied.weights is None:
            opened = replace(copied, room=None)
            self._builder.submit(self._reconstruct, opened, decoded.artifact)
            return None
        slot.ready = True
        self._untidy = True
        self._ended(decoded.job.key)
        self.errors.pop(decoded.job.key, None)
        seconds = time.monotonic() - decoded.started
        log.info(
            "variant %s is ready in slot %d after %.2f s", decoded.job.name, slot.index, seconds
        )
        return copied

    def _show_in_parts(self, copied: LoadCopied) -> Iterator[None]:
        """There are hundreds of terms: a stream that runs must not wait for all of them at once."""
        decoded, slot = copied.decoded, copied.slot
        if copied.room is not None:
            yield from copied.room.opening()
        self._copied(slot)
        if copied.weights is not None:
            self._weights.install(slot.index, copied.weights, always=True)
        elif decoded.artifact is not None:
            return  # its weights are to be made
        for parameter in decoded.parameters:
            parameter.parameter.show(slot.index, parameter)
            yield

    def assign_slots(self) -> None:
        """Give the first decoded variant a slot if there is room, evicting idle ones.

        Call it after requests had their chance to take a variant that has just arrived: an idle
        slot is fair game. In order of arrival, so that a large variant cannot starve.
        """
        if self._untidy and not self._loading:
            self._untidy = False
            self._copier.submit(trim_heap)
        while self._waiting_for_room and self._copying is None:
            decoded = self._waiting_for_room[0]
            fits = self._slots.fits(decoded.job.key, decoded.n_bytes)
            holder = self.claims.holder_for(decoded.job.key) if fits else None
            if holder is None:
                del self._waiting_for_room[0]
                self._drop(decoded, fits=fits)
                continue
            victims = self._slots.victims_for(decoded.n_bytes)
            if victims is None:
                return
            del self._waiting_for_room[0]
            self._assign(decoded, victims, holder)

    def _drop(self, decoded: LoadDecoded, *, fits: bool) -> None:
        """Forget what was decoded: nobody may hold it now, or it fits nowhere beside the pinned."""
        job = decoded.job
        if fits:
            self._ended(job.key)
        else:
            self._post(LoadFailed(job.key, job.name, self.claims.beside_pinned(decoded.n_bytes)))

    def _assign(self, decoded: LoadDecoded, victims: Sequence[Slot], holder: Holder) -> None:
        """Give the variant a slot, and let the copier begin."""
        for victim in victims:
            log.info("the loader evicts the delta in slot %d", victim.index)
            self._clear(victim)
        slot = self._slots.assign(decoded.job.key, decoded.n_bytes, holder.tenant)
        self._copying = slot
        room = Room(slot.index, decoded.parameters)
        n_slots = min(1 << slot.index.bit_length(), self._slots.n_slots)
        try:
            for parameter in decoded.parameters:
                parameter.parameter.reserve(slot.index, parameter, n_slots)
            if not self._copier_makes_room:
                room.make(decoded.parameters)
                deque(room.opening(), maxlen=0)
            made = self._uploader.ready()
        except Exception as error:  # out of memory: this load fails, serving goes on
            self._hide(slot)  # now: the step to come must not meet arrays that were never made
            self._post(failed_load(decoded.job, error, slot))
            return
        self._copier.submit(self._copy, decoded, slot, room, made)

    def keep_errors(self, keys: Collection[str]) -> None:
        """Forget what is known of all other variants. Any thread."""
        for key in list(self.errors):
            if key not in keys:
                self.errors.pop(key, None)
        self._tried.intersection_update(keys)
        self.claims.keep(keys)

    def close(self) -> None:
        for pool in (self._readers, self._copier, self._builder):
            pool.shutdown(wait=True, cancel_futures=True)

    def _ended(self, key: str) -> None:
        self._loading.discard(key)
        self.claims.ended(key)
        self._reads.pop(key, None)

    def _copied(self, slot: Slot) -> None:
        """The next may be copied, if it was this slot's turn."""
        if self._copying is slot:
            self._copying = None

    def _clear(self, slot: Slot) -> None:
        self._showing.pop(slot, None)
        self._hide(slot)
        self._slots.evict(slot)

    def _hide(self, slot: Slot) -> None:
        for parameter in set(self._parameters.values()):
            parameter.hide(slot.index)
        self._weights.remove(slot.index)

    def _end(self, failed: LoadFailed) -> LoadFailed:
        self._ended(failed.key)
        self.errors[failed.key] = failed.failure.reason
        return failed

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
        check = _accept if job.key in self._tried else VariantTrial()
        if job.mode == "apply":
            parameters = stage_variant(artifact, self._parameters, n_threads, check=check)
            n_bytes, whole = 0, None
        else:
            parameters = stage_variant(
                artifact, self._parameters, n_threads, weights.replaces, check
            )
            n_bytes, whole = weights.bytes_for(artifact), artifact
        self._tried.add(job.key)
        n_bytes += sum(p.n_bytes for p in parameters)
        return LoadDecoded(job, parameters, n_bytes, started, whole)

    def _reconstruct(self, copied: LoadCopied, artifact: Artifact) -> None:
        try:
            weights = self._weights.build(artifact)
            self._post(replace(copied, weights=weights))
        except Exception as error:
            self._post(failed_load(copied.decoded.job, error, copied.slot))

    def _copy(self, decoded: LoadDecoded, slot: Slot, room: Room, made: Ready) -> None:
        try:
            if self._copier_makes_room:
                room.make(decoded.parameters)
            transfers = list(room.transfers(decoded.parameters))
            for parameter in decoded.parameters:
                transfers += parameter.parameter.transfers(slot.index, parameter)
            self._uploader.copy(transfers, after=made).wait()
            self._post(LoadCopied(decoded, slot, room if self._copier_makes_room else None))
        except Exception as error:
            self._uploader.abandon()
            self._post(failed_load(decoded.job, error, slot))


def _is_done(work: Iterator[None]) -> bool:
    """Do some of the work; whether that was all of it."""
    end = time.perf_counter() + MAX_PART_S
    return not any(time.perf_counter() > end for _ in work)


def _accept(delta: TensorDelta, staged: StagedParameter) -> None: ...


def _device_of(parameters: Mapping[str, DeltaParameter]) -> torch.device:
    return next((p.device for p in parameters.values()), torch.device("cpu"))
