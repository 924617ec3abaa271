"""One decode step ahead: the next is launched before the tokens of the last have been read.

    launch N    choose tokens, on the device   copy them to the host
                launch N + 1 on the device's tokens        read N's: stops, texts, bookkeeping
                            choose                         launch N + 2            read N + 1's ...

A host that reads every token before it prepares the next step keeps the device waiting meanwhile.
Where all rows of a step go on as they are, what the next one needs is known but for the tokens, and
those are in the device's memory already. A row that turns out to have ended has computed one token
for nothing; its KV blocks and slot are kept until then (`Lookahead.keeps`). The tokens are
the same as without.

Only for steps over static buffers: elsewhere kernels need to know the rows, or run on the host.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from server.deltas.loader import DeltaLoader
from server.engine.request import Request, Status
from server.engine.schedule.pacing import StepLoad
from server.engine.schedule.scheduled import Scheduled, load_of
from server.engine.schedule.scheduler import Scheduler
from server.engine.step.batch import Batch
from server.engine.step.runner import DecodeStep, Runner
from server.engine.step.sampler import Sampled, Sampler, is_plain


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step whose tokens nobody has read.

    chosen  int64 [2, n] on the device: each row's token, and whether its logits were finite
    copied  the same on the host, once `done` has come
    """

    step: DecodeStep
    chosen: Tensor
    copied: Tensor
    done: torch.cuda.Event | None
    load: StepLoad
    started: float

    @property
    def requests(self) -> list[Request]:
        return [item.request for item in self.step.scheduled]


class Lookahead:
    """The step in flight, and requests that have ended while it has a row of them: what they hold
    is its until it has been read. Engine thread only.

    enabled  whether steps are left in flight at all
    failed   why the step after the last could not be launched
    """

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
        loader: DeltaLoader,
        max_len: int,
        *,
        enabled: bool,
    ) -> None:
        self._runner, self._sampler = runner, sampler
        self._scheduler, self._loader = scheduler, loader
        self._max_len = max_len
        self._cuda = runner.base.device.type == "cuda"
        self.enabled = enabled
        self.in_flight: InFlight | None = None
        self.failed: Exception | None = None
        self._leaving: list[Request] = []
        self._last_read = 0.0

    def take(self, batch: Batch | DecodeStep) -> bool:
        """Launch a step and leave it in flight, if its tokens may be read later."""
        if not (self.enabled and isinstance(batch, DecodeStep)):
            return False
        if not all(is_plain(item.request) for item in batch.scheduled):
            return False
        self.in_flight = self._launch(batch)
        return True

    def advance(self, last: InFlight) -> dict[Request, Sampled]:
        """Launch the step after the one in flight, if nothing speaks against it; read that one. If
        the launch fails that one is read all the same, and `failed` says so.
        """
        self.in_flight, self.failed = None, None
        try:
            self.in_flight = self._follow(last)
        except Exception as error:
            self.failed = error
        if last.done is not None:
            last.done.synchronize()
        sampled = self._sampler.outcomes(last.requests, last.copied)
        return dict(zip(last.requests, sampled, strict=True))

    def seconds(self, last: InFlight) -> float:
        """How long the step took that has been read just now, as far as the next one's went on."""
        now, before = time.perf_counter(), self._last_read
        self._last_read = now
        return now - max(last.started, before)

    def keeps(self, request: Request) -> bool:
        """Whether the step in flight has a row of a request that ends now: then it is noted, and
        comes back from `settled` or `drop`.
        """
        if self.in_flight is None or request not in self.in_flight.requests:
            return False
        request.status = Status.FINISHED
        self._leaving.append(request)
        return True

    def settled(self, last: InFlight, sampled: dict[Request, Sampled]) -> list[Request]:
        """Requests that ended before, whose last row has been read."""
        held = [] if self.in_flight is None else self.in_flight.requests
        ended = [r for r in last.requests if r in self._leaving and r not in held]
        for request in ended:
            request.unproven |= sampled[request].error is not None
            self._leaving.remove(request)
        return ended

    def drop(self) -> list[Request]:
        """Forget the step in flight; returns who had ended before."""
        self.in_flight = None
        ended, self._leaving = self._leaving, []
        for request in ended:
            request.unproven = True
        return ended

    def _launch(self, step: DecodeStep) -> InFlight:
        """Run a step and choose its tokens; wait for nothing."""
        started, load = time.perf_counter(), load_of(step.scheduled)
        logits = self._runner.forward(step)
        requests = [item.request for item in step.scheduled]
        chosen = self._sampler.choose(requests, logits, [row.length for row in step.rows])
        copied = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=self._cuda)
        copied.copy_(chosen, non_blocking=True)
        done = None
        if self._cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return InFlight(step, chosen, copied, done, load, started)

    def _follow(self, last: InFlight) -> InFlight | None:
        """Launch the step after `last` for those of its rows that go on for all that is known."""
        going_on = [
            (i, request)
            for i, request in enumerate(last.requests)
            if request.status is Status.RUNNING and not self._ends(request)
        ]
        if not going_on or not self._runner.is_current() or self._somebody_comes(last):
            return None
        scheduled = tuple(Scheduled(request, 1) for _, request in going_on)
        if self._runner.reconstructed_in(scheduled):
            return None  # such steps run eagerly
        kv_blocks = self._scheduler.kv_blocks
        if not all(
            kv_blocks.grow(request.kv_blocks, request.n_computed + 2) for _, request in going_on
        ):
            return None  # somebody has to be preempted
        sources = tuple(i for i, _ in going_on)
        return self._launch(self._runner.prepare_inputs_after(last.chosen[0], sources, scheduled))

    def _somebody_comes(self, last: InFlight) -> bool:
        """Whether a request could join the next step, which is then no longer that of these."""
        scheduler = self._scheduler
        if self._loader.turn_wanted:
            return True
        if not scheduler.may_admit:
            return False
        if self._loader.wants_room():
            return True
        n_free = scheduler.max_num_seqs - len(scheduler.running) + len(self._leaving)
        ends = any(map(self._ends, last.requests))
        if n_free == 0 and not ends and not scheduler.has_claim():
            return False
        return any(
            request.slot is not None or not self._loader.is_loading(request.variant.key)
            for request in scheduler.waiting
        )

    def _ends(self, request: Request) -> bool:
        """Whether the token under way is its last, whatever it is."""
        longest = len(request.tokens) + 1 >= self._max_len
        return longest or request.n_output + 1 >= request.params.max_tokens
