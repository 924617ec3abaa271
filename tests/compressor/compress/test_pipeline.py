"""Compression end to end on tiny models: sizes, what is stored and how, determinism, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.artifact import identity
from compressor.artifact.reader import read_artifact
from compressor.artifact.staging import StagedTensor, Staging
from compressor.checkpoint.files import Checkpoint
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import BudgetError, CheckpointError, InputError, OutputError
from tests.tiny import make_tiny, perturb

CODECS = [
    ("blockdiag", {}),
    ("blockdiag", {"head_fraction": 0.3}),
    ("lowrank", {}),
    ("impart", {}),
    ("impart-qt", {"beta": 0.0}),
]


def directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Larger than the other tiny models, so that metadata leaves room for weights."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_tiny(
        "llama", folder / "base", seed=1, hidden_size=128, intermediate_size=256, vocab_size=512
    )
    return base, perturb(base, folder / "tuned", seed=2, scale=0.05, max_shard_size="500KB")


@pytest.mark.parametrize(("codec", "codec_options"), CODECS)
@pytest.mark.parametrize("ratio", [9, 13.5, 24])
def test_compress_ratio_asked_for_is_met_by_the_whole_directory(
    pair: tuple[Path, Path],
    tmp_path: Path,
    codec: str,
    codec_options: dict[str, float],
    ratio: float,
) -> None:
    options = Options(codec=codec, codec_options=codec_options, ratio=ratio)
    summary = compress(*pair, tmp_path / "out", options)
    tuned_bytes = sum(file.stat().st_size for file in pair[1].glob("*.safetensors"))
    assert len(list(pair[1].glob("*.safetensors"))) > 1
    true = tuned_bytes / directory_bytes(tmp_path / "out")
    assert true == pytest.approx(ratio, rel=0.03)
    assert summary.ratio == pytest.approx(true)
    artifact = read_artifact(tmp_path / "out")
    assert artifact.n_bytes == directory_bytes(tmp_path / "out")
    assert artifact.config.ratio_requested == ratio
    assert artifact.config.finetuned_bytes == tuned_bytes
    assert artifact.digest == summary.digest


def test_compress_impossible_ratios_raise_budget_error_naming_one_that_works(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for ratio, reason in ((5000, "smallest setting"), (1.5, "largest setting")):
        with pytest.raises(BudgetError, match=reason) as caught:
            compress(*pair, tmp_path / "out", Options(ratio=ratio))
        assert not (tmp_path / "out").exists()
        possible = float(str(caught.value).rsplit(" ", 1)[-1])
        compress(*pair, tmp_path / "out", Options(ratio=possible, overwrite=True))
        (tmp_path / "out").rename(tmp_path / f"done-{ratio}")


def test_compress_same_inputs_and_seed_give_identical_files(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for codec in ("blockdiag", "impart"):
        first = compress(*pair, tmp_path / f"{codec}1", Options(codec=codec, ratio=8, seed=7))
        second = compress(*pair, tmp_path / f"{codec}2", Options(codec=codec, ratio=8, seed=7))
        assert first.digest == second.digest
        for file in first.path.iterdir():
            assert file.read_bytes() == (second.path / file.name).read_bytes()
    other = compress(*pair, tmp_path / "other", Options(codec="impart", ratio=8, seed=8))
    assert other.digest != second.digest


def test_compress_interrupted_run_resumes_to_identical_bytes(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(*pair, tmp_path / "whole", Options(ratio=8))
    add, calls = Staging.add, []

    def failing(staging: Staging, key: str, *arguments: Any) -> StagedTensor:
        calls.append(key)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return add(staging, key, *arguments)

    monkeypatch.setattr(Staging, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        compress(*pair, tmp_path / "out", Options(ratio=8))
    assert not (tmp_path / "out").exists()
    resumed = compress(*pair, tmp_path / "out", Options(ratio=8))
    assert resumed.digest == whole.digest
    assert calls.count(calls[19]) == 2
    assert len(set(calls)) == len(calls) - 1  # nothing but what was interrupted is done twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_compress_base_and_fine_tune_are_hashed_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    sample = identity._sample
    monkeypatch.setattr(
        identity, "_sample", lambda stored: hashed.append(stored.file.parent) or sample(stored)
    )
    compress(*pair, tmp_path / "out", Options(codec="auto", ratio=12))
    n_tensors = len(read_artifact(tmp_path / "out").tensors)
    assert sorted(set(hashed)) == sorted(pair)
    assert len(hashed) == 2 * n_tensors


def test_compress_existing_output_is_said_before_the_checkpoints_are_compared(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    stages = []
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="exists"):
        compress(*pair, tmp_path / "out", Options(), lambda stage, *_: stages.append(stage))
    assert stages == []


def test_compress_stores_norms_exactly_and_skips_what_is_unchanged(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    tuned = perturb(tiny_qwen2, tmp_path / "t", keep=("layers.0.", "embed_tokens"))
    compress(tiny_qwen2, tuned, tmp_path / "out", Options(ratio=10))
    artifact = read_artifact(tmp_path / "out")
    stored = {delta.name: delta for delta in artifact.tensors}
    expected = load_file(tuned / "model.safetensors")
    assert set(artifact.config.unchanged) == {
        name for name in expected if "layers.0." in name or "embed_tokens" in name
    }
    assert stored.keys() | set(artifact.config.unchanged) == expected.keys()
    for name, delta in stored.items():
        if expected[name].ndim == 1:
            assert delta.terms == ()
            assert delta.exact is not None
            assert torch.equal(delta.exact.values, expected[name])
        else:
            assert delta.terms
            assert delta.exact is None
    entries = {entry.name: entry for entry in artifact.config.tensors}
    assert all((entries[n].error is not None) == bool(d.terms) for n, d in stored.items())


def test_compress_added_vocabulary_rows_are_exact(
    tiny_llama: Path, tiny_llama_ft_vocab: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft_vocab, tmp_path / "out", Options(ratio=8))
    artifact = read_artifact(tmp_path / "out")
    expected = load_file(tiny_llama_ft_vocab / "model.safetensors")
    for delta in artifact.tensors:
        if delta.name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert (delta.shape, delta.base_shape) == ((323, 64), (320, 64))
            assert delta.exact is not None
            assert delta.exact.row_start == 320
            assert torch.equal(delta.exact.values, expected[delta.name][320:])
            assert delta.terms[0].shape == (320, 64)
    assert artifact.config.finetuned_details["config"] == {"vocab_size": 323}
    assert {"tokenizer.json", "chat_template.jinja"} <= artifact.aux.keys()
    assert artifact.config.coding is not None
    assert artifact.config.coding.raw_bytes["added rows"] == 2 * 3 * 64 * 4


def test_compress_only_added_rows_changed_encodes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    tuned = perturb(tiny_llama, tmp_path / "t", extra_vocab=2, keep=("",))
    with pytest.raises(BudgetError, match=r"nearest possible here is (\d+)") as caught:
        compress(tiny_llama, tuned, tmp_path / "out", Options(ratio=2))
    possible = float(str(caught.value).rsplit(" ", 1)[-1])
    compress(tiny_llama, tuned, tmp_path / "out", Options(ratio=possible))
    artifact = read_artifact(tmp_path / "out")
    assert {d.name for d in artifact.tensors} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(d.terms == () for d in artifact.tensors)


def test_compress_tied_embedding_is_encoded_once(
    tiny_gemma: Path, tiny_gemma_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_gemma, tiny_gemma_ft, tmp_path / "out", Options(ratio=10))
    artifact = read_artifact(tmp_path / "out")
    names = [delta.name for delta in artifact.tensors]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert artifact.config.base.tied == (("lm_head.weight", "model.embed_tokens.weight"),)


def test_compress_recorded_errors_equal_the_float64_formula(
    tiny_gpt2: Path, tiny_gpt2_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_gpt2, tiny_gpt2_ft, tmp_path / "out", Options(ratio=10))
    artifact = read_artifact(tmp_path / "out")
    base = load_file(tiny_gpt2 / "model.safetensors")
    tuned = load_file(tiny_gpt2_ft / "model.safetensors")
    for entry, delta in zip(artifact.config.tensors, artifact.tensors, strict=True):
        if not delta.terms:
            continue
        wanted = tuned[delta.name].double() - base[delta.name].double()
        made = sum(term.to_dense().double() for term in delta.terms)
        off = (made.T if delta.transposed else made) - wanted
        assert entry.error == pytest.approx(float(off.norm() / wanted.norm()), rel=1e-3)


def test_compress_equal_checkpoints_raise_input_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no delta"):
        compress(tiny_llama, tiny_llama, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_compress_nan_in_fine_tune_raises_naming_the_tensor(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, name: str
) -> None:
    tuned = tmp_path / "t"
    tuned.mkdir()
    for file in tiny_llama_ft.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tuned / "model.safetensors")
    tensors[name].view(-1)[3] = math.nan
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((InputError, CheckpointError), match=name):
        compress(tiny_llama, tuned, tmp_path / "out", Options(ratio=10))
    assert not (tmp_path / "out").exists()


def test_compress_existing_output_is_kept_unless_asked(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = compress(tiny_llama, tiny_llama_ft, out, Options(ratio=10))
    with pytest.raises(OutputError, match="exists"):
        compress(tiny_llama, tiny_llama_ft, out, Options(ratio=9))
    assert read_artifact(out).digest == first.digest
    second = compress(tiny_llama, tiny_llama_ft, out, Options(ratio=12, overwrite=True))
    assert read_artifact(out).digest == second.digest != first.digest


@pytest.mark.parametrize(("field", "value"), [("ratio", 0.5), ("ratio", math.nan), ("seed", -1)])
def test_options_out_of_range_raise_input_error(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        Options(**{field: value})  # type: ignore[arg-type]


def test_compress_model_card_has_hub_metadata(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    options = Options(ratio=10, base_name="org/base")
    summary = compress(tiny_llama, tiny_llama_ft, tmp_path / "out", options)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.library_name == "impart-serve"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "impart-delta" in card.data.tags
    assert read_artifact(tmp_path / "out").config.base.name_or_path == "org/base"
    stated = int(card.text.split(" bytes instead")[0].rsplit(" ", 1)[-1].replace(",", ""))
    assert stated == summary.n_bytes - (tmp_path / "out" / "README.md").stat().st_size


def test_checkpoint_of_the_artifact_is_no_model(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_llama, tiny_llama_ft, tmp_path / "out", Options(ratio=10))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path / "out")
