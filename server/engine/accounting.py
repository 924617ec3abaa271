"""What a step means for its requests: tokens, events, ends."""

from __future__ import annotations

from torch import Tensor

from server.engine.lifecycle import RequestLifecycle
from server.engine.observer import Observer
from server.engine.request import Request, Status, as_serve_error
from server.engine.schedule.scheduled import Scheduled
from server.engine.schedule.scheduler import Scheduler
from server.engine.step.batch import Batch, LogitRows
from server.engine.step.postprocess import Postprocessor
from server.engine.step.runner import DecodeStep
from server.engine.step.sampler import Sampled

Outcomes = dict[Request, Sampled]


class Accounting:
    """Takes the outcomes of one step after another. Engine thread only."""

    def __init__(
        self,
        requests: RequestLifecycle,
        scheduler: Scheduler,
        max_len: int,
        observer: Observer | None,
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._max_len = max_len
        self._observer = observer
        self.post = Postprocessor()

    def take(self, batch: Batch | DecodeStep, logits: Tensor | None, sampled: Outcomes) -> None:
        """Take the outcomes of a step; `logits` are None after a step that was left in flight."""
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
                self.post.collect_prompt_logprobs(request, rows, logits)
            request.advance(item.n_tokens)
            request.unproven = True
            outcome = sampled.get(request)
            if outcome is None:
                return 0
            if outcome.error is not None:
                raise outcome.error
            self._scheduler.computed(request)
            chunk = self.post.chunk(request, outcome, self._max_len)
            self._requests.emit(request, chunk)
            if chunk.finish_reason is not None:
                request.finish_reason = chunk.finish_reason
                self._requests.close(request)
            return 1
        except Exception as error:
            self._requests.fail(request, as_serve_error(error))
            return 0
