"""Adapters that peft itself made and merged are the oracle for importing them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.artifact.reader import read_artifact
from compressor.errors import UnsupportedTensor
from compressor.export.reconstruct import reconstruct
from compressor.merge.config import MergeConfig, MergeModel
from compressor.merge.merge import merge
from tests.compressor.cli.test_app import impart, one_line_error

LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def trained(base: Path, out: Path, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    """Save an adapter of random weights to `out`; return the weights peft merges it to."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": LINEAR} | settings))
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.02 * torch.randn(parameter.shape)
            elif parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    adapted.save_pretrained(out)
    merged = adapted.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.named_parameters()}


def reconstructed(base: Path, delta: Path, out: Path) -> dict[str, Tensor]:
    return load_file(reconstruct(base, delta, out, dtype="float32") / "model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 3}, "alpha_pattern": {"^.*o_proj": 9}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1]},
        {"init_lora_weights": False},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_import_equals_what_peft_merges(
    tiny_qwen2: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected = trained(tiny_qwen2, tmp_path / "adapter", **settings)
    arguments = [tiny_qwen2, tmp_path / "adapter", tmp_path / "delta", "--exact"]
    code, _, stderr = impart("import", *arguments)
    assert (code, stderr) == (0, "")
    assert_same(reconstructed(tiny_qwen2, tmp_path / "delta", tmp_path / "full"), expected)


def test_import_conv1d_equals_what_peft_merges(tiny_gpt2: Path, tmp_path: Path) -> None:
    modules = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    for settings in ({}, {"use_dora": True}):
        out = tmp_path / str(len(settings))
        expected = trained(tiny_gpt2, out / "adapter", **modules, **settings)
        code, _, stderr = impart("import", tiny_gpt2, out / "adapter", out / "delta", "--exact")
        assert (code, stderr) == (0, "")
        assert_same(reconstructed(tiny_gpt2, out / "delta", out / "full"), expected)


def test_import_dora_sampled_states_its_error_and_keeps_the_factors(
    tiny_llama: Path, tmp_path: Path
) -> None:
    expected = trained(tiny_llama, tmp_path / "adapter", use_dora=True)
    base = load_file(tiny_llama / "model.safetensors")
    sizes = {}
    for ratio in (8, 32):
        out = tmp_path / f"delta{ratio}"
        code, stdout, _ = impart("import", tiny_llama, tmp_path / "adapter", out, "--ratio", ratio)
        assert code == 0
        assert "relative error of the difference 0." in stdout
        artifact = read_artifact(out)
        for entry, delta in zip(artifact.config.tensors, artifact.tensors, strict=True):
            assert [term.codec for term in delta.terms] == ["lowrank", "blockdiag"]
            change = (expected[delta.name] - base[delta.name]).double()
            lost = sum(term.to_dense() for term in delta.terms).double() - change
            assert entry.error == pytest.approx(float(lost.norm() / change.norm()), rel=1e-2)
            rest = change - delta.terms[0].to_dense()
            gain = (rest / base[delta.name].double()).median(1).values  # rows of W, rescaled
            torch.testing.assert_close(rest, gain[:, None] * base[delta.name], atol=1e-5, rtol=1e-2)
        sizes[ratio] = sum(file.stat().st_size for file in out.iterdir())
    assert sizes[32] < sizes[8]
    exact = tmp_path / "exact"
    assert impart("import", tiny_llama, tmp_path / "adapter", exact, "--exact")[0] == 0
    assert sum(file.stat().st_size for file in exact.iterdir()) > 2 * sizes[8]


def test_import_dora_siblings_get_equal_blocks(tiny_llama: Path, tmp_path: Path) -> None:
    modules = ["q_proj", "k_proj", "v_proj"]
    trained(tiny_llama, tmp_path / "adapter", use_dora=True, target_modules=modules)
    assert impart("import", tiny_llama, tmp_path / "adapter", tmp_path / "delta")[0] == 0
    for layer in range(2):
        found = {
            delta.terms[1].params()["n_blocks"]
            for delta in read_artifact(tmp_path / "delta").tensors
            if f"layers.{layer}." in delta.name
        }
        assert len(found) == 1


def test_import_dora_untrained_lengths_cost_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """With B = 0 and the lengths of the base's rows there is no difference worth a byte."""
    trained(tiny_llama, tmp_path / "adapter", use_dora=True, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    base = load_file(tiny_llama / "model.safetensors")
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
        if "magnitude" in name:
            weight = name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
            length = np.linalg.norm(base[weight].double().numpy(), axis=1)
            tensors[name] = torch.from_numpy(length).float()
    save_file(tensors, file)
    assert impart("import", tiny_llama, tmp_path / "adapter", tmp_path / "delta")[0] == 0
    for delta in read_artifact(tmp_path / "delta").tensors:
        change = sum(term.to_dense() for term in delta.terms)
        assert float(change.abs().max()) < 1e-6


def test_merge_takes_a_dora_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    expected = trained(tiny_llama, tmp_path / "adapter", use_dora=True)
    config = MergeConfig(str(tiny_llama), (MergeModel(str(tmp_path / "adapter")),), method="ta")
    found = load_file(merge(config, tmp_path / "out") / "model.safetensors")
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, r"embed_tokens\.weight: .*magni"),
    ],
)
def test_import_what_is_not_supported_raises_naming_it(
    tiny_qwen2: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    trained(tiny_qwen2, tmp_path / "adapter", **settings)
    error = one_line_error("import", tiny_qwen2, tmp_path / "adapter", tmp_path / "delta")
    assert re.search(message, error)
    assert not (tmp_path / "delta").exists()


def test_import_dora_without_or_with_wrong_lengths_raises(tiny_llama: Path, tmp_path: Path) -> None:
    trained(tiny_llama, tmp_path / "adapter", use_dora=True, target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "magnitude" in name)
    save_file(tensors | {name: torch.ones(3)}, file)
    arguments = ("import", tiny_llama, tmp_path / "adapter", tmp_path / "delta")
    assert "has shape [3]" in one_line_error(*arguments)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    assert "no magnitude vector" in one_line_error(*arguments)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": False}))
    save_file(tensors, file)
    assert "use_dora is not set" in one_line_error(*arguments)
    with pytest.raises(UnsupportedTensor, match="use_dora is not set"):
        merge(
            MergeConfig(str(tiny_llama), (MergeModel(str(tmp_path / "adapter")),)), tmp_path / "m"
        )


def test_import_full_fine_tune_is_sent_to_compress(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    error = one_line_error("import", tiny_llama, tiny_llama_ft, tmp_path / "delta")
    assert "impart compress" in error
