"""Mixture of experts and fused projections: stored forms against transformers' own conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from compressor.artifact.reader import read_artifact
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import read_layout
from compressor.checkpoint.parameter import Parameter
from compressor.codecs.term import TensorDelta
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.export.reconstruct import reconstruct
from compressor.merge.config import MergeConfig, MergeModel, constant
from compressor.merge.merge import merge
from tests.tiny import make_tokenizer

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def make(kind: str, path: Path, *, seed: int = 0, change: float = 0.0, whole: bool = False) -> Any:
    """Write a random model of rank-1 changes; `whole`: experts stored as 3-D tensors."""
    torch.manual_seed(seed)
    fields = FIELDS | ({"num_key_value_heads": 4} if kind == "gpt_neox" else {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            # The experts start as uninitialised memory in some versions.
            parameter.copy_(0.2 * torch.randn(parameter.shape))
        for parameter in model.parameters():
            left = torch.randn(*parameter.shape[:-1], 1)
            parameter += change * left * torch.randn(parameter.shape[-1])
    model.save_pretrained(path, save_original_format=not whole)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 30).unsqueeze(0)).logits
    return found


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_compress_experts_come_back(kind: str, whole: bool, tmp_path: Path) -> None:
    make(kind, tmp_path / "base", whole=whole)
    tuned = make(kind, tmp_path / "tuned", change=0.02, whole=whole)
    options = Options(codec="lowrank", codec_options={"bits": 32}, ratio=2)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", options)
    entries = read_artifact(tmp_path / "delta").config.tensors
    experts = [e for e in entries if "experts" in e.name and not e.name.endswith("bias")]
    assert len(experts) == 2 * 4 * (2 if whole or kind in ("gpt_oss", "granitemoe") else 3)
    assert all(entry.terms for entry in experts)
    out = reconstruct(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    stored, base = (load_file(p / "model.safetensors") for p in (out, tmp_path / "base"))
    assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in base.items()}
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-3, atol=1e-3)


def test_layout_stacked_experts_are_one_matrix_each(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "m", whole=True)
    name = "model.layers.1.mlp.experts.down_proj"
    with Checkpoint(tmp_path / "m") as checkpoint:
        layout = read_layout(checkpoint.path)
        keys = layout.keys(checkpoint.tensors, "m")
        whole = checkpoint.read_rows(name)
        for index in range(4):
            parameter = layout.parameters[f"{name}[{index}]"]
            assert (parameter.kind, parameter.shape) == ("linear", (32, 24))
            assert torch.equal(checkpoint.read_rows(keys[parameter.name]), whole[index])
            block = checkpoint.slice(keys[parameter.name], 3, 9, 2, 20)
            assert torch.equal(block, whole[index, 3:9, 2:20])
        assert name not in layout.parameters
        with pytest.raises(CheckpointError, match="number 4"):
            checkpoint.read_rows(f"{name}[4]")
        with pytest.raises(KeyError):
            checkpoint.read_rows("model.norm.weight.none[0]")


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text"])
def test_layout_experts_stored_inputs_first_are_turned_round(kind: str, tmp_path: Path) -> None:
    """By what transformers says, and by the shapes where it says nothing."""
    model = make(kind, tmp_path / "m")
    found = {n: p for n, p in model.named_parameters() if n.endswith(".down_proj") and p.dim() == 3}
    assert found
    layout = read_layout(tmp_path / "m")
    for name, value in found.items():
        for index in range(4):
            parameter = layout.parameters[f"{name}[{index}]"]
            assert parameter.transposed
            assert parameter.shape == (value.shape[2], value.shape[1])


def test_parameter_takes_experts_of_artifacts_from_before_they_were_turned() -> None:
    parameter = Parameter("x[0]", "linear", (6, 4), True, "Experts")
    for shape, transposed, fits in (
        ((6, 4), True, True),
        ((4, 6), False, True),
        ((6, 4), False, False),
        ((4, 6), True, False),
    ):
        assert parameter.takes(TensorDelta("x[0]", shape, shape, transposed, (), None)) is fits
    plain = Parameter("x", "linear", (6, 4), False, "Linear")
    assert not plain.takes(TensorDelta("x", (4, 6), (4, 6), True, (), None))


@pytest.mark.parametrize("kind", ["gpt_neox", "phi3"])
def test_compress_fused_projections_come_back(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "base")
    tuned = make(kind, tmp_path / "tuned", change=0.02)
    options = Options(codec="lowrank", codec_options={"bits": 32}, ratio=2)
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", options)
    names = {entry.name for entry in read_artifact(tmp_path / "delta").config.tensors}
    assert any("qkv" in name or "query_key_value" in name for name in names)
    out = reconstruct(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-3, atol=1e-3)


def test_compress_experts_with_calibration_raises_naming_one(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "base")
    make("mixtral", tmp_path / "tuned", change=0.02)
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    (tmp_path / "texts.txt").write_text("some text to measure on\n")
    options = Options(codec="blockdiag", ratio=4, calibration=tmp_path / "texts.txt")
    with pytest.raises(UnsupportedTensor, match=r"experts\.\d\.w\d.*no calibration"):
        compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", options)
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_merge_experts_equals_the_formula(whole: bool, tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "base", whole=whole)
    make("qwen3_moe", tmp_path / "tuned", change=0.02, whole=whole)
    models = (MergeModel(str(tmp_path / "tuned"), weight=constant(0.5)),)
    merge(MergeConfig(str(tmp_path / "base"), models, method="ta"), tmp_path / "out")
    base, tuned, out = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "out")
    )
    assert out.keys() == base.keys()
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, (base[name] + tuned[name]) / 2)
