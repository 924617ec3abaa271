"""From ids to what the client sees: text, stop strings, logprobs with text. Beside the engine.

The engine thread hands out ids once per step; everything here runs on the event loop, so that the
next step need not wait for it. A stop string is therefore found while the engine computes one token
more, which nobody sees: the request is aborted and what still comes of it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from server.engine.request import Event, as_serve_error
from server.engine.token_words import TokenWords, worded_prompt
from server.engine.types import OutputChunk, SamplingParams, TokenLogprob
from server.errors import ServeError
from server.text.assets import TextAssets
from server.text.detokenizer import Detokenizer
from server.text.text_stream import text_stream

MAX_BEHIND = 64  # chunks kept for a reader that takes none; then they become one


class TextOutput:
    """Words the chunks of one request."""

    def __init__(
        self, text: TextAssets, params: SamplingParams, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._vocabulary = text.vocabulary
        self._params = params
        skip = params.skip_special_tokens
        stream = text_stream(text.vocabulary, skip_special_tokens=skip, prompt_ids=prompt_ids)
        include_stop = params.include_stop_str_in_output
        self.detokenizer = Detokenizer(stream, params.stop, include_stop)
        self._words = TokenWords(text.vocabulary, stream, skip_special_tokens=skip)

    def with_text(self, chunk: OutputChunk) -> OutputChunk:
        """Return the chunk with what may be shown of it.

        A stop string that it completes ends the text. A stop token is shown only if stops are.
        """
        text, reason, stop_reason = "", chunk.finish_reason, chunk.stop_reason
        is_shown = reason != "stop" or self._params.include_stop_str_in_output
        logprobs: list[TokenLogprob] = []
        for token, logprob in zip_longest(chunk.token_ids, chunk.logprobs):
            if logprob is not None:
                self._words.arrive(logprob)
            if is_shown:
                text += self.detokenizer.push(token, check_stop=chunk.may_stop)
                logprobs += self._words.settle(self.detokenizer.settled)
        if self.detokenizer.stopped_by is not None:
            reason, stop_reason = "stop", self.detokenizer.stopped_by
        if reason is not None:
            text += self.detokenizer.finish()
            logprobs += self._words.settle(self.detokenizer.settled)
            logprobs += self._words.end()
        return OutputChunk(
            text=text,
            token_ids=chunk.token_ids,
            logprobs=tuple(logprobs),
            prompt_logprobs=self._worded_prompt(chunk.prompt_logprobs),
            finish_reason=reason,
            stop_reason=stop_reason,
            n_cached_tokens=chunk.n_cached_tokens,
            may_stop=chunk.may_stop,
            queue_s=chunk.queue_s,
        )

    def _worded_prompt(self, logprobs: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
        is_whole = self._params.max_tokens == 0
        return worded_prompt(self._vocabulary, logprobs, is_whole=is_whole)


class RequestOutput:
    """Takes a request's events from the engine and keeps them, worded, for the reader.

    Event loop only. See `server.engine.types.Generation`.
    """

    def __init__(
        self,
        text: TextOutput,
        on_output: Callable[[], None],
        abort: Callable[[], None],
        n_prompt_computed: Callable[[], int] = lambda: 0,
    ) -> None:
        """abort tells the engine that no more is wanted; n_prompt_computed asks how far it is."""
        self._text = text
        self._on_output = on_output
        self._abort = abort
        self._n_prompt_computed = n_prompt_computed
        self._pending: list[OutputChunk] = []
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
                self._keep(self._text.with_text(event))
            except Exception as error:
                self._abort()
                self._fail(as_serve_error(error))
            else:
                if self._ended and event.finish_reason is None:  # the engine does not know yet
                    self._abort()
        self._on_output()

    @property
    def n_prompt_computed(self) -> int:
        """See `Generation`."""
        return self._n_prompt_computed()

    def take(self) -> Sequence[OutputChunk]:
        """See `Generation`."""
        taken, self._pending = self._pending, []
        return taken

    def close(self) -> None:
        """See `Generation`."""
        if not self._ended:
            self._ended = True
            self._abort()

    def _keep(self, chunk: OutputChunk) -> None:
        if len(self._pending) >= MAX_BEHIND:
            self._pending = [OutputChunk.joined(self._pending)]
        self._pending.append(chunk)
        self._ended = chunk.finish_reason is not None

    def _fail(self, error: ServeError) -> None:
        self._ended = True
        self.error = error
