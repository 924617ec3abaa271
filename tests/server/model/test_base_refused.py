"""Bases that transformers cannot load end start-up with one sentence, not a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.errors import ConfigError
from server.model.attention import ATTENTION_NAME, register_attention
from server.model.base import load_base_model, prepare_base_model
from server.ops.kernels import TorchKernels
from tests.models.builder import tiny_model
from tests.models.cases import all_cases
from tests.tiny import SMALL

CPU = torch.device("cpu")


def with_config(base: Path, folder: Path, **changes: object) -> Path:
    copy = Path(shutil.copytree(base, folder / "base"))
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "nonsense"}, "cannot read the base's config.json: .*nonsense"),
        ({"hidden_size": 32, "head_dim": 8}, "the base cannot be loaded: .*mismatch"),
    ],
)
def test_base_that_transformers_refuses_is_said_in_a_line(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        load_base_model(with_config(tiny_llama, tmp_path, **changes), CPU, None, "torch")
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 500


def test_base_without_one_of_its_tensors_is_refused_by_the_tensors_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    said = r"no tensor model\.layers\.1\.mlp\.up_proj\.weight, .* at random"
    with pytest.raises(ConfigError, match=said):
        load_base_model(copy, CPU, None, "torch")


FIELDS = SMALL | {"pad_token_id": 0}


def definition(kind: str, **fields: object) -> PreTrainedModel:
    register_attention()
    config = AutoConfig.for_model(kind, **(FIELDS | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    return model.eval().requires_grad_(False)


def refusal(model: PreTrainedModel) -> str:
    with pytest.raises(ConfigError) as refused:
        prepare_base_model(model, TorchKernels())
    assert "\n" not in refused.value.message
    return refused.value.message


def test_definition_without_the_attention_interface_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model(all_cases()["cpmant"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load_base_model(tmp_path, CPU, None, "torch")
    message = refused.value.message
    assert message.startswith(f"{type(model).__name__} cannot be served: its definition does not")
    assert "attention interface" in message
    assert "impart reconstruct" in message


def test_mask_that_looks_ahead_is_refused() -> None:
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    model = definition("gemma3_text", use_bidirectional_attention=True, **window)
    assert "not causal: tokens see later ones" in refusal(model)


def test_windows_are_those_of_the_masks() -> None:
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    base = prepare_base_model(definition("gemma3_text", **window), TorchKernels())
    layers = [layer for layers in base.store.layers.values() for layer in layers]
    assert [layer.mask.window for layer in layers] == [8, None]


class Broken(nn.Module):
    """Fails in a way that nobody expects."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.shape[:2]
        return x * a * b * c


def test_exception_in_a_definition_is_refused_with_its_cause() -> None:
    model = definition("llama")
    model.model.layers[1].mlp = Broken()
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM cannot be served: .*ValueError"
    ) as said:
        prepare_base_model(model, TorchKernels())
    assert isinstance(said.value.__cause__, ValueError)
