"""Llama of random weights as the server holds it, and delta artifacts of random codes for it.

No checkpoint is read: weights are made on the device. Artifacts are real ones, written by
`ArtifactWriter` and read by the server's loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.scope import Scope
from benchmarks.gpu.shapes import Codec, ModelShape
from compressor.artifact.config import BaseInfo, DeltaConfig
from compressor.artifact.writer import ArtifactWriter
from compressor.codecs import TensorDelta
from compressor.codecs.blockdiag import BlockDiagTerm, blockdiag_from_codes
from compressor.codecs.partition import kept_values
from server.model.attention import ATTENTION_NAME, register_attention
from server.model.base import BaseModel, prepare_base_model
from server.ops.kernels import Kernels, TorchKernels
from server.ops.quantize import BaseQuant
from server.ops.triton.kernels import TritonKernels

IDENTITY = "0" * 64
POSITIONS = 8192
UNIT = 2.0**-12
MEMBERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def random_base(
    scope: Scope, base_quant: BaseQuant | None = None, kernels: Kernels | None = None
) -> BaseModel:
    """The engine's base model; by default on a CPU with torch's kernels, the interpreter being too
    slow.
    """
    shape = scope.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    register_attention()
    with scope.device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=scope.dtype, attn_implementation=ATTENTION_NAME
        )
    model = model.eval().requires_grad_(False)
    if kernels is None:
        kernels = TritonKernels(scope.device) if scope.device.type == "cuda" else TorchKernels()
    return prepare_base_model(model, kernels, base_quant)


def linears(shape: ModelShape) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear of every layer."""
    for layer in range(shape.layers):
        for group in shape.groups():
            for member, m in zip(MEMBERS[group.name], group.sizes, strict=True):
                yield f"model.layers.{layer}.{member}.weight", m, group.n


def random_term(m: int, n: int, codec: Codec) -> BlockDiagTerm:
    n_values = kept_values((m, n), codec.n_blocks)
    codes = torch.randint(0, 1 << codec.bits, (n_values,), dtype=torch.uint8)
    scales = (torch.rand(m) + 0.5).half().float() * UNIT
    return blockdiag_from_codes((m, n), codec.n_blocks, codec.bits, codes, scales, UNIT)


def write_random_delta(shape: ModelShape, codec: Codec, out: Path) -> None:
    """An artifact with a delta of every linear; layers share their values, not their bytes."""
    terms: dict[tuple[int, int], BlockDiagTerm] = {}
    with ArtifactWriter(out, run_key=codec.name) as writer:
        for name, m, n in linears(shape):
            if (m, n) not in terms:
                terms[m, n] = random_term(m, n, codec)
            writer.add(TensorDelta(name, (m, n), (m, n), False, (terms[m, n],), None))
        n_parameters = sum(m * n for _, m, n in linears(shape))
        writer.finish(
            DeltaConfig(
                created_by="benchmarks.gpu",
                codec="blockdiag",
                options={},
                ratio_requested=None,
                finetuned_bytes=2 * n_parameters,
                finetuned="random",
                base=BaseInfo(IDENTITY, "random", n_parameters, "bfloat16"),
                seed=0,
            )
        )
