"""A tiny configuration of any causal language model of transformers, made from its own defaults.

Nothing here knows an architecture. Every field of a configuration that is a size is replaced by a
small one, by what its name says; lists with an entry a layer keep one layer of every kind.
What a definition needs otherwise stands in `special.py`, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 2, 4, 2, 16
INTERMEDIATE, EXPERT_INTERMEDIATE = 112, 32
VOCAB, POSITIONS, WINDOW = 320, 256, 16
ROPE_DIM = 8
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
MAX_LAYERS = 6

DEPTH = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_blocks|depth"
    r"|num_(en|de)coder_layers|conf_num_hidden_layers|num_layers_per_stack)"
)

# The first pattern that matches a whole name decides. None: the definition derives it.
SIZES: tuple[tuple[str, int | float | None], ...] = (
    (r"(?!initializer|n_inner).*(dropout|pdrop|layerdrop|dropout_(prob|rate|p)|dropout_p)", 0.0),
    (r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim_model|attention_hidden_size)", HIDDEN),
    (r"(embedding_size|word_embed_proj_dim|(in|out)put_embedding_size|lru_width)", HIDDEN),
    (r"(out_hidden_size|embed_dim|text_hidden_size|projector_hidden_size)", HIDDEN),
    (r"(backbone_hidden_size|hidden_size_global|encoder_cross_output_size)", HIDDEN),
    (
        r"(num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|attention_heads)",
        HEADS,
    ),
    (r"(num_(en|de)coder_attention_heads|swa_num_attention_heads|index_n_heads)", HEADS),
    (r"(num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads)", KV_HEADS),
    (r"(num_query_groups)", KV_HEADS),
    (
        r"(head_dim|d_head|dim_head|d_kv|kv_channels|attention_head_(dim|size)|swa_head_dim)",
        HEAD_DIM,
    ),
    (r"(index_head_dim|linear_head_dim|linear_(key|value)_head_dim)", HEAD_DIM),
    (r"linear_num_(key_heads|heads)", KV_HEADS),
    (r"linear_num_value_heads", HEADS),
    (r"(intermediate_size_mlp|intermediate_size|d_inner|dense_intermediate_size)", INTERMEDIATE),
    (r"(ffn_dim|dim_ff|dff|d_ff|n_inner|feed_forward_size)", INTERMEDIATE),
    (r"((en|de)coder_ffn_dim|ffn_hidden_size|prefix_dense_intermediate_size)", INTERMEDIATE),
    (r".*(moe|expert|shared).*(intermediate|ffn_hidden)_size", EXPERT_INTERMEDIATE),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", EXPERTS),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", EXPERTS_PER_TOKEN),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"zero_expert_num", 2),
    (r"(kv_lora_rank|q_lora_rank|o_lora_rank)", 24),
    (r"qk_rope_head_dim", ROPE_DIM),
    (r"(qk_nope_head_dim|v_head_dim)", HEAD_DIM),
    (r"qk_head_dim", None),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"(attention_multiplier)", HEAD_DIM**-0.5),
    (r"rotary_dim", 8),
    (r"(vocab_size|vocab_size_per_layer_input|decoder_vocab_size|audio_vocab_size)", VOCAB),
    (r"(pronunciation|shape)_vocab_size", VOCAB),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length)", POSITIONS),
    (r"(model_max_length|max_(source|target)_positions|num_position_embeddings)", POSITIONS),
    (r"original_max_position_embeddings", POSITIONS // 4),
    (r"(sliding_window|sliding_window_size|window_size|attention_window_size)", WINDOW),
    (r"(attention_chunk_size|local_attention|local_attention_window_len|floor_scale)", WINDOW),
    (r"(mamba_chunk_size|chunk_size|block_size)", WINDOW),
    (r"(index_topk|keep_window_size|index_block_size)", WINDOW),
    (r"index_topk_blocks", 2),
    (r"(mamba_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank)", HEAD_DIM),
    (r"(mamba_n_heads|mamba_num_heads)", 8),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", HEAD_DIM),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"(n_groups|mamba_n_groups|mamba_ngroups|n_mamba_heads)", 1),
    (r"hidden_size_per_layer_input", 16),
    (r"(laurel_rank|adapter_rank|router_hidden_size|gated_norm_rank|hc_lowrank)", 16),
    (r"(pronunciation|shape)_embed_dim", 16),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (r"(num_nextn_predict_layers|num_mtp_layers)", 0),
    (r"num_kv_shared_layers", 0),
    (r".*(_every_n_layers|_layer_period|_layer_interval|layer_group_size)", 2),
    (r"(full_attention_interval|_?sliding_window_pattern)", 2),
    (r".*_layer_offset", 1),
    (r"max_window_layers", 1),
    (r"(bos_token_id)", 1),
    (r"(eos_token_id|forced_eos_token_id|decoder_start_token_id)", 2),
    (r"(pad_token_id)", 0),
)
RULES = tuple((re.compile(pattern), value) for pattern, value in SIZES)
# Ids of tokens that mean something else than text lie at the end of the vocabulary, where no
# prompt is.
OTHER_TOKENS = re.compile(r".*(_token_id|_token_index|_index)")
FIRST_OTHER_TOKEN = VOCAB - 20

Fields = dict[str, Any]


def tiny_fields(defaults: Mapping[str, Any]) -> Fields:
    """What to give a configuration class so that its model is tiny.

    defaults  `to_dict()` of the class's own instance; parts that are configurations themselves
              (with a ``model_type``) are made tiny too
    """
    fields: Fields = {}
    layers = chosen_layers(defaults)
    for n_other, (name, value) in enumerate(defaults.items()):
        if _is_configuration(value):
            fields[name] = tiny_fields(value)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            fields[name] = _layers_of_their_own(value, layers)
        elif DEPTH.fullmatch(name) and value is not None:
            fields[name] = len(layers)
        elif _is_per_layer(value, depth_of(defaults)):
            fields[name] = _small_entries(name, [value[i] for i in layers])
        elif (rule := _rule(name)) is not None:
            if rule[1] is not None and value is not None:
                fields[name] = rule[1]
        elif OTHER_TOKENS.fullmatch(name) and isinstance(value, int):
            fields[name] = FIRST_OTHER_TOKEN + n_other % 20
    fields |= _latent_sizes(defaults)
    if "is_decoder" in defaults:
        fields["is_decoder"] = True
    fields |= {name: fields.get(name, _rule(name)[1]) for name in _TOKENS if name in defaults}
    return fields


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _latent_sizes(defaults: Mapping[str, Any]) -> Fields:
    """Of latent attention, where every head's keys and values are made from one vector."""
    if "kv_lora_rank" not in defaults:
        return {}
    sizes = {"num_key_value_heads": HEADS, "head_dim": ROPE_DIM}
    return {name: value for name, value in sizes.items() if name in defaults}


def _layers_of_their_own(given: Mapping[str, Any], layers: list[int]) -> Fields:
    """Sizes of single layers, which a class names by the layer's number; heads stay wider there."""
    own: Fields = {}
    for layer, fields in given.items():
        if int(layer) in layers:
            sizes = {name: rule[1] for name in fields if (rule := _rule(name)) is not None}
            if "head_dim" in fields:
                is_latent = "kv_lora_rank" in fields
                sizes["head_dim"] = HEAD_DIM + ROPE_DIM if is_latent else 2 * HEAD_DIM
            sizes |= {"num_key_value_heads": HEADS} if "kv_lora_rank" in fields else {}
            own[f"{layers.index(int(layer)):02}"] = {**fields, **sizes}
    return own


def _small_entries(name: str, entries: list[Any]) -> list[Any]:
    """Entries of a list with one a layer; where they are sizes, small ones that differ as they do.

    >>> _small_entries("num_attention_heads_per_layer", [48, 64])
    [4, 8]
    """
    rule = _rule(name.removesuffix("_per_layer"))
    if rule is None or not isinstance(rule[1], int) or not all(type(n) is int for n in entries):
        return entries
    return [rule[1] if entry == min(entries) else 2 * rule[1] for entry in entries]


def depth_of(defaults: Mapping[str, Any]) -> int | None:
    """How many layers the class has by default; None where it does not say."""
    for name, value in defaults.items():
        if DEPTH.fullmatch(name) and isinstance(value, int):
            return value
    return None


def chosen_layers(defaults: Mapping[str, Any]) -> list[int]:
    """One layer of every kind that the class's lists with an entry a layer tell apart, in order,
    two at least and `MAX_LAYERS` at most.
    """
    depth = depth_of(defaults)
    columns = [value for value in defaults.values() if _is_per_layer(value, depth)]
    if not columns or depth is None:
        return list(range(LAYERS))
    kinds: dict[str, int] = {}
    for layer in range(depth):
        kinds.setdefault(repr([column[layer] for column in columns]), layer)
    layers = sorted(kinds.values())[:MAX_LAYERS]
    more = (layer for layer in range(depth) if layer not in layers)
    while len(layers) < LAYERS:
        layers.append(next(more, 0))
    return sorted(layers)


def _rule(name: str) -> tuple[re.Pattern[str], int | float | None] | None:
    return next((rule for rule in RULES if rule[0].fullmatch(name)), None)


def _is_configuration(value: object) -> bool:
    return isinstance(value, Mapping) and "model_type" in value


def _is_per_layer(value: object, depth: int | None) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and depth is not None and depth > 1 and len(value) == depth
