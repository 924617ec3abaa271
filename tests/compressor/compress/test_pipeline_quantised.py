"""A delta against a base that is stored quantised is one against its dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressor.artifact.config import BaseInfo
from compressor.artifact.identity import base_identity
from compressor.artifact.inspection import check, inspect_artifact
from compressor.artifact.reader import read_artifact
from compressor.artifact.wording import stored_as
from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import pair_tensors
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import WrongBase
from compressor.export.reconstruct import reconstruct
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
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
