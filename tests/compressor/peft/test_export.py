"""Exports, loaded by the tools they are for: transformers, peft itself, our own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.artifact.reader import read_artifact
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import InputError, OutputError, UnsupportedTensor, WrongBase
from compressor.export.mergekit import export_mergekit
from compressor.merge.config import read_merge_config
from compressor.merge.merge import merge
from compressor.peft.export import export_peft
from tests.compressor.checkpoint.test_layout import make as make_experts
from tests.compressor.cli.test_app import impart, one_line_error
from tests.tiny import perturb

EXACT = Options(codec="lowrank", codec_options={"bits": 32}, ratio=1.5)


@pytest.fixture(scope="module")
def delta(tiny_llama: Path, tiny_llama_ft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "delta"
    compress(tiny_llama, tiny_llama_ft, out, EXACT)
    return out


def differences(delta: Path, base: Path) -> dict[str, Tensor]:
    """``dW`` of every changed tensor in float64, as a literal sum of its terms."""
    stored = load_file(base / "model.safetensors")
    found = {}
    for tensor in read_artifact(delta).tensors:
        if tensor.terms:
            found[tensor.name] = sum(term.to_dense() for term in tensor.terms).double()
        else:
            found[tensor.name] = (
                tensor.reconstruct(stored[tensor.name]).double() - stored[tensor.name]
            )
    return found


def peft_weights(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights that peft makes of base and adapter."""
    model = AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.named_parameters()}


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    best: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return best


def test_peft_linear_layers_are_the_best_of_their_rank_in_peft_itself(
    delta: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    made = export_peft(tiny_llama, delta, tmp_path / "lora", rank=7)
    base, found = load_file(tiny_llama / "model.safetensors"), peft_weights(tiny_llama, made.path)
    lost = total = 0.0
    for name, change in differences(delta, tiny_llama).items():
        total += float(change.norm()) ** 2
        expected = torch.zeros_like(change)
        if "_proj" in name:
            expected = best_of_rank(change, 7)
        lost += float((change - expected).norm()) ** 2
        torch.testing.assert_close(found[name] - base[name], expected, rtol=1e-3, atol=2e-5)
    assert made.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert set(made.left_out) == {n for n in differences(delta, tiny_llama) if "_proj" not in n}
    assert "relative error of 0." in made.warning()
    AutoTokenizer.from_pretrained(tmp_path / "lora")


def test_peft_all_modules_of_full_rank_are_the_model(
    delta: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    made = export_peft(tiny_llama, delta, tmp_path / "lora", rank=64, modules="all")
    assert made.left_out == ()
    assert made.relative_error < 1e-5
    base, found = load_file(tiny_llama / "model.safetensors"), peft_weights(tiny_llama, made.path)
    for name, change in differences(delta, tiny_llama).items():
        torch.testing.assert_close(found[name] - base[name], change, rtol=1e-3, atol=2e-5)


def test_peft_conv1d_layers_load_in_peft(
    tiny_gpt2: Path, tiny_gpt2_ft: Path, tmp_path: Path
) -> None:
    compress(tiny_gpt2, tiny_gpt2_ft, tmp_path / "delta", EXACT)
    made = export_peft(tiny_gpt2, tmp_path / "delta", tmp_path / "lora", rank=64)
    base, found = load_file(tiny_gpt2 / "model.safetensors"), peft_weights(tiny_gpt2, made.path)
    for name, change in differences(tmp_path / "delta", tiny_gpt2).items():
        if ".c_" in name and name.endswith("weight"):
            torch.testing.assert_close(found[name] - base[name], change.T, rtol=1e-3, atol=2e-5)
        elif name == "transformer.wte.weight":
            assert torch.equal(found[name], base[name].double())
    assert "transformer.wte.weight" in made.left_out


def test_peft_delta_of_low_rank_keeps_its_rank_and_comes_back(
    tiny_llama: Path, tmp_path: Path
) -> None:
    keep = ("embed", "norm", "lm_head", "layers.0")
    tuned = perturb(tiny_llama, tmp_path / "tuned", rank=3, keep=keep)
    options = Options(codec="lowrank", codec_options={"bits": 32}, ratio=4)
    compress(tiny_llama, tuned, tmp_path / "delta", options)
    made = export_peft(tiny_llama, tmp_path / "delta", tmp_path / "lora", rank=16)
    assert made.relative_error < 1e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {3}
    assert len(config["target_modules"]) == 7
    found, theirs = peft_weights(tiny_llama, made.path), load_file(tuned / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor.double(), rtol=1e-4, atol=1e-5)
    code, _, stderr = impart("compress", tiny_llama, tmp_path / "lora", tmp_path / "again")
    assert (code, stderr) == (0, "")
    again = differences(tmp_path / "again", tiny_llama)
    for name, change in differences(tmp_path / "delta", tiny_llama).items():
        torch.testing.assert_close(again[name], change, rtol=1e-3, atol=1e-5)


def test_peft_calibration_measures_against_the_delta(
    delta: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the bank opens a new account\na table for four people\n")

    def measured(rank: int, modules: Any) -> float:
        out = tmp_path / f"{rank}{modules}"
        made = export_peft(tiny_llama, delta, out, rank=rank, modules=modules, calibration=texts)
        assert made.fidelity is not None
        assert f"{made.fidelity.kl_per_token:.4g} nats" in (out / "README.md").read_text()
        return made.fidelity.kl_per_token

    assert measured(64, "all") < 1e-6 < measured(64, "linear") < measured(2, "linear")


def test_peft_dtype_is_the_bases_unless_given(
    delta: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export_peft(tiny_llama, delta, tmp_path / "a", rank=2)
    export_peft(tiny_llama, delta, tmp_path / "b", rank=2, dtype="bfloat16")
    for name, dtype in {"a": torch.float32, "b": torch.bfloat16}.items():
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_peft_what_no_adapter_expresses_raises_naming_it(
    tiny_llama: Path, tiny_llama_ft: Path, tiny_llama_ft_vocab: Path, delta: Path, tmp_path: Path
) -> None:
    compress(
        tiny_llama, tiny_llama_ft_vocab, tmp_path / "vocab", Options(codec="blockdiag", ratio=8)
    )
    with pytest.raises(UnsupportedTensor, match=r"(lm_head|embed_tokens)\.weight: .*adds rows"):
        export_peft(tiny_llama, tmp_path / "vocab", tmp_path / "out")
    make_experts("mixtral", tmp_path / "base")
    make_experts("mixtral", tmp_path / "tuned", change=0.02)
    compress(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "moe", Options(codec="blockdiag", ratio=6)
    )
    with pytest.raises(UnsupportedTensor, match=r"experts\.0\.w1\.weight: .*single expert"):
        export_peft(tmp_path / "base", tmp_path / "moe", tmp_path / "out")
    with pytest.raises(WrongBase):
        export_peft(tiny_llama_ft, delta, tmp_path / "out")
    with pytest.raises(InputError, match="rank must be"):
        export_peft(tiny_llama, delta, tmp_path / "out", rank=0)
    assert not (tmp_path / "out").exists()


def test_peft_existing_output_is_only_replaced_if_it_is_an_adapter(
    delta: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    export_peft(tiny_llama, delta, tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="exists"):
        export_peft(tiny_llama, delta, tmp_path / "out", rank=2)
    export_peft(tiny_llama, delta, tmp_path / "out", rank=3, overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis").write_text("")
    with pytest.raises(OutputError, match=r"holds no adapter_config\.json"):
        export_peft(tiny_llama, delta, tmp_path / "precious", rank=2, overwrite=True)


def test_mergekit_recipe_beside_the_model_gives_the_model(
    delta: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = export_mergekit(tiny_llama, delta, tmp_path / "full")
    assert yaml.safe_load(recipe.read_text())["merge_method"] == "task_arithmetic"
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    merge(read_merge_config(recipe), tmp_path / "merged")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("full", "merged"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor)


def test_command_exports_to_each_form(delta: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for form, file in {
        "hf": "config.json",
        "peft": "adapter_config.json",
        "mergekit": "mergekit.yaml",
    }.items():
        code, stdout, stderr = impart("export", tiny_llama, delta, tmp_path / form, "--to", form)
        assert (code, stdout) == (0, f"{tmp_path / form}: written\n")
        assert ("relative error" in stderr) == (form == "peft")
        assert (tmp_path / form / file).is_file()
    out = tmp_path / "out"
    for arguments, message in {
        ("--to", "gguf"): "must be hf, peft or mergekit",
        ("--to", "hf", "--rank", 3): "--rank is for --to peft",
        ("--to", "peft", "--modules", "mlp"): "linear or all",
        ("--to", "hf", "--dtype", "int4"): "dtype must be",
    }.items():
        assert message in one_line_error("export", tiny_llama, delta, out, *arguments)
