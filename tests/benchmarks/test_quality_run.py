"""The quality benchmark from end to end on tiny models."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.baselines import BASELINES, RoundToNearest
from benchmarks.methods import BaselineMethod, CodecMethod, Pair, Variant, make_method
from benchmarks.quality import main
from benchmarks.quality_plot import plot, style
from benchmarks.quality_report import drops_table, first_drops, markdown, overview
from benchmarks.quality_rows import Row, RowFile, read_rows
from benchmarks.svd_cache import cached_spectra
from compressor.artifact.reader import read_artifact
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError
from compressor.export.reconstruct import reconstruct

PAIRS = [
    ("tiny_llama", "tiny_llama_ft_vocab"),
    ("tiny_qwen2", "tiny_qwen2_ft"),
    ("tiny_gpt2", "tiny_gpt2_ft"),
]


def dirs(request: pytest.FixtureRequest, *names: str) -> list[Path]:
    return [request.getfixturevalue(name) for name in names]


@pytest.mark.parametrize("names", PAIRS)
def test_install_equals_the_reconstructed_checkpoint(
    names: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base, tuned = dirs(request, *names)
    compress(base, tuned, tmp_path / "delta", Options(ratio=8))
    reconstruct(base, tmp_path / "delta", tmp_path / "full", dtype="bfloat16")
    variant = Variant(base, torch.bfloat16)
    with Pair(base, tuned) as pair:
        make_method("rtn-8").install(variant, pair, 2.0, 0)  # nothing of it may stay
    variant.install(read_artifact(tmp_path / "delta").tensors)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    ours, theirs = variant.model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("names", PAIRS)
def test_baseline_restores_the_finetune_to_its_precision(
    names: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    base, tuned = dirs(request, *names)
    variant = Variant(base, torch.float32)
    with Pair(base, tuned) as pair:
        size = make_method("rtn-8").install(variant, pair, 2.0, 0)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    for name, value in expected.named_parameters():
        ours, before = variant.model.get_parameter(name), start.get_parameter(name)
        if value.ndim == 1 or value.shape != before.shape:
            rows = before.shape[0] if value.ndim == 2 else 0
            assert torch.equal(ours[rows:], value[rows:])
            continue
        step = (value - before).detach().abs().max() / 127
        assert float((ours - value).detach().abs().max()) <= float(step) * 0.6
    assert size.ratio == pytest.approx(pair.finetuned_bytes / size.n_bytes)


def test_lora_leaves_vectors_and_embeddings_as_the_base_has_them(
    tiny_llama: Path, tiny_llama_ft: Path
) -> None:
    variant = Variant(tiny_llama, torch.float32)
    with Pair(tiny_llama, tiny_llama_ft) as pair:
        make_method("lora").install(variant, pair, 4.0, 0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, before in base.named_parameters():
        same = torch.equal(variant.model.get_parameter(name), before)
        assert same == (before.ndim == 1 or "embed" in name or "lm_head" in name), name


def test_baseline_is_charged_with_what_surrounds_the_tensors(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    options = Options(codec_options={"bits": 16}, ratio=4.0, entropy="none")
    compress(tiny_llama, tiny_llama_ft, tmp_path / "delta", options)
    total = sum(file.stat().st_size for file in (tmp_path / "delta").iterdir())
    stored = 0
    for delta in read_artifact(tmp_path / "delta").tensors:
        stored += sum(p.nbytes for term in delta.terms for p in term.tensors().values())
        stored += delta.exact.values.nbytes if delta.exact else 0
    variant = Variant(tiny_llama, torch.float32)
    with Pair(tiny_llama, tiny_llama_ft) as pair:
        assert pair.surroundings_bytes(4.0) == total - stored
        size = make_method("dare").install(variant, pair, 4.0, 0)
        exact = sum(tensor.exact_bytes for tensor in pair.tensors)
    assert exact > 0
    assert size.n_bytes > total - stored + exact
    assert size.ratio == pytest.approx(4, rel=0.03)


def test_make_method_reads_names_presets_and_options() -> None:
    assert make_method("rtn-4") == BaselineMethod("rtn-4", BASELINES["rtn-4"])
    assert isinstance(BASELINES["rtn-4"], RoundToNearest)
    assert make_method("blockdiag-3") == CodecMethod("blockdiag", {"bits": 3})
    assert make_method("impart:beta=0.7,C=1") == CodecMethod("impart", {"beta": 0.7, "C": 1})
    assert make_method("impart").draws
    assert not make_method("blockdiag:bits=2").draws


@pytest.mark.parametrize("text", ["nonsense", "blockdiag:bits=5", "blockdiag:bits", "lowrank:x=1"])
def test_make_method_of_what_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        make_method(text)


def test_svd_cache_gives_the_same_artifact_and_is_used(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(name: str, ratio: float) -> str:
        out = tmp_path / name
        return compress(tiny_llama, tiny_llama_ft, out, Options("impart", ratio=ratio)).digest

    plain = digest("a", 8), digest("b", 4)
    with cached_spectra(tmp_path / "svd"):
        assert digest("c", 8) == plain[0]
    assert list((tmp_path / "svd").iterdir())
    monkeypatch.setattr(torch.linalg, "eigh", None)
    with cached_spectra(tmp_path / "svd"):
        assert digest("d", 4) == plain[1]


@pytest.fixture
def arguments(tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path) -> list[str]:
    data = tmp_path / "test.csv"
    data.write_text("text,category\nWhere is my card,card_arrival\nHello,none\n")
    text = tmp_path / "text.txt"
    text.write_text("some text of no importance\n")
    return [
        "--base", str(tiny_llama), "--finetuned", str(tiny_llama_ft), "--name", "tiny",
        "--task", "intent", "--data", str(data), "--text", str(text), "--seeds", "2",
        "--ratios", "4", "8", "--methods", "blockdiag-4", "impart", "dare", "bitdelta",
        "--dtype", "float32", "--out", str(tmp_path / "results" / "tiny"),
    ]  # fmt: skip


def test_main_measures_controls_and_methods(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    path = tmp_path / "results" / "tiny.csv"
    rows = read_rows(path)
    assert [(row.method, row.ratio_asked, row.seed) for row in rows] == [
        ("fine-tune", 1, 0),
        ("base", math.inf, 0),
        ("bitdelta", 16, 0),
        ("blockdiag-4", 4, 0),  # 4 bits a value cannot use so many bytes
        ("impart", 4, 0),
        ("dare", 4, 0),
        ("blockdiag-4", 8, 0),
        ("impart", 8, 0),
        ("dare", 8, 0),
        ("impart", 4, 1),
        ("dare", 4, 1),
        ("impart", 8, 1),
        ("dare", 8, 1),
    ]
    by_key = {row.key: row for row in rows}
    assert by_key["blockdiag-4", 4, 0].note
    assert rows[0].kl_task == pytest.approx(0, abs=1e-5)
    assert 0 < by_key["blockdiag-4", 8, 0].kl_task < rows[1].kl_task
    assert by_key["impart", 4, 0].kl_task != by_key["impart", 4, 1].kl_task
    assert by_key["dare", 8, 0].kl_task != by_key["dare", 8, 1].kl_task
    for row in rows[3:]:
        assert row.note or row.ratio_true == pytest.approx(row.ratio_asked, rel=0.03)
    table = (tmp_path / "results" / "tiny.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("\n| dare |") == 3 + 1 + 2
    assert "</svg>" in (tmp_path / "results" / "tiny.svg").read_text()


def test_main_measures_only_what_is_missing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "tiny.csv"
    arguments[arguments.index("blockdiag-4") : arguments.index("--dtype")] = ["dare"]
    assert main(arguments) == 0
    lines = path.read_text().splitlines()
    del lines[3]
    path.write_text("".join(f"{line}\r\n" for line in lines))
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert len(path.read_text().splitlines()) == len(lines) + 1
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    del lines[1]
    path.write_text("".join(f"{line}\r\n" for line in lines))
    assert main([*arguments, "--items", "1"]) == 2
    assert "n_items" in capsys.readouterr().err


# --- rows, table, plot --------------------------------------------------------------------------

ROW = Row("p", "dare", 8.0, 0, 8.1, 1000, 0.1, 0.2, 0.9, 0.8, 0.5, 0.1, 0.25, 1.0, 2.0, 2.5)
ROW = replace(ROW, dtype="float32", n_items=4, n_tokens=9, n_text_tokens=7, correct="0110")


def test_row_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    refused = replace(ROW, method="lora", note='at its smallest setting, "all" of it\ntakes 9')
    with RowFile(tmp_path / "a.csv") as file:
        file.add(ROW)
    with RowFile(tmp_path / "a.csv") as file:
        assert ("dare", 8.0, 0) in file
        assert ("dare", 8.0, 1) not in file
        file.add(refused)
        assert file.is_refused("lora", 8.0)
        assert not file.is_refused("dare", 8.0)
    assert read_rows(tmp_path / "a.csv") == [ROW, refused]


def test_row_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["name", "setting"], ["p", "dare"]])
    with pytest.raises(InputError, match="another version"):
        RowFile(path)


def test_markdown_averages_seeds_and_shows_their_range() -> None:
    other = replace(ROW, seed=1, kl_task=0.3, score=0.7, n_bytes=3000)
    refused = replace(ROW, method="lora", note="too small")
    base = replace(ROW, method="base", ratio_asked=math.inf, n_bytes=0, kl_task=2.0)
    lines = markdown([other, ROW, refused, base]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| dare", "| lora"]
    assert "| 0.00 |" in lines[3]  # 2000 bytes
    assert "0.2000 [0.1000, 0.3000]" in lines[3]
    assert "0.600 ± 0.100" in lines[3]
    assert lines[3].endswith("| 2 |")
    assert "not reached" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_first_drops_is_the_first_ratio_a_standard_error_below_the_finetune() -> None:
    tuned = replace(ROW, method="fine-tune", ratio_asked=1.0, score=0.9, score_se=0.02)
    dare = [
        replace(ROW, ratio_asked=ratio, seed=seed, score=score)
        for ratio, seed, score in ((16, 0, 0.885), (64, 0, 0.5), (32, 0, 0.84), (32, 1, 0.91))
    ]
    steady = [replace(ROW, method="impart", ratio_asked=r, score=0.881) for r in (16.0, 32.0)]
    refused = replace(ROW, method="lora", note="too small")
    once = replace(ROW, method="rtn-4", score=0.1)
    rows = [*dare, tuned, *steady, refused, once]
    assert first_drops(rows) == {"dare": 32.0, "impart": None}
    assert "| dare | 32x |" in drops_table(rows)
    assert "| impart | no ratio measured |" in drops_table(rows)
    assert first_drops(dare) == {}


def test_overview_has_a_row_a_method_and_a_column_a_ratio() -> None:
    rows = [
        replace(ROW, method="base"),
        replace(ROW, ratio_asked=16.0, kl_task=0.25),
        replace(ROW, kl_task=0.1),
        replace(ROW, seed=1, kl_task=0.3),
        replace(ROW, method="lora", note="too small"),
    ]
    assert overview(rows, "kl_task", 2).splitlines() == [
        "| | 8x | 16x |",
        "|---|---:|---:|",
        "| dare | 0.20 | 0.25 |",
        "| lora | - |  |",
    ]


def test_plot_is_the_same_file_every_time(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, ratio_asked=16.0, n_bytes=500), replace(ROW, method="impart")]
    for name in ("a.svg", "b.svg"):
        plot(rows, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert ">dare<" in text
    assert ">impart<" in text


def test_style_tells_twenty_methods_apart() -> None:
    assert len({style(index) for index in range(20)}) == 20
