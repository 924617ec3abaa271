"""What only the engine can refuse of a request: ids past the vocabulary, and what does not fit.

`server.api.schemas` bounds each field alone. Clients see the messages, which name the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.types import SamplingParams
from server.errors import ContextTooLong, InvalidRequest


def check_request(
    prompt_ids: Sequence[int], params: SamplingParams, *, vocab_size: int, max_model_len: int
) -> None:
    """Refuse a request that cannot be served as it is. Raises InvalidRequest."""
    if not prompt_ids:
        raise InvalidRequest("The prompt has no tokens.", param="prompt")
    _check_ids(prompt_ids, vocab_size, "prompt", "The prompt")
    _check_ids([i for i, _ in params.logit_bias], vocab_size, "logit_bias", "logit_bias")
    _check_ids(params.stop_token_ids, vocab_size, "stop_token_ids", "stop_token_ids")
    _check_length(len(prompt_ids), params.max_tokens, max_model_len)
    if params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens} but only {params.max_tokens} tokens may be "
            "generated: shorten the prompt, lower min_tokens or raise max_tokens.",
            param="min_tokens",
        )


def _check_ids(ids: Sequence[int], vocab_size: int, field: str, subject: str) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise InvalidRequest(
            f"{subject} holds a token id that this model does not have: ids are below "
            f"{vocab_size}.",
            param=field,
        )


def _check_length(n_prompt: int, max_tokens: int, max_model_len: int) -> None:
    if n_prompt + max_tokens <= max_model_len:
        return
    if n_prompt >= max_model_len:
        excess = f"the prompt has {n_prompt} tokens, which leaves no room to generate."
        raise ContextTooLong.by(max_model_len, f"{excess} Shorten the prompt.", param="prompt")
    raise ContextTooLong.by(
        max_model_len,
        f"you requested {n_prompt + max_tokens} tokens ({n_prompt} in the prompt, {max_tokens} in "
        "the completion). Shorten the prompt or lower max_tokens.",
        param="max_tokens",
    )
