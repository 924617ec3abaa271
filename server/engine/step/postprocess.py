"""From a sampled token to an output chunk: log probabilities, and the reasons to stop that ids can
tell.

Text and stop strings are not the engine thread's business; see `server.engine.output`.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from server.engine.request import Request
from server.engine.step.batch import LogitRows
from server.engine.step.sampler import Sampled, mask_foreign_ids_, token_logprobs
from server.engine.types import FinishReason, OutputChunk, TokenLogprob

SCORED_ROWS = 256  # of a prompt at once: float32 copies of their logits


class Postprocessor:
    """Stateless; the state of a request is on the request."""

    def collect_prompt_logprobs(self, request: Request, rows: LogitRows, logits: Tensor) -> None:
        """Keep the log probabilities of the prompt tokens that this chunk's rows predict.

        Row i of the chunk predicts token i + 1; the prompt's first token has none.
        """
        params, prompt = request.params, request.prompt_ids
        if not params.prompt_logprobs or params.logprobs is None:
            return
        collected = request.prompt_logprobs
        if not collected:
            collected.append(TokenLogprob(prompt[0], None))
        # Rows predict the position after their own. Those before `len(collected)` are computed
        # again, after a preemption.
        first = rows.first - request.n_computed - 1
        end = min(request.n_computed + rows.n + 1, len(prompt))
        for start in range(len(collected), end, SCORED_ROWS):
            stop = min(start + SCORED_ROWS, end)
            chunk = logits[first + start : first + stop].to(torch.float32, copy=True)
            mask_foreign_ids_(chunk, [request.variant.vocab_size] * len(chunk))
            logprobs = torch.log_softmax(chunk, -1)
            collected += token_logprobs(
                logprobs, prompt[start:stop], [params.logprobs] * len(chunk)
            )

    def chunk(self, request: Request, sampled: Sampled, max_len: int) -> OutputChunk:
        """Append the token to the request and say whether it was the last."""
        params = request.params
        prompt_logprobs = tuple(request.prompt_logprobs) if request.n_output == 0 else ()
        if params.max_tokens == 0:  # scoring: only the prompt was wanted
            return OutputChunk(
                prompt_logprobs=prompt_logprobs,
                finish_reason="length",
                n_cached_tokens=request.n_cached_tokens,
                queue_s=request.queue_s,
            )
        token = sampled.token_id
        request.tokens.append(token)
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        may_stop = request.n_output > params.min_tokens
        reason, stop_token = self._token_stop(request, token) if may_stop else (None, None)
        if reason is None and (
            request.n_output >= params.max_tokens or len(request.tokens) >= max_len
        ):
            reason = "length"
        return OutputChunk(
            token_ids=(token,),
            logprobs=() if sampled.logprob is None else (sampled.logprob,),
            prompt_logprobs=prompt_logprobs,
            may_stop=may_stop,
            finish_reason=reason,
            stop_reason=stop_token,
            n_cached_tokens=request.n_cached_tokens,
            queue_s=request.queue_s,
        )

    def _token_stop(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether the token itself ends the text, and which one did if the caller named it."""
        if token in request.params.stop_token_ids:
            return "stop", token
        if not request.params.ignore_eos and token in request.variant.text.eos_token_ids:
            return "stop", None
        return None, None
