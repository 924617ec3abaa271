"""A delta against a base that is stored quantised is one against its dequantised weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from compressor.artifact.config import BaseInfo
from compressor.artifact.identity import base_identity
from compressor.artifact.inspection import check, inspect_artifact
from compressor.artifact.reader import read_artifact
from compressor.artifact.wording import difference_from, stored_as
from compressor.auto.bench import Bench
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.gguf import SOURCE, source_bits
from compressor.checkpoint.pairing import pair_tensors
from compressor.cli.app import app
from compressor.compress.options import Options
from compressor.compress.pipeline import _describe, _run_key, compress
from compressor.errors import WrongBase
from compressor.export.reconstruct import reconstruct
from compressor.measure.fidelity import compare, encode_texts, load_model
from compressor.measure.samples import load_tokenizer
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
from tests.compressor.checkpoint.test_original import folded, with_tensors
from tests.quantised import dense_twin, quantise
from tests.tiny import make_tiny, perturb

OPTIONS = Options(codec="blockdiag", ratio=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("pipeline") / "base", num_hidden_layers=1)


def test_fine_tune_of_a_quantised_base_comes_back_as_dequantised_plus_delta(
    base: Path, tmp_path: Path
) -> None:
    scheme = SCHEMES["gptq-4-act-order-asymmetric"]
    tuned = perturb(base, tmp_path / "ft", seed=4, scale=0.1)
    folder = quantise(base, tmp_path / "q", scheme)
    twin = load_file(dense_twin(folder, tmp_path / "twin", scheme) / "model.safetensors")
    delta = compress(folder, tuned, tmp_path / "delta", OPTIONS).path
    check(delta, folder)
    out = reconstruct(folder, delta, tmp_path / "out", dtype="float32")
    made = load_file(out / "model.safetensors")
    artifact = read_artifact(delta)
    changed = {tensor.name: tensor for tensor in artifact.tensors}
    assert made.keys() == twin.keys()
    for name, value in made.items():
        wanted = twin[name].float()
        if name in changed and changed[name].terms:
            wanted = wanted + sum(term.to_dense() for term in changed[name].terms)
        elif name in changed:
            exact = changed[name].exact
            assert exact is not None
            wanted = exact.values.float()
        assert torch.equal(value, wanted), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config


def test_artifact_says_how_its_base_is_stored(base: Path, tmp_path: Path) -> None:
    folder = quantise(base, tmp_path / "q", SCHEMES["awq"], "bfloat16")
    tuned = perturb(base, tmp_path / "ft", seed=4, scale=0.1)
    delta = compress(folder, tuned, tmp_path / "delta", OPTIONS).path
    said = "awq 4 bit, dequantised to bfloat16"
    assert read_artifact(delta).config.base.quantisation == said
    assert inspect_artifact(delta).to_json()["base"]["quantisation"] == said
    assert f"stored as {said}" in (delta / "README.md").read_text()
    assert stored_as(BaseInfo("0", "base", 1, "float32")) == ""


def test_the_same_model_quantised_otherwise_is_another_base(base: Path, tmp_path: Path) -> None:
    tuned = perturb(base, tmp_path / "ft", seed=4, scale=0.1)
    first = quantise(base, tmp_path / "first", SCHEMES["gptq-4"])
    delta = compress(first, tuned, tmp_path / "delta", OPTIONS).path
    others = {
        "version": quantise(base, tmp_path / "other", SCHEMES["gptq-v2-4-asymmetric"]),
        "dtype": quantise(base, tmp_path / "dtype", SCHEMES["gptq-4"], "bfloat16"),
        "dense": dense_twin(first, tmp_path / "twin", SCHEMES["gptq-4"]),
        "original": base,
    }
    for other in others.values():
        with pytest.raises(WrongBase):
            check(delta, other)
    assert len({base_identity(one) for one in (first, *others.values())}) == 5


def test_identity_of_quantised_weights_changes_with_what_they_are_read_as(
    base: Path, tmp_path: Path
) -> None:
    folder = quantise(base, tmp_path / "q", SCHEMES["gptq-4"])
    before = base_identity(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert base_identity(folder) != before


def test_difference_of_a_quantised_fine_tune_is_that_of_its_dequantised_weights(
    base: Path, tmp_path: Path
) -> None:
    tuned = perturb(base, tmp_path / "ft", seed=4, scale=0.1)
    scheme = SCHEMES["fp8-blocks"]
    folder = quantise(tuned, tmp_path / "q", scheme)
    twin = load_file(dense_twin(folder, tmp_path / "twin", scheme) / "model.safetensors")
    ours = load_file(base / "model.safetensors")
    with Checkpoint(base) as first, Checkpoint(folder) as second:
        for pair in pair_tensors(first, second).pairs:
            if pair.is_matrix:
                m, n = pair.matrix_shape
                difference = DeltaSource(first, second, pair).block(0, m, 0, n)
                assert torch.equal(difference, twin[pair.name].float() - ours[pair.name])
    check(compress(base, folder, tmp_path / "delta", OPTIONS).path, base)


@pytest.mark.parametrize("scheme", ["gptq-4", "fp8-blocks"])
def test_difference_from_the_original_is_applied_to_the_quantised_base(
    base: Path, tmp_path: Path, scheme: str
) -> None:
    """What comes out is the fine-tune with the base's rounding errors, which cost no byte."""
    folder = quantise(base, tmp_path / "q", SCHEMES[scheme])
    tuned = perturb(base, tmp_path / "ft", scale=0.1, rank=2, keep=("norm", "o_proj"))
    options = Options(codec="lowrank", ratio=4, difference_from=str(base))
    summary = compress(folder, tuned, tmp_path / "delta", options)
    out = reconstruct(folder, summary.path, tmp_path / "out", dtype="float32")
    made, theirs = load_file(out / "model.safetensors"), load_file(tuned / "model.safetensors")
    ours = load_file(base / "model.safetensors")
    twin = load_file(dense_twin(folder, tmp_path / "twin", SCHEMES[scheme]) / "model.safetensors")
    for name, value in made.items():
        wanted = twin[name].float() + theirs[name] - ours[name]
        torch.testing.assert_close(value, wanted, rtol=0, atol=2e-3)
    config = read_artifact(summary.path).config
    assert {name for name in theirs if "o_proj" in name} <= set(config.unchanged)
    assert not any("difference-from" in note for note in summary.notes)


def test_artifact_of_another_difference_names_both_models(base: Path, tmp_path: Path) -> None:
    folder = quantise(base, tmp_path / "q", SCHEMES["gptq-4"])
    tuned = perturb(base, tmp_path / "ft", scale=0.1)
    options = replace(OPTIONS, difference_from=str(base))
    delta = compress(folder, tuned, tmp_path / "delta", options).path
    check(delta, folder)
    with pytest.raises(WrongBase):
        check(delta, base)
    record = {"identity": base_identity(base), "name_or_path": "base"}
    told = inspect_artifact(delta)
    assert told.config.base.identity == base_identity(folder)
    assert told.to_json()["difference_from"] == record
    shown = difference_from(told.config)
    assert shown is not None
    assert record["identity"] in shown
    assert shown in (delta / "README.md").read_text()


def test_kl_of_another_difference_is_measured_on_the_quantised_base(
    base: Path, tmp_path: Path
) -> None:
    """Tensors that the fine-tune left alone have the base's rounding errors in what is measured."""
    folder = quantise(base, tmp_path / "q", SCHEMES["gptq-2"])
    tuned = perturb(base, tmp_path / "ft", scale=0.1, keep=("mlp",))
    texts = tmp_path / "texts.txt"
    texts.write_text("the quick brown fox jumps over the lazy dog\n" * 2)
    options = replace(OPTIONS, ratio=10, difference_from=str(base), calibration=texts)
    delta = compress(folder, tuned, tmp_path / "delta", options).path
    whole = reconstruct(folder, delta, tmp_path / "whole", dtype="float32")
    samples = encode_texts(load_tokenizer(tuned), texts.read_text().splitlines())
    found = compare(load_model(tuned), load_model(whole), samples)
    recorded = read_artifact(delta).config.fidelity
    assert recorded["kl_per_token"] == pytest.approx(found.kl_per_token, rel=1e-3)
    assert found.kl_per_token > 0.01


def test_auto_takes_the_difference_from_the_original_and_measures_on_the_quantised_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.auto.texts._MEASURED_TOKENS", 100)
    monkeypatch.setattr("compressor.auto.bench._FISHER_TOKENS", 60)
    scheme = SCHEMES["gptq-2"]
    folder = quantise(base, tmp_path / "q", scheme)
    tuned = perturb(base, tmp_path / "ft", scale=0.1, keep=("o_proj",))
    options = Options(codec="auto", ratio=12.0, difference_from=str(base))
    recorded = compress(folder, tuned, tmp_path / "delta", options).fidelity
    artifact = read_artifact(tmp_path / "delta")
    with Checkpoint(folder) as first, Checkpoint(tuned) as theirs:
        bench = Bench(first, theirs, None)
        found = bench.measure({delta.name: delta for delta in artifact.tensors})
    assert found.kl[bench.main] == pytest.approx(recorded["kl_per_token"], rel=1e-3)
    twin = load_file(dense_twin(folder, tmp_path / "twin", scheme) / "model.safetensors")
    ours = load_file(base / "model.safetensors")
    pairs = [
        (sum(term.to_dense() for term in delta.terms), twin[delta.name].float() - ours[delta.name])
        for delta in artifact.tensors
        if "mlp" in delta.name
    ]
    coded, rounding = (
        torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True)
    )
    assert abs(torch.cosine_similarity(coded, rounding, dim=0)) < 0.05


def test_difference_for_a_base_with_scales_in_its_norms_makes_the_fine_tune(
    tmp_path: Path,
) -> None:
    """Norms included, which the fine-tune moved and the base holds divided by its scales."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 1}
    original = make_tiny("llama", tmp_path / "original", **sizes)
    scaled = with_tensors(original, tmp_path / "scaled", **folded(original, "llama"))
    base = quantise(scaled, tmp_path / "base", SCHEMES["gptq-v2-8"])
    tuned = perturb(original, tmp_path / "tuned", scale=0.1, rank=2)
    options = Options(codec="lowrank", ratio=4, difference_from=str(original))
    summary = compress(base, tuned, tmp_path / "delta", options)
    assert any("scales of weights in 2 norms" in note for note in summary.notes)
    whole = reconstruct(base, summary.path, tmp_path / "whole", dtype="float32")
    samples = encode_texts(load_tokenizer(tuned), ["the quick brown fox jumps over the lazy dog"])
    reference = load_model(tuned)
    found = compare(reference, load_model(whole), samples).kl_per_token
    assert found < 0.1 * compare(reference, load_model(original), samples).kl_per_token


def test_run_with_another_original_takes_nothing_over(base: Path, tmp_path: Path) -> None:
    folder = quantise(base, tmp_path / "q", SCHEMES["gptq-4"])
    tuned = perturb(base, tmp_path / "ft", scale=0.1)
    keys = set()
    with Checkpoint(folder) as first, Checkpoint(base) as second, Checkpoint(tuned) as theirs:
        pairing = pair_tensors(first, theirs)
        for original in (first, second):
            config = _describe(first, original, theirs, pairing, OPTIONS, ())
            keys.add(_run_key(config, OPTIONS, theirs))
    assert len(keys) == 2


@pytest.mark.parametrize(("scheme", "is_warned"), [("packed-4", True), ("fp8-blocks", False)])
def test_base_of_few_bits_is_warned_of_with_the_remedy(
    base: Path, tmp_path: Path, scheme: str, is_warned: bool
) -> None:
    folder = quantise(base, tmp_path / "q", SCHEMES[scheme])
    tuned = perturb(base, tmp_path / "ft", scale=0.1)
    notes = compress(folder, tuned, tmp_path / "delta", OPTIONS).notes
    assert any("4 bits" in note and "--difference-from" in note for note in notes) == is_warned


@pytest.mark.parametrize(("kind", "bits"), [("Q4_K", 4), ("IQ3_S", 3), ("BF16", None)])
def test_bits_of_a_gguf_file_are_known_after_its_conversion(
    tmp_path: Path, kind: str, bits: int | None
) -> None:
    (tmp_path / SOURCE).write_text(json.dumps({"quantisation": f"gguf {kind}, dequantised to x"}))
    assert source_bits(tmp_path) == bits


def test_adapter_has_no_other_difference(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    arguments = ["compress", base, tmp_path, tmp_path.parent / "out", "--difference-from", base]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "is an adapter, which is a difference already: leave the option out" in result.stderr
