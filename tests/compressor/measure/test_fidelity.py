"""KL and agreement against a float64 loop over tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.artifact.reader import read_artifact
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError
from compressor.export.reconstruct import reconstruct
from compressor.measure.fidelity import compare, load_model
from compressor.measure.texts import read_texts
from tests.tiny import CORPUS


def test_compare_equals_a_loop_over_tokens_in_float64(
    tiny_llama: Path, tiny_llama_ft: Path
) -> None:
    p, q = load_model(tiny_llama_ft), load_model(tiny_llama)
    samples = [[5, 9, 33, 7], [12, 100, 101], list(range(20, 60))]
    total, agreed, count = 0.0, 0, 0
    with torch.no_grad():
        for ids in samples:
            one, two = (m(torch.tensor([ids])).logits[0].double() for m in (p, q))
            for position in range(len(ids) - 1):
                log_p, log_q = one[position].log_softmax(0), two[position].log_softmax(0)
                total += float((log_p.exp() * (log_p - log_q)).sum())
                agreed += int(log_p.argmax() == log_q.argmax())
                count += 1
    found = compare(p, q, samples)
    assert found.n_tokens == count
    assert found.n_texts == 3
    assert found.kl_per_token == pytest.approx(total / count, rel=1e-3)
    assert found.top1_agreement == pytest.approx(agreed / count, rel=1e-4)
    same = compare(p, p, samples)
    assert (same.kl_per_token, same.top1_agreement) == (pytest.approx(0, abs=1e-9), 1.0)


@pytest.mark.parametrize("kind", ["llama_vocab", "gpt2", "gemma"])
def test_compress_with_calibration_records_what_the_reconstructed_model_measures(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(f"tiny_{kind.removesuffix('_vocab')}")
    tuned = request.getfixturevalue(
        f"tiny_{kind.replace('_vocab', '')}_ft{'_vocab' * ('_' in kind)}"
    )
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(CORPUS) + "\n")
    options = Options(ratio=8, calibration=texts)
    summary = compress(base, tuned, tmp_path / "delta", options)
    out = reconstruct(base, tmp_path / "delta", tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned)
    samples = [tokenizer(text).input_ids for text in CORPUS]
    p = AutoModelForCausalLM.from_pretrained(tuned)
    q = AutoModelForCausalLM.from_pretrained(out)
    expected = compare(p.eval(), q.eval(), samples)
    assert summary.fidelity == read_artifact(tmp_path / "delta").config.fidelity
    assert summary.fidelity["kl_per_token"] == pytest.approx(expected.kl_per_token, rel=1e-3)
    assert summary.fidelity["kl_per_token"] > 0
    assert summary.fidelity["n_tokens"] == expected.n_tokens
    assert math.isclose(summary.fidelity["top1_agreement"], expected.top1_agreement, abs_tol=1e-4)


def test_read_texts_lines_and_json_lines(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("one\n\n two \n")
    assert read_texts(lines) == ["one", " two "]
    rows = tmp_path / "a.jsonl"
    rows.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in ("x", "y\nz")))
    assert read_texts(rows) == ["x", "y\nz"]
    assert read_texts(rows, limit=1) == ["x"]


@pytest.mark.parametrize("content", ["", '{"txt": "x"}', "[", '{"text": 3}', '"text"'])
def test_read_texts_unusable_file_raises_input_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl"):
        read_texts(file)
    with pytest.raises(InputError, match="No such file"):
        read_texts(tmp_path / "none.txt")
