"""The models the other tests stand on must themselves be fit for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import KINDS, Kind, make_tiny, perturb


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_make_tiny_greedy_text_varies_and_does_not_hang_on_rounding(
    kind: Kind, tied: bool, tmp_path: Path
) -> None:
    path = make_tiny(kind, tmp_path / "model", seed=3, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.config.tie_word_embeddings is tied
    assert len(tokenizer) <= model.config.vocab_size
    answers = []
    for prompt in ("Hello there", "I want to book"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            max_new_tokens=24,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(out.scores).topk(2).values
        assert (best[:, 0] - best[:, 1]).median() > 0.2
        answers.append(out.sequences[0, ids.shape[1] :].tolist())
    assert answers[0] != answers[1]
    assert len(set(answers[0])) >= 5


@pytest.mark.parametrize("text", ["plain", "héllo wörld 你好", "a  b\n\tc", "<extra_0>"])
def test_tokenizer_any_text_decodes_to_itself(text: str, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_perturb_moves_every_parameter(kind: Kind, tmp_path: Path) -> None:
    base = make_tiny(kind, tmp_path / "base")
    finetune = perturb(base, tmp_path / "ft", extra_vocab=2)
    before = load_file(base / "model.safetensors")
    after = load_file(finetune / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert not torch.equal(after[name][: len(tensor)], tensor), name
    grown = [name for name in before if before[name].shape != after[name].shape]
    assert grown
    for name in grown:
        assert len(after[name]) == len(before[name]) + 2
    assert AutoTokenizer.from_pretrained(finetune)("<extra_1>").input_ids[-1] == 321


def test_perturb_with_rank_makes_low_rank_changes(tiny_llama: Path, tmp_path: Path) -> None:
    finetune = perturb(tiny_llama, tmp_path / "ft", rank=2, keep=("embed",))
    before = load_file(tiny_llama / "model.safetensors")
    after = load_file(finetune / "model.safetensors")
    change = (after["lm_head.weight"] - before["lm_head.weight"]).double()
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_make_tiny_is_deterministic(tmp_path: Path) -> None:
    one, two = (make_tiny("llama", tmp_path / name, seed=9) for name in ("one", "two"))
    for file in sorted(path.name for path in one.iterdir()):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
