"""The engine loop: one thread, one step at a time.

    commands -> scheduler.schedule -> runner.plan -> runner.forward -> sampler -> events

All engine state belongs to this thread. Others talk to it through the inbox and hear from it
through `publish`, once per step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from server.deltas.loader import DeltaLoader, LoaderMessage, LoadFailed, LoadJob, Staged, Stored
from server.deltas.slots import Slot, SlotTable
from server.engine.inbox import Inbox
from server.engine.observer import CoreStats, Observer
from server.engine.reconstruct.reconstructor import BuildEnded, Reconstructor, only_variant
from server.engine.request import Event, Request, Status, as_serve_error
from server.engine.schedule.admission import Admission, Ticket
from server.engine.schedule.kv_blocks import KVBlockPool
from server.engine.schedule.pacing import PrefillPacer
from server.engine.schedule.scheduler import Missing, Scheduled, Scheduler, load_of
from server.engine.step.batch import Batch, LogitRows, default_batch_tokens
from server.engine.step.lookahead import InFlight, Lookahead
from server.engine.step.postprocess import Postprocessor
from server.engine.step.runner import DecodeStep, Runner
from server.engine.step.sampler import Sampled, Sampler
from server.engine.variant import BASE_KEY, Variant
from server.errors import (
    DeadlineExceeded,
    Draining,
    EngineDead,
    GenerationFailed,
    NoSlot,
    ServeError,
)
from server.settings import Settings

log = logging.getLogger(__name__)
IDLE_WAIT_S = 0.5
LOAD_WAIT_S = 0.05
MAX_FAILED_STEPS = 3  # in a row; then the engine is considered broken
Events = list[tuple[Request, Event]]
Outcomes = dict[Request, Sampled]


class EngineCore:
    """See the module's docstring."""

    def __init__(
        self,
        runner: Runner,
        settings: Settings,
        kv_blocks: KVBlockPool,
        job_for: Callable[[Variant], LoadJob],
        publish: Callable[[Events], None],
        observer: Observer | None = None,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._job_for = job_for
        self._publish = publish
        self._observer = observer
        self._max_len = settings.max_model_len or runner.base.max_len
        self._inbox = Inbox()
        self.slots = SlotTable(settings.max_resident_variants, settings.delta_budget_bytes)
        runner.base.residency.n_slots = settings.max_resident_variants
        weights = runner.reconstructed
        self.loader = DeltaLoader(runner.base.parameters, self.slots, self._post_load, weights)
        budget = settings.reconstruct_budget_bytes
        self.reconstructor = Reconstructor(
            weights, self.slots, budget, job_for, self._post_build, observer
        )
        batch_tokens = settings.max_batch_tokens or default_batch_tokens(runner.base.device)
        self._pacer = PrefillPacer(settings.max_prefill_slowdown)
        self.scheduler = Scheduler(
            kv_blocks,
            max_num_seqs=settings.max_num_seqs,
            max_batch_tokens=batch_tokens,
            long_prefill_tokens=settings.long_prefill_token_threshold or batch_tokens,
            pacer=self._pacer,
            max_variants=settings.max_variants_per_step,
            acquire=self._acquire,
            wipe=runner.base.store.wipe,
        )
        self._sampler = Sampler()
        self._post = Postprocessor()
        self._events: Events = []
        self._busy = False  # the last turn ran a batch
        self._lookahead = Lookahead(
            *(runner, self._sampler, self.scheduler, self.loader, self._max_len),
            enabled=settings.async_scheduling and runner.is_static,
        )
        self._failed_steps = 0
        self.admission = Admission(settings.max_queued_requests, settings.max_num_seqs)
        self._stop = False
        self.heartbeat = time.monotonic()
        for module in runner.base.store.probed:  # a long step is alive as long as layers go by
            module.register_forward_pre_hook(self._beat)
        runner.base.kernels.on_compiled(self._beat)  # a layer's first step may compile many
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from other threads -------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, ticket: Ticket | None = None) -> None:
        """Queue a request, which takes a place of `ticket`; without one it is admitted here.

        Raises Draining or EngineDead at once, without a ticket also QueueFull.
        """
        with self.admission.admit(1) if ticket is None else nullcontext(ticket) as admitted:
            admitted.hand_over(lambda: self._inbox.put(lambda: self.scheduler.add(request)))

    @property
    def n_open(self) -> int:
        return self.admission.n_open

    @property
    def dead(self) -> bool:
        return self.admission.dead

    def abort(self, request: Request) -> None:
        """Forget a request: no more of it is wanted. Its memory is free after the running step."""
        self._inbox.put(lambda: self._abort(request))

    def stop(self, timeout_s: float = 10.0) -> None:
        """Fail what is left with Draining and end the thread."""
        self.admission.stop()
        self._inbox.put(self._halt)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self.reconstructor.close()
        self.loader.close()

    def is_alive(self, max_age_s: float) -> bool:
        fresh = time.monotonic() - self.heartbeat < max_age_s
        return self._thread.is_alive() and not self.dead and fresh

    def stats(self) -> CoreStats:
        kv_blocks = self.scheduler.kv_blocks
        return CoreStats(
            n_running=len(self.scheduler.running),
            n_waiting=len(self.scheduler.waiting),
            n_kv_blocks=kv_blocks.n_kv_blocks,
            n_free_kv_blocks=kv_blocks.n_free,
            n_preemptions=self.scheduler.n_preemptions,
            n_prefix_queried=kv_blocks.counts.n_queried,
            n_prefix_hit=kv_blocks.counts.n_hit,
            **self._runner.stats(),
            resident={s.key: s for s in self.slots.residents()},
            reconstructed_bytes=self.reconstructor.policy.reconstructed,
        )

    # -- the loop ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop:
                self.turn()
        except Exception:
            log.exception("the engine failed")
            self._die()

    def turn(self) -> None:
        """Take commands, then run one step. Public so that tests can drive the loop."""
        self._take_commands()
        self.step()

    def _take_commands(self) -> None:
        """Run queued commands; wait for one if there is nothing to compute."""
        self._beat()
        idle_s = LOAD_WAIT_S if self.scheduler.waiting else IDLE_WAIT_S
        self._inbox.run(None if self._busy else idle_s)

    def _beat(self, *_: object) -> None:
        self.heartbeat = time.monotonic()

    def step(self) -> None:
        """One engine step: schedule, run, sample, publish."""
        self._expire()
        self.reconstructor.tend()
        if self._lookahead.in_flight is not None:
            self._go_on(self._lookahead.in_flight)
        if self._lookahead.in_flight is None:
            scheduled = self.scheduler.schedule()
            self.loader.place_waiting(beside_steps=bool(scheduled))
            self._busy = bool(scheduled)
            if scheduled:
                self._run_batch(scheduled)
        if self._events:
            events, self._events = self._events, []
            self._publish(events)

    def _run_batch(self, scheduled: list[Scheduled]) -> None:
        load, alone, started = load_of(scheduled), only_variant(scheduled), time.perf_counter()
        try:
            batch = self._runner.plan(scheduled)
            if self._lookahead.take(batch):
                return  # read when the next is under way
            logits = self._runner.forward(batch)
            sampled = self._sampler.sample_chunks(batch.scheduled, batch.outputs, logits)
        except Exception as error:
            self._step_failed(scheduled, error)
            return
        self._failed_steps = 0
        self._account(batch, logits, sampled)
        seconds = time.perf_counter() - started
        self._pacer.ran(load, seconds)
        self.reconstructor.ran(alone, seconds)

    def _go_on(self, last: InFlight) -> None:
        """Read the step in flight; the one after it may be under way by then."""
        alone = only_variant(last.step.scheduled)  # asked while all of them hold their slots
        try:
            sampled = self._lookahead.advance(last)
        except Exception as error:
            self._drop_in_flight()
            self._step_failed(last.step.scheduled, error)
            return
        self._account(last.step, None, sampled)
        seconds = self._lookahead.seconds(last)
        self._pacer.ran(last.load, seconds)
        self.reconstructor.ran(alone, seconds)
        for request in self._lookahead.settled(last, sampled):
            self._release(request)
        if self._lookahead.failed is None:
            self._failed_steps = 0
        else:  # who has not ended was to go on in it
            self._step_failed(last.step.scheduled, self._lookahead.failed)

    def _drop_in_flight(self) -> None:
        for request in self._lookahead.drop():
            self._release(request)

    def _account(self, batch: Batch | DecodeStep, logits: Tensor | None, sampled: Outcomes) -> None:
        """Take a step's outcomes."""
        n_generated = 0
        for item, rows in zip(batch.scheduled, batch.outputs, strict=True):
            n_generated += self._finish_chunk(item, rows, logits, sampled)
        if self._observer is not None:
            n_tokens = sum(s.n_tokens for s in batch.scheduled)
            self._observer.on_step(n_tokens - n_generated, n_generated)

    def _finish_chunk(
        self, item: Scheduled, rows: LogitRows, logits: Tensor | None, sampled: Outcomes
    ) -> int:
        """Account for one chunk; a failure here fails this request only."""
        request = item.request
        if request.status is not Status.RUNNING:
            return 0
        try:
            if logits is not None:
                self._post.collect_prompt_logprobs(request, rows, logits)
            request.n_computed += item.n_tokens
            request.unproven = True
            outcome = sampled.get(request)
            if outcome is None:
                return 0
            if outcome.error is not None:
                raise outcome.error
            self.scheduler.computed(request)
            chunk = self._post.chunk(request, outcome, self._max_len)
            self._emit(request, chunk)
            if chunk.finish_reason is not None:
                request.finish_reason = chunk.finish_reason
                self._close(request)
            return 1
        except Exception as error:
            self._fail(request, as_serve_error(error))
            return 0

    # -- requests ------------------------------------------------------------------------------

    def _acquire(self, request: Request) -> Slot | Missing:
        """Take a slot for the request, or see to it that its delta is being loaded."""
        key = request.variant.key
        slot = self.slots.acquire(key)
        if slot is not None:
            return slot
        if self.slots.get(key) is None:
            self.loader.request(self._job_for(request.variant))
        return Missing.NO_ROOM if self.loader.needs_room(key) else Missing.LOADING

    def _emit(self, request: Request, event: Event) -> None:
        self._events.append((request, event))

    def _fail(self, request: Request, error: ServeError) -> None:
        if request.status is Status.FINISHED:
            return
        request.finish_reason = "error"
        self._emit(request, error)
        self._close(request)

    def _abort(self, request: Request) -> None:
        if request.status is not Status.FINISHED:
            request.finish_reason = "abort"
            self._close(request)

    def _close(self, request: Request) -> None:
        """End a request; what it holds goes back once no step in flight has a row of it."""
        if not self._lookahead.keeps(request):
            self._release(request)

    def _release(self, request: Request) -> None:
        """KV blocks and slot go back."""
        self.scheduler.remove(request)
        if request.slot is None and not self._waiting_for(request.variant.key):
            self.loader.forget(request.variant.key)
        if request.slot is not None:
            self.slots.release(request.slot)
            request.slot = None
        started_at = request.started_at
        self.admission.leave(None if started_at is None else started_at - request.queued_at)
        if self._observer is not None:
            self._observer.on_finished(request)

    def _expire(self) -> None:
        now = time.monotonic()
        for request in self._open_requests():
            if request.deadline is not None and now > request.deadline:
                self._fail(request, self._too_late(request))

    def _too_late(self, request: Request) -> ServeError:
        key = request.variant.key
        if request.slot is None and key != BASE_KEY and self.loader.needs_room(key):
            return NoSlot(
                f"`{request.variant.name}` waited for other variants to make room until its time "
                "was up; try again later",
                retry_after_s=5,
            )
        return DeadlineExceeded("the request ran out of its time")

    def _open_requests(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    # -- loads ---------------------------------------------------------------------------------

    def _post_load(self, message: LoaderMessage) -> None:
        self._inbox.put(lambda: self._on_load(message))

    def _on_load(self, message: LoaderMessage) -> None:
        self.scheduler.changed()
        ended = self.loader.handle(message)
        if isinstance(ended, Stored):
            staged: Staged = ended.staged
            for request in self._waiting_for(staged.job.key):
                request.slot = self.slots.acquire(staged.job.key)  # before it can be evicted
            if self._observer is not None:
                self._observer.on_loaded(staged.job.name, time.monotonic() - staged.started)
        if isinstance(ended, LoadFailed):
            for request in self._waiting_for(ended.key):
                self._fail(request, ended.error)
            if self._observer is not None:
                self._observer.on_load_failed(ended.name)

    def _post_build(self, message: BuildEnded) -> None:
        self._inbox.put(lambda: self.reconstructor.on_message(message))

    def _waiting_for(self, key: str) -> list[Request]:
        waiting = self.scheduler.waiting
        return [r for r in waiting if r.variant.key == key and r.slot is None]

    # -- the end -------------------------------------------------------------------------------

    def _step_failed(self, scheduled: Sequence[Scheduled], error: Exception) -> None:
        log.exception("an engine step failed", exc_info=error)
        self._failed_steps += 1
        broken = "CUDA" in str(error) and not isinstance(error, torch.OutOfMemoryError)
        if broken or self._failed_steps >= MAX_FAILED_STEPS:
            raise error
        for item in scheduled:
            item.request.unproven = True
            message = "the engine step of this request failed; other requests go on"
            self._fail(item.request, GenerationFailed(message))

    def _halt(self) -> None:
        self._drop_in_flight()
        for request in self._open_requests():
            self._fail(request, Draining("the server is shutting down", retry_after_s=5))
        self._stop = True

    def _die(self) -> None:
        self.admission.die()
        self._inbox.run_last()  # requests still in it must hear of it too
        for request in self._open_requests():
            self._emit(request, EngineDead("the engine has stopped; the server is restarting"))
        self._publish(self._events)
        self._events = []
