"""From ids to what the client sees: text, stop strings, logprobs with text. Beside the engine.

The engine thread hands out ids once per step; everything here runs on the event loop, so that the
next step need not wait for it. A stop string is therefore found while the engine computes one token
more, which nobody sees: the request is aborted and what still comes of it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.engine.detokenizer import Detokenizer
from server.engine.request import Event, StepOutput, TokenScore, as_serve_error
from server.engine.text import TextAssets
from server.engine.types import OutputDelta, SamplingParams, TokenLogprob, TopLogprob
from server.errors import ServeError

MAX_BEHIND = 64  # events kept for a reader that takes none; then they become one


class TextOutput:
    """Words the outputs of one request."""

    def __init__(self, text: TextAssets, params: SamplingParams) -> None:
        self._text = text
        self.detokenizer = Detokenizer(
            text.backend, params.stop, params.include_stop_str_in_output, params.skip_special_tokens
        )

    def delta(self, output: StepOutput) -> OutputDelta:
        """Return what may be shown of the step. A stop string that it completes ends the text."""
        token = output.token_id
        prompt_logprobs = tuple(self._logprob(score) for score in output.prompt_scores)
        if token is None:
            return OutputDelta(
                "", (), prompt_logprobs=prompt_logprobs, finish_reason=output.finish_reason
            )
        text, reason = "", output.finish_reason
        stop_reason: str | int | None = output.stop_reason
        if reason != "stop":  # a stop token is not shown
            text = self.detokenizer.push(token, check_stop=output.may_stop)
            if self.detokenizer.stopped_by is not None:
                reason, stop_reason = "stop", self.detokenizer.stopped_by
        if reason is not None:
            text += self.detokenizer.finish()
        return OutputDelta(
            text=text,
            token_ids=(token,),
            logprobs=() if output.score is None else (self._logprob(output.score),),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            n_cached_tokens=output.n_cached_tokens,
        )

    def _logprob(self, score: TokenScore) -> TokenLogprob:
        token_text = self._text.token_text
        top = tuple(TopLogprob(i, token_text(i), value) for i, value in score.top)
        return TokenLogprob(score.token_id, token_text(score.token_id), score.logprob, top)


class RequestOutput:
    """Takes a request's events from the engine and keeps them, worded, for the reader.

    Event loop only. See `server.engine.types.Generation`.
    """

    def __init__(
        self, text: TextOutput, on_output: Callable[[], None], abort: Callable[[], None]
    ) -> None:
        self._text = text
        self._on_output = on_output
        self._abort = abort  # tells the engine that no more is wanted
        self._pending: list[OutputDelta] = []
        self._ended = False
        self.error: Exception | None = None

    def receive(self, event: Event) -> None:
        """Take an event. A failure here ends this request only."""
        if self._ended:
            return
        if isinstance(event, ServeError):
            self._fail(event)
        else:
            try:
                self._keep(self._text.delta(event))
            except Exception as error:
                self._abort()
                self._fail(as_serve_error(error))
            else:
                if self._ended and event.finish_reason is None:  # the engine does not know yet
                    self._abort()
        self._on_output()

    def take(self) -> Sequence[OutputDelta]:
        """See `Generation`."""
        taken, self._pending = self._pending, []
        return taken

    def close(self) -> None:
        """See `Generation`."""
        if not self._ended:
            self._ended = True
            self._abort()

    def _keep(self, delta: OutputDelta) -> None:
        if len(self._pending) >= MAX_BEHIND:
            self._pending = [OutputDelta.joined(self._pending)]
        self._pending.append(delta)
        self._ended = delta.finish_reason is not None

    def _fail(self, error: ServeError) -> None:
        self._ended = True
        self.error = error
