"""What a model says after beginnings is its own logits', whatever its generation config says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressor.measure.continuation import continued

BEGINNINGS = [[5, 6, 7], [9, 8, 7], [20, 30, 40]]


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int], n_tokens: int) -> list[int]:
    """The whole sequence is run again for every token."""
    given = list(ids)
    for _ in range(n_tokens):
        given.append(int(model(torch.tensor([given])).logits[0, -1].argmax()))
    return given[len(ids) :]


@pytest.mark.parametrize(
    "own",
    [{}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}],
    ids=str,
)
def test_greedy_tokens_are_the_most_likely_ones_whatever_the_config(
    model: PreTrainedModel, own: dict[str, float]
) -> None:
    model.generation_config.update(**own)
    before = model.generation_config
    told: list[int] = []
    found = continued(model, BEGINNINGS, eos=None, n_tokens=12, sampled=False, tell=told.append)
    assert found == [greedy(model, ids, 12) for ids in BEGINNINGS]
    assert told == list(range(1, 13))
    assert model.generation_config is before


def test_text_ends_with_its_first_end_token(model: PreTrainedModel) -> None:
    whole = [greedy(model, ids, 12) for ids in BEGINNINGS]
    eos = whole[0][4]
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in whole]
    assert continued(model, BEGINNINGS, eos=eos, n_tokens=12, sampled=False) == wanted


def test_sampled_tokens_follow_the_generator(model: PreTrainedModel) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(continued(model, BEGINNINGS, eos=None, n_tokens=12, sampled=True))
    assert drawn[0] == drawn[1] != drawn[2]
