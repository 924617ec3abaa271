"""Bring a variant from disk into a slot, beside the running engine.

    engine thread   request(key)            -> worker: read, verify, decode ("staged")
    engine thread   place in the slot table -> worker: copy into the slot ("stored")
    engine thread   show                    -> rows of the slot get their delta from the next step

Nothing here waits for a step and no step waits for anything here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from compressor.artifact import Artifact
from compressor.errors import ArtifactError, UnsupportedTensor
from server.deltas.parameter import DeltaParameter, Mode, StagedParameter
from server.deltas.slots import Slot, SlotTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What to load. `read` runs on a worker thread and returns the verified artifact."""

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


@dataclass(frozen=True, slots=True)
class Stored:
    """Copied into its slot."""

    staged: Staged
    slot: Slot


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`message` is safe to show to clients."""

    key: str
    message: str
    slot: Slot | None = None


LoaderMessage = Staged | Stored | LoadFailed


def stage_variant(
    artifact: Artifact, parameters: Mapping[str, DeltaParameter], mode: Mode
) -> tuple[StagedParameter, ...]:
    """Decode every tensor of the artifact for this base. Raises ArtifactError or
    UnsupportedTensor if any does not fit: a variant is served whole or not at all.
    """
    staged = []
    for delta in artifact.tensors:
        parameter = parameters.get(delta.name)
        if parameter is None:
            raise UnsupportedTensor(
                f"{delta.name}: the served model has no such linear, embedding, norm or bias; "
                "serve the reconstructed checkpoint instead (impart reconstruct)"
            )
        staged.append(parameter.stage(delta, mode))
    return tuple(staged)


class DeltaLoader:
    """State of all loads. Methods are for the engine thread; `post` may be called by workers."""

    def __init__(
        self,
        parameters: Mapping[str, DeltaParameter],
        slots: SlotTable,
        post: Callable[[LoaderMessage], None],
        n_workers: int = 2,
    ) -> None:
        self._parameters = parameters
        self._slots = slots
        self._post = post
        self._pool = ThreadPoolExecutor(n_workers, thread_name_prefix="delta-loader")
        self._loading: set[str] = set()
        self._waiting_for_room: list[Staged] = []
        self._storing = False

    def is_loading(self, key: str) -> bool:
        return key in self._loading

    def request(self, job: LoadJob) -> None:
        """Begin to load unless that is under way already."""
        if job.key not in self._loading:
            self._loading.add(job.key)
            self._pool.submit(self._stage, job)

    def handle(self, message: LoaderMessage) -> LoadFailed | Stored | None:
        """Take a worker's message; return it if a load ended by it."""
        match message:
            case Staged():
                if message.n_bytes > self._slots.budget_bytes:
                    return self._fail(
                        message.job.key,
                        f"`{message.job.name}` needs {message.n_bytes} bytes of device memory, the "
                        f"delta budget is {self._slots.budget_bytes}; raise --delta-budget",
                    )
                self._waiting_for_room.append(message)
                self.place_waiting()
                return None
            case Stored(staged=staged, slot=slot):
                for parameter in staged.parameters:
                    parameter.parameter.show(slot.index, parameter)
                slot.ready = True
                self._storing = False
                self.place_waiting()
                self._loading.discard(staged.job.key)
                seconds = time.monotonic() - staged.started
                log.info(
                    "variant %s ready in slot %d after %.2f s", staged.job.name, slot.index, seconds
                )
                return message
            case LoadFailed():
                if message.slot is not None:
                    self._clear(message.slot)
                    self._storing = False
                    self.place_waiting()
                return self._fail(message.key, message.message)

    def place_waiting(self) -> None:
        """Give the next staged variant that fits a slot, evicting idle ones.

        One at a time: `reserve` may move the arrays that a copy under way would be writing to.
        """
        if self._storing:
            return
        for i, staged in enumerate(self._waiting_for_room):
            victims = self._slots.plan(staged.n_bytes)
            if victims is None:
                continue
            for victim in victims:
                log.info("evicting the delta in slot %d", victim.index)
                self._clear(victim)
            slot = self._slots.place(staged.job.key, staged.n_bytes)
            for parameter in staged.parameters:
                parameter.parameter.reserve(parameter, 1 << slot.index.bit_length())
            del self._waiting_for_room[i]
            self._storing = True
            self._pool.submit(self._store, staged, slot)
            return

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _clear(self, slot: Slot) -> None:
        for parameter in set(self._parameters.values()):
            parameter.hide(slot.index)
        self._slots.evict(slot)

    def _fail(self, key: str, message: str) -> LoadFailed:
        self._loading.discard(key)
        return LoadFailed(key, message)

    def _stage(self, job: LoadJob) -> None:
        started = time.monotonic()
        try:
            parameters = stage_variant(job.read(), self._parameters, job.mode)
            n_bytes = sum(p.n_bytes for p in parameters)
            self._post(Staged(job, parameters, n_bytes, started))
        except Exception as error:
            self._post(LoadFailed(job.key, _explain(job.name, error)))

    def _store(self, staged: Staged, slot: Slot) -> None:
        try:
            for parameter in staged.parameters:
                parameter.parameter.store(slot.index, parameter)
            self._post(Stored(staged, slot))
        except Exception as error:
            self._post(LoadFailed(staged.job.key, _explain(staged.job.name, error), slot))


def _explain(name: str, error: Exception) -> str:
    if isinstance(error, ArtifactError | UnsupportedTensor):
        return f"the delta of `{name}` cannot be used: {type(error).__name__}: {error}"
    log.exception("loading %s failed", name, exc_info=error)
    return f"the delta of `{name}` could not be loaded; see the server's log"
