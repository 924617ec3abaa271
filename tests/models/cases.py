"""What the matrix holds: every configuration class of a causal language model that transformers
has, every one of a model that writes text about images or sounds too, and variants of them that
take another way through the same definition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.models.shrink import HEAD_DIM, tiny_fields
from tests.models.special import merged, with_special


@dataclass(frozen=True)
class Case:
    """One row of the matrix.

    name        the class's ``model_type``, and what is different about a variant
    changes     fields over the tiny configuration's
    added_rows  tokens that the fine-tunes add to the vocabulary
    """

    name: str
    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    added_rows: int = 0

    def config(self) -> PreTrainedConfig:
        """The tiny configuration. Raises whatever the class raises."""
        made = CONFIG_MAPPING[self.model_type]
        fields = with_special(self.model_type, tiny_fields(made().to_dict()))
        return made(**merged(fields, self.changes))


def registered() -> tuple[Case, ...]:
    """One case for every class in transformers' own registries."""
    return tuple(Case(kind, kind) for kind in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *_multimodal()))


def _multimodal() -> list[str]:
    """Those of other registries that are no causal language model's too."""
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return sorted(known.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys())


def variants() -> tuple[Case, ...]:
    """The classes' other ways, as far as this transformers has the class."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return tuple(
        Case(f"{kind}-{what}", kind, changes, rows)
        for kind, what, changes, rows in _variants()
        if kind in known
    )


def all_cases() -> dict[str, Case]:
    """Every case by its name."""
    return {case.name: case for case in (*registered(), *variants())}


def _rope(kind: str, factor: float, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": factor} | more}


_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [2.0] * (HEAD_DIM // 2),
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}
_WINDOWED = {"sliding_window": 16, "use_sliding_window": True}


def _variants() -> tuple[tuple[str, str, dict[str, Any], int], ...]:
    tied, untied = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    return (
        ("llama", "tied", tied, 0),
        ("llama", "biases", {"attention_bias": True, "mlp_bias": True}, 0),
        ("llama", "added-rows", {}, 3),
        ("llama", "tied-added-rows", tied, 3),
        ("llama", "rope-linear", _rope("linear", 2.0), 0),
        ("llama", "rope-dynamic", _rope("dynamic", 2.0), 0),
        ("llama", "rope-yarn", _rope("yarn", 4.0, original_max_position_embeddings=64), 0),
        ("llama", "rope-llama3", _rope("llama3", 8.0, **_LLAMA3), 0),
        ("llama", "one-kv-head", {"num_key_value_heads": 1}, 0),
        ("mistral", "no-window", {"sliding_window": None}, 0),
        ("qwen2", "window", _WINDOWED | {"layer_types": None, "max_window_layers": 1}, 0),
        ("qwen2", "tied", tied, 0),
        ("qwen3", "window", _WINDOWED | {"layer_types": None, "max_window_layers": 1}, 0),
        ("qwen3", "tied-biases", tied | {"attention_bias": True}, 0),
        ("gemma", "untied", untied, 0),
        ("gemma2", "no-softcap", {"attn_logit_softcapping": None}, 0),
        ("gemma3_text", "softcap", {"attn_logit_softcapping": 20.0}, 0),
        ("gemma3_text", "bidirectional", {"use_bidirectional_attention": True}, 0),
        ("gemma3n_text", "shared-kv", {"num_kv_shared_layers": 2, "layer_types": None}, 0),
        ("gemma4_text", "experts", _GEMMA4_EXPERTS, 0),
        ("gemma4_text", "keys-are-values", {"attention_k_eq_v": True}, 0),
        ("phi", "qk-norm", {"qk_layernorm": True}, 0),
        ("phi", "added-rows", {}, 3),
        ("phi3", "no-window", {"sliding_window": None}, 0),
        ("phi3", "longrope", _LONGROPE, 0),
        ("cohere", "qk-norm", {"use_qk_norm": True}, 0),
        ("cohere", "untied", untied, 0),
        ("stablelm", "qk-norm", {"qk_layernorm": True}, 0),
        ("stablelm", "parallel-biases", {"use_parallel_residual": True, "use_qkv_bias": True}, 0),
        ("persimmon", "no-qk-norm", {"qk_layernorm": False}, 0),
        ("gpt_neox", "sequential", {"use_parallel_residual": False}, 0),
        ("gpt_neox", "no-biases", {"attention_bias": False}, 0),
        ("gpt2", "untied", untied, 0),
        ("gpt2", "added-rows", {}, 3),
        ("gpt2", "no-scale", {"scale_attn_weights": False}, 0),
        ("gpt2", "layer-scale", {"scale_attn_by_inverse_layer_idx": True}, 0),
        ("gpt_bigcode", "many-kv-heads", {"multi_query": False}, 0),
        ("falcon", "alibi", {"alibi": True, "bias": True}, 0),
        ("falcon", "new-decoder", {"new_decoder_architecture": True, "num_kv_heads": 2}, 0),
        ("falcon", "sequential", {"parallel_attn": False}, 0),
        ("bloom", "residual-after-norm", {"apply_residual_connection_post_layernorm": True}, 0),
        ("mpt", "qk-norm", {"attn_config": {"qk_ln": True}}, 0),
        ("mpt", "learned-positions", {"attn_config": {"alibi": False}}, 0),
        ("opt", "narrow-embedding", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, 0),
        ("olmo", "clip", {"clip_qkv": 0.5}, 0),
        ("olmoe", "clip", {"clip_qkv": 0.5}, 0),
        ("starcoder2", "no-biases", {"use_bias": False}, 0),
        ("seed_oss", "tied", tied, 0),
        ("smollm3", "window", _WINDOWED | {"layer_types": None}, 0),
        ("modernbert-decoder", "biases", _MODERNBERT_BIASES, 0),
        ("llama4_text", "dense", {"moe_layers": []}, 0),
        ("llama4_text", "dense-no-chunks", {"moe_layers": [], "attention_chunk_size": 4096}, 0),
        ("deepseek_v3", "dense", {"first_k_dense_replace": 9}, 0),
        ("deepseek_v3", "no-query-rank", {"q_lora_rank": None, "first_k_dense_replace": 9}, 0),
        ("deepseek_v3", "groups", {"n_group": 2, "topk_group": 1}, 0),
        ("deepseek_v3", "equal-widths", {"v_head_dim": HEAD_DIM, "qk_nope_head_dim": 8}, 0),
        ("deepseek_v2", "no-query-rank", {"q_lora_rank": None}, 0),
        ("mixtral", "window", {"sliding_window": 16}, 0),
        ("qwen2_moe", "some-dense", {"mlp_only_layers": [0]}, 0),
        ("qwen3_moe", "some-dense", {"mlp_only_layers": [0]}, 0),
        ("qwen3_moe", "window", _WINDOWED, 0),
        ("granitemoehybrid", "dense", _GRANITE_DENSE, 0),
        ("granitemoehybrid", "attention", _GRANITE_ATTENTION, 0),
        ("jamba", "dense", {"num_experts": 1, "num_experts_per_tok": 1}, 0),
        ("dbrx", "one-kv-head", {"attn_config": {"kv_n_heads": 1}}, 0),
        ("exaone4", "no-window", {"layer_types": ["full_attention"] * 2}, 0),
        ("gpt_oss", "no-window", {"layer_types": ["full_attention"] * 2}, 0),
        ("minimax", "attention", {"layer_types": ["full_attention"] * 2}, 0),
        ("biogpt", "untied", untied, 0),
        ("glm", "biases", {"attention_bias": True}, 0),
        ("phimoe", "head-bias", {"lm_head_bias": True, "attention_bias": True}, 0),
        ("nanochat", "tied", tied, 0),
    )


_GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
_MODERNBERT_BIASES = {"norm_bias": True, "mlp_bias": True, "attention_bias": True}
_GRANITE_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0}
_GRANITE_ATTENTION = {"layer_types": ["full_attention"] * 2}
