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

import torch

from compressor.artifact.reader import Artifact
from server.deltas.background import background_pool
from server.deltas.claims import Claims
from server.deltas.costs import ReloadCosts
from server.deltas.failures import Failure
from server.deltas.host_memory import trim_heap
from server.deltas.host_tier import NO_HOST_ROOM, HostTier
from server.deltas.loads import (
    Happening,
    LoadCopied,
    LoadDecoded,
    LoaderMessage,
    LoadFailed,
    LoadJob,
    failed_load,
)
from server.deltas.parameter import DeltaParameter
from server.deltas.reader import VariantReader, WeightsMaker
from server.deltas.room import Room
from server.deltas.slots import Holder, Slot, SlotTable
from server.deltas.upload import Ready, SlotUploader, Uploader

log = logging.getLogger(__name__)
MAX_PART_S = 0.002  # that a step waits for at a time
MAX_LOADS = 4  # under way at once, those that wait decoded in host memory for a slot included


class DeltaLoader:
    """State of all loads. Methods are for the engine thread; `post` may be called by others."""

    def __init__(
        self,
        parameters: Mapping[str, DeltaParameter],
        slots: SlotTable,
        post: Callable[[LoaderMessage], None],
        weights: WeightsMaker,
        uploader: Uploader | None = None,
        host_budget_bytes: int = 0,
        watch: Callable[[Happening], None] = lambda happening: None,
    ) -> None:
        self._parameters = parameters
        self._slots = slots
        self.costs = ReloadCosts()
        self.host = HostTier(host_budget_bytes, self.costs)
        slots.reload_s = self._reload_s
        self._watch = watch
        self.claims = Claims(slots, self._clear)
        self._post = post
        self._weights = weights
        device = _device_of(parameters)
        self._reader = VariantReader(parameters, weights, post, device)
        self._uploader = uploader or SlotUploader(device)
        # On a GPU new arrays are filled in the steps' own stream, which the copies wait for.
        self._copier_makes_room = device.type == "cpu"
        self._copier = background_pool(1, "delta-copier")
        # Its own: whole weights take seconds, and other variants come in meanwhile.
        self._builder = background_pool(1, "delta-builder")
        self._loading: set[str] = set()
        self._reads: dict[str, Future[None]] = {}  # by key, until they have ended
        self._left: set[str] = set()  # keys on their way that nobody waits for any more
        self._waiting_for_room: list[LoadDecoded] = []
        self._copying: Slot | None = None  # where one variant's bytes are, or will be, copied
        self._showing: dict[Slot, Iterator[None]] = {}  # work of which steps see nothing yet
        self.turn_wanted = False  # something may have a slot, or go, that no request waits for
        self.evictions_wait = False
        self._untidy = False  # loads have ended since the heap was trimmed
        self.errors: dict[str, str] = {}  # by key, until it loads after all; safe to show

    def loading(self) -> list[str]:
        """Keys that are on their way. Any thread."""
        return list(self._loading)

    def is_loading(self, key: str) -> bool:
        return key in self._loading

    def needs_room(self, key: str) -> bool:
        """Whether only a free slot is missing: for this key, or for one that is before it."""
        waiting = {decoded.job.key for decoded in self._waiting_for_room}
        return key in waiting or (bool(waiting) and key not in self._loading)

    def expected_s(self, artifact_bytes: int) -> float | None:
        """How long reading so many bytes takes; None: it was never measured."""
        one_by_one = self.costs.expected_s(artifact_bytes)
        return None if one_by_one is None else one_by_one / self._reader.n_at_once

    def wants_room(self) -> bool:
        """Whether `assign_slots` may have something to do."""
        return bool(self._waiting_for_room) and self._copying is None

    def request(self, job: LoadJob, holders: Iterable[Holder]) -> None:
        """Begin to load unless that is under way already or `MAX_LOADS` are; ask again then.

        holders  the tenants that want it
        """
        if self._begin(job):
            self._left.discard(job.key)
            self.claims.want(job.key, holders)

    def prefetch(self, job: LoadJob) -> None:
        """Likewise, but into host memory only, unless somebody wants it on the device meanwhile."""
        self._begin(job)

    def _begin(self, job: LoadJob) -> bool:
        """Begin to load; whether it is under way now."""
        if job.key in self._loading:
            return True
        if len(self._loading) >= MAX_LOADS:
            return False
        self._loading.add(job.key)
        kept = self.host.get(job.key)
        if kept is None:
            self._reads[job.key] = self._reader.submit(job)
        else:
            self._post(replace(kept, job=job, started=time.monotonic(), read_s=None))
        self._watch(Happening("loading", job.key))
        return True

    def forget(self, key: str) -> None:
        """Nobody waits for this variant any more. Do not begin to read it; what has begun goes on
        as far as host memory, and into a slot where no other has to go for it.
        """
        read = self._reads.get(key)
        if read is not None and read.cancel():
            self._ended(key)
        elif key in self._loading:
            self._left.add(key)

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
        if decoded.read_s is not None:
            self.costs.was_read(job.key, job.n_bytes, decoded.read_s)
            self._watch(Happening("host", job.key, decoded.read_s))
        is_kept = self.host.put(decoded)
        if not self.claims.is_wanted(job.key):
            self._ended(job.key)
            return None if is_kept else LoadFailed(job.key, job.name, NO_HOST_ROOM)
        if n_bytes > self._slots.budget_bytes:
            failure = Failure(
                f"it needs {n_bytes} bytes of device memory, the delta budget is "
                f"{self._slots.budget_bytes}",
                "an operator must raise --delta-budget-bytes",
            )
            job.reject(failure)
            return self._end(LoadFailed(job.key, job.name, failure))
        self._waiting_for_room.append(decoded)
        self.turn_wanted = True
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
        now = time.monotonic()
        self.costs.was_copied(slot.key, now - copied.started)
        self._watch(Happening("device", slot.key, now - copied.started))
        self._watch(Happening("ready", slot.key, now - decoded.started))
        log.info(
            "variant %s is ready in slot %d after %.2f s",
            decoded.job.name,
            slot.index,
            now - decoded.started,
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
        self.turn_wanted = False
        if self._untidy and not self._loading:
            self._untidy = False
            self._copier.submit(trim_heap)
        while self._waiting_for_room and self._copying is None:
            decoded = self._waiting_for_room[0]
            if decoded.job.key in self._left and not self._costs_nobody(decoded):
                del self._waiting_for_room[0]
                log.info("nobody waits for variant %s; it takes no slot", decoded.job.name)
                self._ended(decoded.job.key)
                continue
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

    def _costs_nobody(self, decoded: LoadDecoded) -> bool:
        """Whether a load that nobody waits for any more may go on: there is room, and a tenant that
        wanted it need give up nothing.
        """
        key, n_bytes = decoded.job.key, decoded.n_bytes
        return self._slots.victims_for(n_bytes) == [] and self.claims.has_room(key)

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
        self._copier.submit(self._copy, decoded, slot, room, made, time.monotonic())

    def keep_errors(self, keys: Collection[str]) -> None:
        """Forget what is known of all other variants. Any thread."""
        for key in list(self.errors):
            if key not in keys:
                self.errors.pop(key, None)
        self._reader.keep(keys)
        self.claims.keep(keys)

    def keep(self, keys: Collection[str]) -> None:
        """Forget what was measured of all other variants, and their host memory."""
        self.costs.keep(keys)
        self.host.keep(keys)

    def unload(self, slot: Slot) -> None:
        """Take a variant out of device and host memory."""
        self._clear(slot)
        self.host.drop(slot.key)

    def close(self) -> None:
        self._reader.close()
        for pool in (self._copier, self._builder):
            pool.shutdown(wait=True, cancel_futures=True)

    def _reload_s(self, slot: Slot) -> float:
        return self.costs.reload_s(slot.key, from_host=self.host.bytes_of(slot.key) > 0)

    def _ended(self, key: str) -> None:
        self._loading.discard(key)
        self._left.discard(key)
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
        if slot.ready:
            self._watch(Happening("evicted", slot.key))

    def _hide(self, slot: Slot) -> None:
        for parameter in set(self._parameters.values()):
            parameter.hide(slot.index)
        self._weights.remove(slot.index)

    def _end(self, failed: LoadFailed) -> LoadFailed:
        self._ended(failed.key)
        self.errors[failed.key] = failed.failure.reason
        self._watch(Happening("failed", failed.key, reason=failed.failure.reason))
        return failed

    def _reconstruct(self, copied: LoadCopied, artifact: Artifact) -> None:
        try:
            weights = self._weights.build(artifact)
            self._post(replace(copied, weights=weights))
        except Exception as error:
            self._post(failed_load(copied.decoded.job, error, copied.slot))

    def _copy(
        self, decoded: LoadDecoded, slot: Slot, room: Room, made: Ready, started: float
    ) -> None:
        try:
            if self._copier_makes_room:
                room.make(decoded.parameters)
            transfers = list(room.transfers(decoded.parameters))
            for parameter in decoded.parameters:
                transfers += parameter.parameter.transfers(slot.index, parameter)
            self._uploader.copy(transfers, after=made).wait()
            opens = room if self._copier_makes_room else None
            self._post(LoadCopied(decoded, slot, started, opens))
        except Exception as error:
            self._uploader.abandon()
            self._post(failed_load(decoded.job, error, slot))


def _is_done(work: Iterator[None]) -> bool:
    """Do some of the work; whether that was all of it."""
    end = time.perf_counter() + MAX_PART_S
    return not any(time.perf_counter() > end for _ in work)


def _device_of(parameters: Mapping[str, DeltaParameter]) -> torch.device:
    return next((p.device for p in parameters.values()), torch.device("cpu"))
