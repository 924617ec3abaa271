"""From a sampled token to what the client sees: text, logprobs, reasons to stop."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from server.engine.batch import LogitRows
from server.engine.request import Request
from server.engine.sampler import Sampled, mask_foreign_ids_, token_logprob
from server.engine.types import FinishReason, OutputDelta, TokenLogprob
from server.errors import GenerationFailed, ServeError

log = logging.getLogger(__name__)


def as_serve_error(error: Exception) -> ServeError:
    """Return what clients may hear of an exception in one request's share of a step."""
    if isinstance(error, ServeError):
        return error
    log.exception("a request failed", exc_info=error)
    return GenerationFailed("this request failed inside the engine; other requests go on")


class Postprocessor:
    """Stateless; the state of a request is on the request."""

    def collect_prompt_logprobs(self, request: Request, rows: LogitRows, logits: Tensor) -> None:
        """Keep the log probabilities of the prompt tokens that this chunk's rows predict.

        Row i of the chunk predicts token i + 1; the prompt's first token has none.
        """
        params, prompt = request.params, request.prompt_ids
        if not params.prompt_logprobs or params.logprobs is None:
            return
        found = request.prompt_logprobs
        if not found:
            text = request.variant.text.token_text(prompt[0])
            found.append(TokenLogprob(prompt[0], text, None))
        for offset in range(rows.n):
            position = request.n_computed + offset + 1
            if position != len(found) or position >= len(prompt):
                continue  # recomputed after a preemption, or past the prompt
            row = logits[rows.first + offset].float().unsqueeze(0)
            mask_foreign_ids_(row, [request.variant.vocab_size])
            found.append(token_logprob(request, torch.log_softmax(row[0], -1), prompt[position]))

    def token(self, request: Request, sampled: Sampled, max_len: int) -> OutputDelta:
        """Append the token to the request and say what may be shown."""
        params = request.params
        prompt_logprobs = tuple(request.prompt_logprobs) if request.n_output == 0 else ()
        if params.max_tokens == 0:  # scoring: only the prompt was wanted
            return OutputDelta("", (), prompt_logprobs=prompt_logprobs, finish_reason="length")
        token = sampled.token_id
        request.tokens.append(token)
        may_stop = request.n_output > params.min_tokens
        reason, stop_reason = self._token_stop(request, token) if may_stop else (None, None)
        text = ""
        if reason is None:
            text = request.detokenizer.push(token, check_stop=may_stop)
            if request.detokenizer.stopped_by is not None:
                reason, stop_reason = "stop", request.detokenizer.stopped_by
            elif request.n_output >= params.max_tokens or len(request.tokens) >= max_len:
                reason = "length"
        if reason is not None:
            text += request.detokenizer.finish()
        return OutputDelta(
            text=text,
            token_ids=(token,),
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            prompt_logprobs=prompt_logprobs,
            n_cached_tokens=request.n_cached_tokens,
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def _token_stop(
        self, request: Request, token: int
    ) -> tuple[FinishReason | None, str | int | None]:
        """Whether the token itself ends the text; a stop token is not shown."""
        if token in request.params.stop_token_ids:
            return "stop", token
        if not request.params.ignore_eos and token in request.variant.text.eos_token_ids:
            return "stop", None
        return None, None
