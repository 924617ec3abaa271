"""Reconstruct for hot variants: carries out what `HotPolicy` decides, beside the running engine.

    engine thread   tend()                     -> worker: read the artifact, build unit by unit
    engine thread   on_message(BuildEnded ...) -> installed between two steps; nothing waits for it

The variant's deltas stay resident and go on serving steps that it shares with others, and all
steps while its weights are being built, if that fails, and after they were dropped. Variants of
mode `reconstruct` get theirs from the loader; both have `ReconstructedWeights` make and hold them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from server.deltas.background import lower_priority
from server.deltas.loads import LoadJob
from server.deltas.slots import Slot, SlotTable
from server.engine.observer import Observer
from server.engine.reconstruct.policy import HotPolicy
from server.engine.schedule.scheduled import Scheduled
from server.engine.variant import Variant
from server.model.reconstructed import (
    ReconstructedOps,
    ReconstructedWeights,
    ReconstructStopped,
    ops_bytes,
)

log = logging.getLogger(__name__)
DECIDE_S = 0.5


@dataclass(frozen=True, slots=True)
class Alone:
    """A variant that has a step to itself."""

    slot: Slot
    variant: Variant


@dataclass(frozen=True, slots=True)
class BuildEnded:
    """A build ended; `ops` is None if it failed or was stopped."""

    slot: Slot
    name: str
    ops: ReconstructedOps | None
    seconds: float
    failed: bool = False


class Reconstructor:
    """Methods are for the engine thread. `post` may be called by the worker."""

    def __init__(
        self,
        weights: ReconstructedWeights,
        slots: SlotTable,
        budget_bytes: int,
        job_for: Callable[[Variant], LoadJob],
        post: Callable[[BuildEnded], None],
        observer: Observer | None = None,
    ) -> None:
        self._weights = weights
        self._slots = slots
        self._job_for = job_for
        self._post = post
        self._observer = observer
        self.policy = HotPolicy(budget_bytes, weights.n_bytes, weights.build_bytes)
        self._held: dict[str, tuple[Slot, str]] = {}  # promoted, by key
        self._seen: dict[str, Variant] = {}
        self._next_decision = 0.0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="reconstruct", initializer=lower_priority
        )

    def ran(self, alone: Alone | None, seconds: float) -> None:
        """A step took so long."""
        if alone is not None:
            self._seen[alone.slot.key] = alone.variant
        key = None if alone is None else alone.slot.key
        self.policy.ran(key, seconds, time.monotonic())

    def tend(self) -> None:
        """Between steps: note what has left its slot, and now and then decide anew.

        A step may be in flight: those use no reconstructed weights.
        """
        for key, (slot, _) in list(self._held.items()):
            if self._slots.get(key) is not slot:
                self._forget(key)  # the loader has removed the weights with the slot
        now = time.monotonic()
        if now < self._next_decision:
            return
        self._next_decision = now + DECIDE_S
        self._seen = {k: v for k, v in self._seen.items() if self._slots.get(k) is not None}
        decision = self.policy.decide(now)
        for key in decision.demote:
            slot, _ = self._held[key]
            self._weights.remove(slot.index)
            self._forget(key)
        if decision.promote is not None:
            self._start(decision.promote)

    def on_message(self, message: BuildEnded) -> None:
        """A build ended."""
        key, now = message.slot.key, time.monotonic()
        if message.ops is None or self._slots.get(key) is not message.slot:
            self.policy.abandoned(key, now, failed=message.failed)
            if message.failed and self._observer is not None:
                self._observer.on_reconstruct_failed(message.name)
            return
        self._weights.install(message.slot.index, message.ops, always=False)
        self._held[key] = (message.slot, message.name)
        self.policy.finished(key, ops_bytes(message.ops), message.seconds, now)
        log.info(
            "the weights of variant %s were reconstructed in %.1f s", message.name, message.seconds
        )
        if self._observer is not None:
            self._observer.on_promoted(message.name)

    def close(self) -> None:
        """Stop building."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: str) -> None:
        slot, variant = self._slots.get(key), self._seen.get(key)
        if slot is None or variant is None or not slot.ready:
            return
        job = self._job_for(variant)
        if job.mode != "apply":  # its weights are reconstructed already, by order
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
        except ReconstructStopped:
            log.info("variant %s left its slot while its weights were being built", job.name)
        except Exception:
            log.exception("reconstructing the weights of %s failed; its deltas go on", job.name)
            failed = True
        self._post(BuildEnded(slot, job.name, ops, time.monotonic() - started, failed))

    def _forget(self, key: str) -> None:
        _, name = self._held.pop(key)
        self.policy.dropped(key)
        log.info("the reconstructed weights of variant %s were dropped", name)
        if self._observer is not None:
            self._observer.on_demoted(name)


def only_variant(scheduled: Sequence[Scheduled]) -> Alone | None:
    """The variant of all rows of a step; None if they are mixed or the base's."""
    first = scheduled[0].request
    if first.slot is None or any(item.request.slot is not first.slot for item in scheduled):
        return None
    return Alone(first.slot, first.variant)
