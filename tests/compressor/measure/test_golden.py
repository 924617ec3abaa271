"""Golden prompts against transformers' own generation and a loop in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.artifact.reader import read_artifact
from compressor.checkpoint.files import Checkpoint
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError
from compressor.export.reconstruct import reconstruct
from compressor.measure.golden import Recorder, own_prompts


def log_probs(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_recorder_tokens_and_log_probs_are_those_of_the_three_models(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    compress(tiny_llama, tiny_llama_ft, delta, Options(ratio=8, certificate=True))
    certificate = read_artifact(delta).certificate
    assert certificate is not None
    assert certificate.texts == "built-in"
    reconstruct(tiny_llama, delta, tmp_path / "made")
    models = {
        "finetuned": AutoModelForCausalLM.from_pretrained(tiny_llama_ft).eval(),
        "delta": AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval(),
        "base": AutoModelForCausalLM.from_pretrained(tiny_llama).eval(),
    }
    kl, same, count = 0.0, 0, 0
    for prompt in certificate.prompts:
        ids, tokens = list(prompt.prompt), list(prompt.tokens)
        found = {name: log_probs(model, ids, tokens) for name, model in models.items()}
        assert found["finetuned"].argmax(-1).tolist() == tokens
        for name, table in found.items():
            chosen = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert getattr(prompt, name) == pytest.approx(chosen.tolist(), abs=2e-3), name
        p, q = found["finetuned"], found["delta"]
        kl += float((p.exp() * (p - q)).sum())
        same += int((q.argmax(-1) == p.argmax(-1)).sum())
        count += len(tokens)
    assert certificate.kl_per_token == pytest.approx(kl / count, rel=2e-3)
    assert certificate.top1_agreement == pytest.approx(same / count, abs=1e-3)
    assert certificate.base_kl_per_token > certificate.kl_per_token


def test_own_prompts_of_answers_are_what_comes_before_them(
    tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_ft)
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "The quick brown", "completion": " fox"}\n')
    (prompt,) = own_prompts(file, tokenizer)
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "The quick brown"


def test_recorder_unusable_prompts_raise_input_error(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    with (
        Checkpoint(tiny_llama) as base,
        Checkpoint(tiny_llama_ft) as tuned,
        pytest.raises(InputError, match=r"none\.txt"),
    ):
        Recorder(base, tuned, tmp_path / "none.txt")
