"""A model loaded from quantised weights is the model loaded from the dense ones, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint.dense_model import load_causal_lm
from compressor.errors import CheckpointError
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
from tests.quantised import dense_twin, quantise
from tests.tiny import Kind, make_tiny


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "gptq-4"), ("gemma", "fp8-blocks"), ("qwen2", "packed-8-rows")]
)
def test_model_of_quantised_weights_equals_that_of_the_dense_ones(
    tmp_path: Path, kind: Kind, name: str
) -> None:
    folder = quantise(make_tiny(kind, tmp_path / "base"), tmp_path / "q", SCHEMES[name])
    twin = AutoModelForCausalLM.from_pretrained(
        dense_twin(folder, tmp_path / "twin", SCHEMES[name]), dtype="auto"
    )
    model = load_causal_lm(folder)
    assert model.dtype == twin.dtype == torch.float16
    assert model.state_dict().keys() == twin.state_dict().keys()
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "gemma")
    assert not hasattr(model.config, "quantization_config")
    assert load_causal_lm(folder, torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("add", "drop", "says"),
    [
        ("model.layers.0.mlp.act.scales", None, "act.scales is no part of the model"),
        (None, "model.norm.weight", "model.norm.weight is missing from the model"),
    ],
)
def test_tensors_beyond_or_short_of_the_model_are_refused(
    tiny_llama: Path, tmp_path: Path, add: str | None, drop: str | None, says: str
) -> None:
    folder = quantise(tiny_llama, tmp_path / "q", SCHEMES["fp8-tensor"])
    tensors = load_file(folder / "model.safetensors")
    tensors |= {} if add is None else {add: torch.ones(3)}
    tensors.pop(drop or "", None)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        load_causal_lm(folder)


def test_value_that_float16_cannot_hold_is_refused_with_the_remedy(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "large"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has a value.*--dtype bfloat16"):
        load_causal_lm(folder, torch.float16)
    assert load_causal_lm(folder, torch.bfloat16).dtype == torch.bfloat16
