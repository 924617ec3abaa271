"""Static-buffer decode steps of the kernels together, against Hugging Face on merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

pytest.importorskip("triton")

from benchmarks.gpu.cases import BLOCK_TOKENS
from benchmarks.gpu.decoder import Decoder, GroupWeights, Layer
from benchmarks.gpu.shapes import ModelShape
from compressor.codecs.blockdiag import BlockDiagTerm
from server.engine.step.static_buffers import DecodeRow
from server.engine.step.static_step import StaticStep
from tests.server.ops.triton.helpers import pack, random_term

CPU = torch.device("cpu")
SLOTS = 3  # variants in 0 and 2; slot 1 holds garbage
MEMBERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LlamaForCausalLM:
    loaded: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    return loaded


def terms_of(model: LlamaForCausalLM, slot: int) -> dict[str, BlockDiagTerm]:
    """A 4-bit delta of every linear, by its path; scaled to change the logits visibly."""
    terms = {}
    for number, (path, module) in enumerate(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            m, n = module.weight.shape
            terms[path] = random_term((m, n), 2, 4, 100 * slot + number).rescaled(0.25)
    return terms


def merged(model: LlamaForCausalLM, path: Path, slot: int) -> LlamaForCausalLM:
    copy: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        for name, term in terms_of(model, slot).items():
            copy.model.layers.get_submodule(name).weight += term.to_dense()
    return copy


def decoder_of(model: LlamaForCausalLM, n_kv_blocks: int) -> Decoder:
    """The same weights in the kernels' layout; the caches begin as NaN."""
    config = model.config
    shape = ModelShape(
        "tiny",
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.num_hidden_layers,
        config.vocab_size,
    )
    terms = {slot: terms_of(model, slot) for slot in (0, 2)}

    def norms(norm: torch.nn.Module) -> Tensor:
        rows = torch.full((SLOTS + 1, config.hidden_size), float("nan"))
        rows[[0, 1, 3]] = norm.weight.data
        return rows

    layers = []
    for i, layer in enumerate(model.model.layers):
        groups = {}
        for name, members in MEMBERS.items():
            base = torch.cat([layer.get_submodule(path).weight.data for path in members])
            variants = {s: [t[f"{i}.{path}"] for path in members] for s, t in terms.items()}
            groups[name] = GroupWeights(base, *pack(variants, SLOTS))
        cache = torch.full(
            (n_kv_blocks, BLOCK_TOKENS, shape.kv_heads, shape.head_dim), float("nan")
        )
        norm_in, norm_mlp = norms(layer.input_layernorm), norms(layer.post_attention_layernorm)
        layers.append(Layer(norm_in, norm_mlp, groups, cache, cache.clone()))
    return Decoder(
        shape,
        model.model.embed_tokens.weight.data,
        layers,
        norms(model.model.norm),
        model.lm_head.weight.data,
        model.model.rotary_emb.inv_freq,
        config.rms_norm_eps,
        n_splits=1,
    )


def row(tokens: list[int], at: int, kv_block: int, slot: int) -> DecodeRow:
    """Token number `at` of a sequence that lives on one KV block."""
    return DecodeRow(tokens[at], at, kv_block * BLOCK_TOKENS + at, [kv_block], at + 1, slot)


@pytest.mark.slow  # half a minute: three hundred launches under the interpreter
def test_mixed_steps_equal_hugging_face_on_merged_weights(
    model: LlamaForCausalLM, tiny_llama: Path
) -> None:
    oracles = {-1: model, 0: merged(model, tiny_llama, 0), 2: merged(model, tiny_llama, 2)}
    prompts = {-1: [7, 300], 0: [19, 22], 2: [7, 300]}
    step = StaticStep(decoder_of(model, 4), max_rows=3, max_kv_blocks=1, device=CPU)
    assert step.buckets == (1, 2, 4)
    with torch.inference_mode():
        want = {s: oracles[s](torch.tensor([ids])).logits[0] for s, ids in prompts.items()}
    for at in range(2):
        rows = [row(prompts[s], at, kv_block, s) for kv_block, s in enumerate((-1, 0, 2))]
        logits = step.run(rows)
        for i, slot in enumerate((-1, 0, 2)):
            torch.testing.assert_close(logits[i], want[slot][at], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(want[-1], want[2], atol=0.1), "the delta must matter"
