"""The tiny models of the matrix are made from the classes' own defaults, and fit for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.builder import NotBuilt, build, prompt_of, tiny_model
from tests.models.cases import Case, all_cases, registered, variants
from tests.models.special import NOT_BUILT

FEW = ("llama", "gemma2", "mixtral", "deepseek_v3", "mamba", "gpt2-added-rows", "falcon-alibi")


def last_logprobs(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits
    return logits[0, -1].log_softmax(-1)


def test_cases_have_names_of_their_own() -> None:
    assert len(all_cases()) == len(registered()) + len(variants())


@pytest.mark.parametrize("name", FEW)
def test_build_case_distant_tokens_and_fine_tunes_matter(name: str, tmp_path: Path) -> None:
    case = all_cases()[name]
    pair = build(case, tmp_path)
    base, one, two = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        for path in (pair.base, *pair.finetunes)
    )
    prompt = prompt_of(60, seed=1)
    other = prompt_of(30, seed=2) + prompt[30:]
    right = last_logprobs(base, prompt)
    assert (right - last_logprobs(base, other)).abs().max() > 0.1
    assert (right - last_logprobs(one, prompt)[: len(right)]).abs().max() > 0.1
    assert one.config.vocab_size == base.config.vocab_size + case.added_rows
    for (key, before), after, again in zip(
        base.named_parameters(), one.parameters(), two.parameters(), strict=True
    ):
        assert not torch.equal(before, after[: len(before)]), key
        assert not torch.equal(after, again), key


def test_build_is_deterministic() -> None:
    one, two = (tiny_model(all_cases()["jamba"]).state_dict() for _ in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_build_impossible_case_says_why() -> None:
    with pytest.raises(NotBuilt, match="its configuration"):
        tiny_model(Case("x", "llama", {"num_attention_heads": 3}))


@pytest.mark.slow
def test_build_every_case_is_built_but_the_named_ones() -> None:
    failed = {}
    for case in all_cases().values():
        try:
            tiny_model(case)
        except NotBuilt as error:
            failed[case.name] = str(error)
    assert failed.keys() <= NOT_BUILT.keys(), failed
    built = NOT_BUILT.keys() & all_cases().keys() - failed.keys()
    assert not built, "take these out of NOT_BUILT"
