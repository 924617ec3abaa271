"""What single definitions need beside the general rules of `shrink.py`, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.models.shrink import (
    EXPERT_INTERMEDIATE,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    ROPE_DIM,
    WINDOW,
)

Fields = dict[str, Any]
_DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": HEAD_DIM + ROPE_DIM,
    "swa_qk_nope_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


@dataclass(frozen=True)
class Special:
    """Fields of one configuration class.

    changes  over what the rules choose; a mapping changes a part that is a configuration itself
    drop     fields that the class must derive, not be given
    """

    reason: str
    changes: Fields = field(default_factory=dict)
    drop: tuple[str, ...] = ()


SPECIAL: dict[str, Special] = {
    "bamba": Special("by default no layer is attention", {"attn_layer_indices": [1]}),
    "blt": Special(
        "its hash table's rows are not a vocabulary's; its parts are of one width",
        {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    ),
    "cohere_compass_text": Special(
        "it has no default of rotary settings a kind of layer",
        {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    ),
    "dbrx": Special(
        "its attention reads a field it does not declare, and always clips",
        {"attn_config": _ROPE | {"clip_qkv": 8.0}},
    ),
    "deepseek_v2": Special(
        "the number of experts a token has no default", {"num_experts_per_tok": EXPERTS_PER_TOKEN}
    ),
    "dots1": Special(
        "numbers of experts have no default",
        {
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "n_shared_experts": 1,
        },
    ),
    "dots3_note_text": Special(
        "layers with a window have sizes of their own names", _DOTS3, drop=("per_layer_config",)
    ),
    "gemma3n_text": Special(
        "the width is given for each layer",
        {"intermediate_size": INTERMEDIATE, "num_hidden_layers": 4},
        drop=("activation_sparsity_pattern",),
    ),
    "granitemoehybrid": Special(
        "by default no layer is attention",
        {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 32},
    ),
    "hrm_text": Special(
        "layers are counted once for every cycle",
        {"num_layers_per_stack": 2},
        ("num_hidden_layers",),
    ),
    "hunyuan_v1_dense": Special("its head has no default width", {"head_dim": HEAD_DIM}),
    "hunyuan_v1_moe": Special(
        "its head has no default width, and its numbers of experts are 1",
        {"head_dim": HEAD_DIM, "num_experts": EXPERTS, "moe_topk": EXPERTS_PER_TOKEN},
    ),
    "lfm2": Special(
        "by default all layers are attention",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
        drop=("full_attn_idxs",),
    ),
    "lfm2_moe": Special(
        "kinds of layers have no default",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    ),
    "mamba2": Special("its heads are of twice the width", {"num_heads": 8, "n_groups": 1}),
    "ministral": Special("its head has no default width", {"head_dim": HEAD_DIM}),
    "mpt": Special("it takes a whole number for its dropout", {"attn_config": {"attn_pdrop": 0}}),
    "nemotron": Special(
        "its heads have no default number", {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}
    ),
    "phi4_multimodal": Special(
        "its audio encoder's widths are constants",
        {
            "audio_config": {
                "nemo_conv_channels": 32,
                "ext_pw_out_channel": HIDDEN,
                "depthwise_separable_out_channel": HIDDEN,
            }
        },
    ),
    "qwen4_exp_text": Special(
        "its indexer's sizes have no default",
        {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": WINDOW,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 64,
            "split_ngram_parts": 1,
        },
    ),
    "recurrent_gemma": Special("one layer in three is attention", {"num_hidden_layers": 3}),
    "reformer": Special(
        "its positions are a product of two tables",
        {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, HIDDEN - 16]},
    ),
    "xlstm": Special("its chunks hold a state as wide as its values", {"qk_dim_factor": 1.0}),
    "xmod": Special("it needs a language", {"default_language": "en_XX"}),
    "zamba": Special(
        "the transformer that its layers share ties them by number",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "attention_hidden_size": 2 * HIDDEN,
            "attention_head_dim": 2 * HIDDEN // HEADS,
            "num_key_value_heads": HEADS,
        },
    ),
    "zamba2": Special(
        "widths of its heads follow from others",
        {"n_mamba_heads": 8, "num_key_value_heads": HEADS, "attention_hidden_size": 2 * HIDDEN},
        drop=("mamba_headdim", "attention_head_dim", "kv_channels", "num_query_groups"),
    ),
    "zaya": Special("one expert a token", {"num_experts_per_tok": 1}),
    "got_ocr2": Special(
        "its tower widens to a fixed width", {"vision_config": {"output_channels": 16}}
    ),
    "longcat_flash": Special(
        "its layers hold two attentions, counted twice",
        {"expert_ffn_hidden_size": EXPERT_INTERMEDIATE},
    ),
}
_MROPE = _ROPE | {"mrope_section": [4, 2, 2]}
SPECIAL |= {
    kind: Special(
        "its positions have three parts",
        {
            "text_config": {"rope_parameters": _MROPE},
            "vision_config": {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]},
        },
    )
    for kind in (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen2_5_omni_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "glm4v",
        "glm46v",
        "glm_ocr",
        "paddleocr_vl",
    )
}
# Classes that no tiny model is made of. A test refuses one that is made all the same.
NOT_BUILT = {
    "dots3_note": "sizes of single layers lie in a part of it and cannot be given",
    "gemma3n": "its vision tower needs the timm library",
    "gemma4_assistant": "a draft: its layers take keys and values of another model",
    "gemma4_unified_assistant": "a draft: its layers take keys and values of another model",
    "musicgen": "transformers does not build its decoder from the class that it registers",
    "musicgen_melody": "transformers does not build its decoder from the class that it registers",
}
NOT_BUILT |= dict.fromkeys(("fast_vlm", "perception_lm"), "its vision tower needs the timm library")
NOT_BUILT["inkling_mm_model"] = "its audio tower needs the scipy library"
NOT_BUILT |= dict.fromkeys(
    (
        "blip",
        "blip-2",
        "idefics",
        "instructblip",
        "instructblipvideo",
        "pix2struct",
        "vision-encoder-decoder",
        "udop",
        "t5gemma2",
        "voxtral_realtime",
    ),
    "it cannot be given text alone",
)
# Who wants one in the matrix gives `SPECIAL` its sizes.
NOT_BUILT |= dict.fromkeys(
    (
        "chameleon",
        "cohere2_vision",
        "cohere_compass",
        "cosmos3_edge",
        "deepseek_ocr2",
        "diffusion_gemma",
        "ernie4_5_vl_moe",
        "evolla",
        "exaone4_5",
        "florence2",
        "fun_asr_nano",
        "glm4v_moe",
        "glm5_next",
        "glmga",
        "granite4_vision",
        "granite_speech",
        "granite_speech_plus",
        "hunyuan_vl",
        "janus",
        "kosmos-2",
        "kyutai_speech_to_text",
        "molmo2",
        "muse_spark",
        "nemo_speechlm",
        "nemotron_h_omni",
        "pi0",
        "pp_formulanet",
        "qwen2_5_omni",
        "qwen3_omni_moe",
        "step3p7",
        "unlimited_ocr",
        "vibevoice_asr",
    ),
    "sizes of its other parts are constants, or follow from each other",
)
SPECIAL["qwen4_exp"] = Special(
    SPECIAL["qwen4_exp_text"].reason, {"text_config": SPECIAL["qwen4_exp_text"].changes}
)


def with_special(model_type: str, fields: Fields) -> Fields:
    """The fields with what the class needs otherwise."""
    special = SPECIAL.get(model_type)
    if special is None:
        return fields
    kept = {name: value for name, value in fields.items() if name not in special.drop}
    return merged(kept, special.changes)


def merged(fields: Fields, changes: Fields) -> Fields:
    """The fields with the changes; those of a part that is a configuration reach into it."""
    result = dict(fields)
    for name, value in changes.items():
        inner = result.get(name)
        is_part = isinstance(value, dict) and isinstance(inner, dict) and name.endswith("_config")
        result[name] = merged(inner, value) if is_part else value
    return result
