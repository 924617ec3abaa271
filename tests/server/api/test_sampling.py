"""Sampling parameters and output budgets of a request."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compressor.artifact.settings_files import RANGES
from server.api.sampling import output_budget, sampling_params
from server.api.schemas import CompletionRequest
from server.engine.limits import check_request
from server.engine.types import SamplingParams
from server.errors import InvalidRequest


def params(defaults=None, child=0, **fields) -> SamplingParams:
    body = CompletionRequest(model="m", prompt="p", **fields)
    return sampling_params(body, defaults or {}, max_tokens=10, child=child, logprobs=None)


def test_sampling_without_anything_is_openais_default():
    assert params() == SamplingParams(max_tokens=10)


def test_sampling_takes_generation_config_where_the_request_is_silent():
    defaults = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "eos_token_id": 2,
    }
    found = params(defaults, top_p=1.0, top_k=-1)

    assert (found.temperature, found.min_p, found.repetition_penalty) == (0.6, 0.1, 1.1)
    assert (found.top_p, found.top_k) == (1.0, 0)


@pytest.mark.parametrize(
    ("asked", "used"), [(0, 0.0), (1e-40, 0.0), (1e-3, 0.01), (0.5, 0.5), (100, 100.0)]
)
def test_temperature_near_zero_is_greedy_or_raised(asked, used):
    assert params(temperature=asked).temperature == used


def test_seed_differs_by_child_and_stays_in_range():
    assert [params(seed=5, child=i).seed for i in range(3)] == [5, 6, 7]
    for seed in (-(2**63), 2**63 - 1):
        assert 0 <= params(seed=seed, child=1).seed < 2**63
    assert params(child=1).seed is None


def test_output_budget_at_its_borders():
    assert output_budget(10, None, None, 16) == 6
    assert output_budget(10, None, 4, 16) == 4
    assert output_budget(10, None, 40, 16) == 6
    assert output_budget(10, 6, 4, 16) == 6
    assert output_budget(16, 0, None, 16) == 0  # echo only


@pytest.mark.parametrize(
    ("n_prompt", "asked", "default"), [(10, 7, None), (16, None, None), (16, 1, 1), (17, 0, 4)]
)
def test_output_budget_without_room_is_for_the_engine_to_refuse(n_prompt, asked, default):
    params = SamplingParams(max_tokens=output_budget(n_prompt, asked, default, 16))
    with pytest.raises(InvalidRequest, match="16 tokens"):
        check_request([0] * n_prompt, params, vocab_size=1, max_model_len=16)


def test_generation_config_greedy_keeps_its_penalty_and_gives_way_to_the_request():
    defaults = {"temperature": 0.0, "repetition_penalty": 1.2}
    found = params(defaults)
    assert (found.temperature, found.repetition_penalty) == (0.0, 1.2)
    assert params(defaults, temperature=0.7).temperature == 0.7


@pytest.mark.parametrize("key", sorted(RANGES.keys() - {"max_new_tokens"}))
def test_generation_config_may_set_what_a_request_may_ask_for(key: str) -> None:
    low, high = RANGES[key].low, RANGES[key].high
    whole = [int(low) - 1, int(low), int(low) + 1, int(high), int(high) + 1]
    tried: list[Any] = [*whole, low, low - 1e-3, low + 1e-3, high, high + 0.1, True, "1", 1e30]
    for value in tried:
        try:
            CompletionRequest(model="m", prompt="p", **{key: value})
            is_allowed = True
        except ValidationError:
            is_allowed = False
        assert (value in RANGES[key]) == is_allowed, value


def test_generation_config_may_set_as_many_tokens_as_a_request_may_ask_for() -> None:
    allowed = RANGES["max_new_tokens"]
    CompletionRequest(model="m", prompt="p", max_tokens=int(allowed.high))
    with pytest.raises(ValidationError):
        CompletionRequest(model="m", prompt="p", max_tokens=int(allowed.high) + 1)
