"""Request -> SamplingParams: what the caller said, else the variant's generation_config, else
OpenAI's neutral value. The order, and which fields a generation_config may set, are vLLM's.
Nothing is refused here: `server.api.schemas` bounds the fields, `server.engine.limits` the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.api.schemas import GenerationRequest
from server.engine.types import SamplingParams

SEED_RANGE = 1 << 63
GREEDY_BELOW = 1e-5  # vLLM's: such a temperature means greedy
MIN_TEMPERATURE = 1e-2  # vLLM's: below, logits / temperature may overflow


def sampling_params(
    body: GenerationRequest,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int,
    child: int,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """Return how to sample choice number `child` of one prompt.

    Choices of one request differ in their seed only: ``seed + child``, as in vLLM.
    """

    def pick(name: str, neutral: float) -> Any:
        given = getattr(body, name)
        if given is None:
            given = defaults.get(name)
        return neutral if given is None else given

    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=_temperature(float(pick("temperature", 1.0))),
        top_p=float(pick("top_p", 1.0)),
        top_k=max(0, int(pick("top_k", 0))),
        min_p=float(pick("min_p", 0.0)),
        repetition_penalty=float(pick("repetition_penalty", 1.0)),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else (body.seed + child) % SEED_RANGE,
        stop=body.stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens is not False,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def output_budget(n_prompt: int, asked: int | None, default: int | None, max_model_len: int) -> int:
    """Return how many tokens one choice may generate.

    asked is the caller's own number, taken as it is; default (None: the rest of the context) is cut
    to what fits. It is one token where nothing fits, because the engine is who refuses that.
    """
    if asked is not None:
        return asked
    room = max(1, max_model_len - n_prompt)
    return room if default is None else min(default, room)


def _temperature(value: float) -> float:
    return 0.0 if value < GREEDY_BELOW else max(value, MIN_TEMPERATURE)
