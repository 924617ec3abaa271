from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor.auto.self_written as auto_self
from compressor.auto.self_written import self_written


@pytest.fixture
def loaded(tiny_llama: Path) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def test_self_written_counts_only_what_the_model_added(loaded: tuple) -> None:
    model, tokenizer = loaded
    samples = self_written(model, tokenizer)
    assert len(samples) > auto_self._EACH
    for sample in samples:
        n_given = sample.counted.index(True)
        n_own = len(sample.ids) - n_given
        assert n_given >= 1
        assert all(sample.counted[n_given:])
        assert 1 <= n_own <= auto_self._NEW_TOKENS
        if tokenizer.eos_token_id in sample.ids[n_given:]:
            assert sample.ids[n_given:].index(tokenizer.eos_token_id) == n_own - 1


def test_self_written_same_seed_same_texts_and_the_callers_generator_is_left_alone(
    loaded: tuple,
) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (self_written(*loaded, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one != other
    assert torch.equal(torch.get_rng_state(), before)


def test_self_written_of_a_peaked_model_is_its_greedy_text(loaded: tuple) -> None:
    model, tokenizer = loaded
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    for sample in self_written(model, tokenizer)[::8]:
        n_given = sample.counted.index(True)
        with torch.no_grad():
            best = model(torch.tensor([sample.ids])).logits[0, n_given - 1 : -1].argmax(-1)
        assert tuple(best.tolist()) == sample.ids[n_given:]
