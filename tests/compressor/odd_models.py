"""Tiny random models of architectures that keep more than linears, embeddings and vectors.

Buffers, convolutions, converted and shared weights: `make` writes a base and a fine-tune of it in
which every stored float differs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Given to every architecture whose configuration has them.
_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_OWN = {
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "num_global_key_value_heads": 2,
        "global_head_dim": 8,
    },
}


def make(kind: str, base: Path, tuned: Path) -> None:
    """Write both, in float32."""
    has = AutoConfig.for_model(kind).to_dict()
    fields = {key: value for key, value in _FIELDS.items() if key in has} | _OWN.get(kind, {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _move(model, 0.2, seed=0)
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _move(model, 0.02, seed=1)
    model.save_pretrained(tuned)


def _move(model: PreTrainedModel, scale: float, seed: int) -> None:
    """Add noise to every float that is stored."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                tensor += scale * torch.randn(tensor.shape, generator=generator)
    model.tie_weights()
