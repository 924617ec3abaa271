"""The engine loop: one thread, one step at a time.

    commands -> scheduler.schedule -> runner.prepare_inputs -> runner.forward -> sampler -> events

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

from server.deltas.loader import DeltaLoader
from server.deltas.loads import (
    Happening,
    LoadCopied,
    LoadDecoded,
    LoaderMessage,
    LoadFailed,
    LoadJob,
)
from server.deltas.slots import SlotTable
from server.engine.accounting import Accounting
from server.engine.inbox import Command, Inbox
from server.engine.lifecycle import Events, RequestLifecycle
from server.engine.load_queue import too_late
from server.engine.observer import CoreStats, Observer
from server.engine.orders import Orders
from server.engine.reconstruct.reconstructor import BuildEnded, Reconstructor, only_variant
from server.engine.request import Request
from server.engine.residents import Residents
from server.engine.schedule.admission import Admission, AdmissionTicket
from server.engine.schedule.kv_blocks import KVBlockPool
from server.engine.schedule.pacing import PrefillPacer
from server.engine.schedule.queue import make_queue
from server.engine.schedule.scheduled import Scheduled, load_of
from server.engine.schedule.scheduler import Scheduler
from server.engine.step.batch import default_batch_tokens
from server.engine.step.lookahead import InFlight, Lookahead
from server.engine.step.runner import Runner
from server.engine.step.sampler import Sampler
from server.engine.variant import Variant
from server.errors import Draining, EngineDead, GenerationFailed
from server.settings import Settings

log = logging.getLogger(__name__)
IDLE_WAIT_S = 0.5
LOAD_WAIT_S = 0.05
MAX_FAILED_STEPS = 3  # in a row; then the engine is considered broken


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
        watch: Callable[[Happening], None] = lambda happening: None,
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._job_for = job_for
        self._publish = publish
        self._observer = observer
        self.value_bytes = runner.base.dtype.itemsize
        self.max_len = settings.max_model_len or runner.base.max_len
        self._inbox = Inbox()
        self.slots = SlotTable(settings.max_resident_variants, settings.delta_budget_bytes)
        runner.base.residency.n_slots = settings.max_resident_variants
        weights = runner.reconstructed
        self.loader = DeltaLoader(
            runner.base.parameters,
            self.slots,
            self._post_load,
            weights,
            host_budget_bytes=settings.host_delta_budget_bytes,
            watch=watch,
        )
        self.residents = Residents(self.slots, self.loader, lambda v: self._job_for(v))
        budget = settings.reconstruct_budget_bytes
        self.reconstructor = Reconstructor(
            weights, self.slots, budget, job_for, self._post_build, observer
        )
        batch_tokens = settings.max_batch_tokens or default_batch_tokens(runner.base.device)
        self._pacer = PrefillPacer(settings.max_prefill_slowdown)
        self.scheduler = Scheduler(
            kv_blocks,
            make_queue(settings.scheduling_policy, time.monotonic),
            max_num_seqs=settings.max_num_seqs,
            max_batch_tokens=batch_tokens,
            long_prefill_tokens=settings.long_prefill_token_threshold or batch_tokens,
            pacer=self._pacer,
            max_variants=settings.max_variants_per_step,
            acquire=self.residents.acquire,
            let_go=self.residents.release,
            wipe=runner.base.store.wipe,
        )
        self._sampler = Sampler()
        self._busy = False  # the last turn ran a batch
        self._lookahead = Lookahead(
            runner,
            self._sampler,
            self.scheduler,
            self.loader,
            self.max_len,
            enabled=settings.async_scheduling and runner.is_static,
        )
        self._failed_steps = 0
        self.admission = Admission(settings.max_queued_requests, settings.max_num_seqs)
        self._requests = RequestLifecycle(
            self.scheduler,
            self.residents,
            self._lookahead,
            self.admission,
            observer,
        )
        self.orders = Orders(
            self.slots,
            self.loader,
            self.residents,
            lambda v: self._job_for(v),
            waits=lambda key: bool(self._requests.waiting_for(key)),
        )
        self._accounting = Accounting(self._requests, self.scheduler, self.max_len, observer)
        self._stop = False
        self.heartbeat = time.monotonic()
        for module in runner.base.store.layers:  # a long step is alive as long as layers go by
            module.register_forward_pre_hook(self._beat)
        runner.base.kernels.on_compiled(self._beat)  # a layer's first step may compile many
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from other threads -------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request, ticket: AdmissionTicket | None = None) -> None:
        """Queue a request, which takes a permit of `ticket`; without one it is admitted here.

        Raises Draining or EngineDead at once, without a ticket also QueueFull.
        """
        admission = self.admission
        own = admission.admit(1, request.principal) if ticket is None else nullcontext(ticket)
        with own as admitted:
            admitted.hand_over(lambda: self._inbox.put(lambda: self._add(request)))

    def _add(self, request: Request) -> None:
        self.scheduler.add(request)
        error = too_late(request, self.scheduler.waiting, self.slots, self.loader)
        if error is not None:
            self._requests.fail(request, error)

    def between_steps(self, command: Command) -> None:
        """Have the engine's thread run it; see `Inbox`."""
        self._inbox.put(command)

    @property
    def n_open(self) -> int:
        return self.admission.n_open

    @property
    def dead(self) -> bool:
        return self.admission.dead

    def abort(self, request: Request) -> None:
        """Forget a request: no more of it is wanted. Its memory is free after the running step."""
        self._inbox.put(lambda: self._requests.abort(request))

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
            kv_block_tokens=kv_blocks.block_tokens,
            n_kv_blocks=kv_blocks.n_kv_blocks,
            n_free_kv_blocks=kv_blocks.n_free,
            n_preemptions=self.scheduler.n_preemptions,
            n_prefix_queried=kv_blocks.counts.n_queried,
            n_prefix_hit=kv_blocks.counts.n_hit,
            kernel_state=self._runner.base.kernels.state,
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
        self._requests.expire()
        self.reconstructor.tend()
        self.residents.tend()
        self.orders.tend()
        if self._lookahead.in_flight is not None:
            self._go_on(self._lookahead.in_flight)
        if self._lookahead.in_flight is None:
            scheduled = self.scheduler.schedule()
            self.residents.trim()
            self.orders.trim()
            self.loader.assign_slots()
            for request, error in self.residents.take_refused():
                self._requests.fail(request, error)
            self._busy = bool(scheduled)
            if scheduled:
                self._run_batch(scheduled)
        if events := self._requests.take_events():
            self._publish(events)

    def _run_batch(self, scheduled: list[Scheduled]) -> None:
        load, alone, started = load_of(scheduled), only_variant(scheduled), time.perf_counter()
        try:
            batch = self._runner.prepare_inputs(scheduled)
            if self._lookahead.take(batch):
                return  # read when the next is under way
            logits = self._runner.forward(batch)
            sampled = self._sampler.sample_chunks(batch.scheduled, batch.outputs, logits)
        except Exception as error:
            self._step_failed(scheduled, error)
            return
        self._failed_steps = 0
        self._accounting.take(batch, logits, sampled)
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
        self._accounting.take(last.step, None, sampled)
        seconds = self._lookahead.seconds(last)
        self._pacer.ran(last.load, seconds)
        self.reconstructor.ran(alone, seconds)
        for request in self._lookahead.settled(last, sampled):
            self._requests.release(request)
        if self._lookahead.failed is None:
            self._failed_steps = 0
        else:  # who has not ended was to go on in it
            self._step_failed(last.step.scheduled, self._lookahead.failed)

    def _drop_in_flight(self) -> None:
        for request in self._lookahead.drop():
            self._requests.release(request)

    # -- loads ---------------------------------------------------------------------------------

    def _post_load(self, message: LoaderMessage) -> None:
        self._inbox.put(lambda: self._on_load(message))

    def _on_load(self, message: LoaderMessage) -> None:
        self.scheduler.changed()
        ended = self.loader.handle(message)
        if isinstance(ended, LoadCopied):
            decoded: LoadDecoded = ended.decoded
            for request in self._requests.waiting_for(decoded.job.key):
                self.residents.take_loaded(request)
            if self._observer is not None:
                self._observer.on_loaded(decoded.job.name, time.monotonic() - decoded.started)
        if isinstance(ended, LoadFailed):
            self.residents.load_failed(ended)
            self.orders.load_failed(ended)
            for request in self._requests.waiting_for(ended.key):
                self._requests.fail(request, ended.failure.error_for(request.variant.name))
            if self._observer is not None:
                self._observer.on_load_failed(ended.name)

    def _post_build(self, message: BuildEnded) -> None:
        self._inbox.put(lambda: self.reconstructor.on_message(message))

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
            self._requests.fail(item.request, GenerationFailed(message))

    def _halt(self) -> None:
        self._drop_in_flight()
        draining = Draining("the server is shutting down", retry_after_s=5)
        for request in self._requests.open_requests():
            self._requests.fail(request, draining)
        self.orders.stop(draining)
        self._stop = True

    def _die(self) -> None:
        self.admission.die()
        self._inbox.run_last()  # requests still in it must hear of it too
        dead = EngineDead("the engine has stopped; the server is restarting")
        for request in self._requests.open_requests():
            self._requests.emit(request, dead)
        self.orders.stop(dead)
        self._publish(self._requests.take_events())
