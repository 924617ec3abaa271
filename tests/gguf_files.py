"""Tiny GGUF files of Llama models, with a tokenizer, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(base: Path, file: Path) -> Path:
    """Write a tiny Llama with its matrices in Q8_0 (blocks of 32) and its norms in float32."""
    config = json.loads((base / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, base)
    for name, value in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if "q_proj" in module or "k_proj" in module:
            value = interleaved(value, heads if "q_proj" in module else kv_heads)
        data = value.float().numpy()
        if value.ndim == 2:
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{_renamed(module)}.weight", packed,
                              raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
        else:
            writer.add_tensor(f"{_renamed(module)}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def q8_0(value: Tensor) -> Tensor:
    """What Q8_0 keeps of a matrix: of every 32 elements a float16 scale and whole numbers."""
    dense = value.double().clone()
    for row in dense:
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            scale = float(block.abs().max()) / 127
            stored = float(np.float16(scale))
            for i in range(len(block)):
                whole = np.float32(block[i]) * np.float32(1 / np.float32(scale))
                block[i] = float(np.sign(whole) * np.floor(np.abs(whole) + 0.5)) * stored
    return dense.float()


def interleaved(value: Tensor, n_heads: int) -> Tensor:
    """llama.cpp rotates neighbours where Hugging Face rotates halves."""
    return value.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def rope_theta(config: dict[str, object]) -> float:
    rope = config.get("rope_parameters") or config
    assert isinstance(rope, dict)
    return float(rope.get("rope_theta", 10000.0))


def _renamed(module: str) -> str:
    if module in NAMES:
        return NAMES[module]
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"


def _add_tokenizer(writer: gguf.GGUFWriter, base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    by_id = {index: token for token, index in (vocab | special).items()}
    tokens = [by_id.get(index, f"[UNUSED{index}]") for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_bos_token_id(special["<s>"])
    writer.add_eos_token_id(special["<|endoftext|>"])
