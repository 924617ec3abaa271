"""The quality benchmark from end to end on tiny models."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality import main, merge
from compressor.pipeline import Options, compress
from compressor.reconstruct import reconstruct


@pytest.mark.parametrize(
    ("base", "finetuned"),
    [
        ("tiny_llama", "tiny_llama_ft_vocab"),
        ("tiny_qwen2", "tiny_qwen2_ft"),
        ("tiny_gpt2", "tiny_gpt2_ft"),
    ],
)
def test_merge_equals_the_reconstructed_checkpoint(
    base: str, finetuned: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base_dir, tuned_dir = (request.getfixturevalue(name) for name in (base, finetuned))
    compress(base_dir, tuned_dir, tmp_path / "delta", Options(ratio=8))
    reconstruct(base_dir, tmp_path / "delta", tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    merge(model, tmp_path / "delta")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


def test_main_measures_controls_and_settings(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "test.csv"
    data.write_text("text,category\nWhere is my card,card_arrival\nHello,none\n")
    text = tmp_path / "text.txt"
    text.write_text("some text of no importance\n")
    status = main(
        [
            *("--base", str(tiny_llama), "--finetuned", str(tiny_llama_ft), "--name", "tiny"),
            *("--task", "intent", "--data", str(data), "--text", str(text), "--seeds", "2"),
            *("--ratios", "4", "8", "--settings", "blockdiag-4", "impart"),
            *("--out", str(tmp_path / "results" / "tiny")),
        ]
    )
    assert status == 0
    with (tmp_path / "results" / "tiny.csv").open() as file:
        rows = list(csv.DictReader(file))
    what = [(row["setting"], row["ratio_asked"], row["seed"]) for row in rows]
    assert what == [
        ("fine-tune", "1", "0"),
        ("base", "inf", "0"),
        ("blockdiag-4", "4.0", "0"),  # 4 bits a value cannot use so many bytes
        ("impart", "4.0", "0"),
        ("impart", "4.0", "1"),
        ("blockdiag-4", "8.0", "0"),  # its draw does not depend on the seed: measured once
        ("impart", "8.0", "0"),
    ]
    tuned, base, refused, drawn, redrawn, block, _ = rows
    assert refused["note"]
    assert float(tuned["kl_answer"]) == pytest.approx(0, abs=1e-6)
    assert 0 < float(block["kl_answer"]) < float(base["kl_answer"])
    assert drawn["kl_answer"] != redrawn["kl_answer"]
    assert float(block["ratio_true"]) == pytest.approx(8, rel=0.03)
    table = (tmp_path / "results" / "tiny.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n") == 2 + 6
