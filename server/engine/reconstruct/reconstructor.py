"""Automatic reconstruct: carries out what `HotPolicy` decides, beside the running engine.

    engine thread   tend()                 -> worker: read the artifact, merge unit by unit
    engine thread   on_message(Merged ...) -> installed between two steps; nothing waits for it

The variant's deltas stay resident and go on serving steps that it shares with others, and all
steps while its weights are being merged, if that fails, and after they were dropped.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from server.deltas.loader import LoadJob
from server.deltas.slots import Slot, SlotTable
from server.engine.observer import Observer
from server.engine.reconstruct.policy import HotPolicy
from server.engine.schedule.scheduler import Scheduled
from server.engine.variant import Variant
from server.model.reconstructed import MergeableWeights, MergedOps, MergeStopped, ops_bytes

log = logging.getLogger(__name__)
DECIDE_S = 0.5
NICENESS = 10  # of the merging thread: it takes what the steps leave


@dataclass(frozen=True, slots=True)
class Alone:
    """A variant that has a step to itself."""

    slot: Slot
    variant: Variant


@dataclass(frozen=True, slots=True)
class Merged:
    """A build ended; `ops` is None if it failed or was stopped."""

    slot: Slot
    name: str
    ops: MergedOps | None
    seconds: float
    failed: bool = False


class Reconstructor:
    """Methods are for the engine thread. `post` may be called by the worker."""

    def __init__(
        self,
        weights: MergeableWeights,
        slots: SlotTable,
        budget_bytes: int,
        job_for: Callable[[Variant], LoadJob],
        post: Callable[[Merged], None],
        observer: Observer | None = None,
    ) -> None:
        self._weights = weights
        self._slots = slots
        self._job_for = job_for
        self._post = post
        self._observer = observer
        self.policy = HotPolicy(budget_bytes, weights.n_bytes, weights.build_bytes)
        self._held: dict[str, tuple[Slot, str]] = {}  # merged, by key: its slot and name
        self._seen: dict[str, Variant] = {}
        self._next_decision = 0.0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="merge", initializer=_lower_priority)

    def merged_slot(self, alone: Alone | None) -> int | None:
        """The slot whose merged weights a step of `alone` is to use, if there are any."""
        if alone is None or alone.slot.key not in self._held:
            return None
        slot, _ = self._held[alone.slot.key]
        return slot.index if slot is alone.slot else None

    def ran(self, alone: Alone | None, seconds: float) -> None:
        """A step took so long."""
        if alone is not None:
            self._seen[alone.slot.key] = alone.variant
        key = None if alone is None else alone.slot.key
        self.policy.ran(key, seconds, time.monotonic())

    def tend(self) -> None:
        """Between steps: drop what has left its slot, and now and then decide anew."""
        for key, (slot, _) in list(self._held.items()):
            if self._slots.get(key) is not slot:
                self._drop(key)
        now = time.monotonic()
        if now < self._next_decision:
            return
        self._next_decision = now + DECIDE_S
        decision = self.policy.decide(now)
        for key in decision.demote:
            self._drop(key)
        if decision.promote is not None:
            self._start(decision.promote)

    def on_message(self, message: Merged) -> None:
        """A build ended."""
        key, now = message.slot.key, time.monotonic()
        if message.ops is None or self._slots.get(key) is not message.slot:
            self.policy.abandoned(key, now, failed=message.failed)
            if message.failed and self._observer is not None:
                self._observer.on_merge_failed(message.name)
            return
        self._weights.install(message.slot.index, message.ops)
        self._held[key] = (message.slot, message.name)
        self.policy.finished(key, ops_bytes(message.ops), message.seconds, now)
        log.info("variant %s: weights merged in %.1f s", message.name, message.seconds)
        if self._observer is not None:
            self._observer.on_promoted(message.name)

    def close(self) -> None:
        """Stop building."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: str) -> None:
        slot, variant = self._slots.get(key), self._seen[key]
        if slot is None or not slot.ready:
            return
        job = self._job_for(variant)
        if job.mode != "apply":  # its weights are merged already, by order
            return
        self.policy.started(key)
        self._pool.submit(self._build, job, slot)

    def _build(self, job: LoadJob, slot: Slot) -> None:
        started = time.monotonic()

        def may_go_on() -> bool:
            return not self._stop.is_set() and self._slots.get(slot.key) is slot

        ops, failed = None, False
        try:
            ops = self._weights.build(job.read(), may_go_on)
        except MergeStopped:
            log.info("variant %s left its slot while its weights were being merged", job.name)
        except Exception:
            log.exception("merging the weights of %s failed; its deltas go on", job.name)
            failed = True
        self._post(Merged(slot, job.name, ops, time.monotonic() - started, failed))

    def _drop(self, key: str) -> None:
        slot, name = self._held.pop(key)
        self._weights.remove(slot.index)
        self.policy.dropped(key)
        log.info("variant %s: merged weights dropped", name)
        if self._observer is not None:
            self._observer.on_demoted(name)


def only_variant(scheduled: Sequence[Scheduled]) -> Alone | None:
    """The variant of all rows of a step; None if they are mixed or the base's."""
    first = scheduled[0].request
    if first.slot is None or any(item.request.slot is not first.slot for item in scheduled):
        return None
    return Alone(first.slot, first.variant)


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere niceness belongs to the process
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
