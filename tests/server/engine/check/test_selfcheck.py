"""The self-check accepts what is exact, and names the layer of what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.check.selfcheck import check_engine
from server.errors import ConfigError
from server.model.base import BaseModel
from server.model.linear import DeltaLinear
from tests.server.engine.check.models import Carrying, served

WINDOWED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}
MLA = {
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 2,
}
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("gemma3_text", WINDOWED),
    ("gpt2", {}),
    ("mixtral", {"num_local_experts": 4}),
    ("gpt_oss", {"num_local_experts": 4}),
    ("deepseek_v3", MLA),  # values of another width than keys; a router's bias is a buffer
]


def refusal(base: BaseModel) -> str:
    with pytest.raises(ConfigError) as refused:
        check_engine(base, 8)
    message = refused.value.message
    assert "\n" not in message
    assert "impart reconstruct" in message
    return message


@pytest.mark.parametrize(("kind", "config"), EXACT)
def test_exact_model_agrees_and_is_left_as_it_was(kind: str, config: dict[str, Any]) -> None:
    base = served(kind, **config)
    before = {name: p.base.clone() for name, p in base.parameters.items()}
    checked = check_engine(base, 8)
    assert 0 < checked.error < 1e-4
    assert not base.store.kv_blocks
    assert base.store.metadata is None
    for name, parameter in base.parameters.items():
        assert torch.equal(parameter.base, before[name])
        assert not parameter.pools
        assert not parameter.vector_slots
        if parameter.vectors is not None:
            assert (parameter.vectors == before[name]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_allowed(dtype: torch.dtype) -> None:
    checked = check_engine(served("qwen3", dtype=dtype), 8)
    assert checked.error < checked.allowed / 2


def test_state_outside_attention_is_found_by_what_it_does() -> None:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp = Carrying(model.model.layers[1].mlp)

    message = refusal(served("llama", change))
    assert "with the base alone the values after model.layers.1 differ" in message


def test_delta_that_a_module_forgets_is_found_in_its_layer() -> None:
    base = served("llama")
    attention = base.model.model.layers[2].self_attn
    assert isinstance(attention.o_proj, DeltaLinear)
    plain = nn.Linear(32, 32, bias=False)
    plain.weight.data = attention.o_proj.weight.clone()
    attention._modules["o_proj"] = attention.forward._o = plain  # as if nobody knew of it
    message = refusal(base)
    assert "base and variant in one batch the values after model.layers.2 differ" in message


def test_delta_of_the_output_that_is_forgotten_is_found_in_the_logits() -> None:
    base = served("llama")
    plain = nn.Linear(32, 300, bias=False)
    plain.weight.data = base.model.lm_head.weight.clone()
    base.model.lm_head = plain
    assert "in one batch the logits differ" in refusal(base)


def test_exception_on_the_way_is_a_refusal() -> None:
    base = served("llama")
    base.model.model.layers[0].mlp.forward = lambda x: x.view(-1, 7)
    assert "the self-check failed with RuntimeError" in refusal(base)
    assert not base.store.kv_blocks
