"""What looks like state outside attention, over transformers' own definitions."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.errors import ConfigError
from server.model.base import prepare_base_model
from server.model.state import decoder_layers, keeps_state
from server.ops.kernels import TorchKernels
from tests.tiny import KINDS, SMALL

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 300}


def definition(kind: str, **fields: object) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"]},
            "Lfm2ShortConv in model.layers.0.conv",
        ),
        (
            "jamba",
            {"num_experts": 1, "attn_layer_offset": 1, "attn_layer_period": 2},
            "JambaMambaMixer",
        ),
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}, "FalconH1Mixer"),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "full_attention"]},
            "Qwen3NextGatedDeltaNet",
        ),
    ],
)
def test_layer_with_state_refuses_the_model_and_is_named(
    kind: str, fields: dict[str, object], says: str
) -> None:
    model = definition(kind, **(SMALL | fields))
    assert says in (keeps_state(model) or "")
    with pytest.raises(ConfigError, match=r"keeps state outside attention.*impart reconstruct"):
        prepare_base_model(model, TorchKernels())


@pytest.mark.parametrize("kind", [*KINDS, "gemma3_text", "gpt_neox", "phi3"])
def test_models_of_attention_alone_look_like_nothing_else(kind: str) -> None:
    model = definition(kind, **(GPT2 if kind == "gpt2" else SMALL | {"pad_token_id": 0}))
    assert keeps_state(model) is None
    assert len(decoder_layers(model)) == 2
