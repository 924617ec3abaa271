"""Buffers, convolutions, converted and shared weights come back as transformers stores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.artifact.reader import read_artifact
from compressor.checkpoint.layout import read_layout
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import UnsupportedTensor
from compressor.export.reconstruct import reconstruct
from tests.compressor.artifact import format_reader
from tests.compressor.odd_models import make
from tests.tiny import make_tiny, perturb

# Architecture -> a tensor of its checkpoint that must be among those stored exactly.
KINDS = {
    "gemma4_text": "model.layers.0.layer_scalar",
    "deepseek_v3": "model.layers.1.mlp.gate.e_score_correction_bias",
    "minimax_m2": "model.layers.0.mlp.e_score_correction_bias",
    "mamba": "backbone.layers.0.mixer.conv1d.weight",
    "kimi_linear": "model.layers.0.self_attn.k_conv1d.weight",
    "olmo_hybrid": "model.layers.0.linear_attn.v_conv1d.weight",
    "hrm_text": None,
}
OPTIONS = Options(codec="blockdiag", codec_options={"bits": 16}, ratio=3)


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "kimi_linear")) for kind in KINDS],
)
def test_compress_odd_architecture_comes_back_whole(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "base", tmp_path / "tuned")
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", OPTIONS)
    out = reconstruct(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    base, tuned, made = (tensors(path) for path in (tmp_path / "base", tmp_path / "tuned", out))
    forms = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in (tuned, made)]
    assert forms[0] == forms[1]
    deltas = {delta.name: delta for delta in read_artifact(tmp_path / "delta").tensors}
    exact = {name for name, delta in deltas.items() if not delta.terms}
    keys = read_layout(tmp_path / "tuned").keys(tuned, "tuned")
    for name in deltas.keys() & {name for name in keys if "[" not in name}:
        key, terms = keys[name], deltas[name].terms
        if name in exact:
            assert torch.equal(made[key], tuned[key]), name
        else:
            summed = base[key] + sum(term.to_dense() for term in terms)
            torch.testing.assert_close(made[key], summed, rtol=0, atol=1e-6)
    if (telling := KINDS[kind]) is not None:
        assert telling in exact
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


def test_compress_changed_whole_numbers_come_back(tmp_path: Path) -> None:
    make("deepseek_v4", tmp_path / "base", tmp_path / "tuned")
    stored = tensors(tmp_path / "tuned")
    name = next(name for name, tensor in stored.items() if not tensor.is_floating_point())
    stored[name] = 1 - stored[name]
    save_file(stored, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", OPTIONS)
    out = reconstruct(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    made, before = tensors(out)[name], tensors(tmp_path / "base")[name]
    assert torch.equal(made, stored[name])
    assert made.dtype == stored[name].dtype
    assert not torch.equal(made, before)
    found = format_reader.read(tmp_path / "delta")[2]
    (entry,) = (t for t in found if t.exact is not None and t.exact.dtype == "float64")
    assert torch.equal(torch.from_numpy(entry.value(before.numpy())), made.double())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.bias",  # a causal mask, boolean
    ],
)
def test_layout_masks_and_derived_buffers_are_passed_over(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    perturb(tiny_llama, tmp_path / "tuned")
    stored = tensors(tmp_path / "tuned")
    is_mask = name.endswith("bias")
    stored[name] = torch.ones(1, 1, 4, 4, dtype=torch.bool) if is_mask else torch.ones(8)
    save_file(stored, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    layout = read_layout(tmp_path / "tuned")
    assert name not in layout.keys(stored, "tuned")
    assert layout.parameters == read_layout(tiny_llama).parameters


def test_layout_unknown_floats_raise_naming_them(tiny_llama: Path, tmp_path: Path) -> None:
    make_tiny("llama", tmp_path / "tuned")
    stored = tensors(tmp_path / "tuned") | {"model.layers.0.mlp.router.bias": torch.ones(3)}
    save_file(stored, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedTensor, match=r"model\.layers\.0\.mlp\.router\.bias"):
        read_layout(tmp_path / "tuned").keys(stored, "tuned")


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_compress_untied_fine_tune_of_a_tied_base_comes_back(change: float, tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", tied=True)
    tuned_model = AutoModelForCausalLM.from_pretrained(perturb(base, tmp_path / "tied"))
    tuned_model.config.tie_word_embeddings = False
    with torch.no_grad():
        own = tuned_model.get_input_embeddings().weight * (1 + change)
    tuned_model.lm_head.weight = torch.nn.Parameter(own.detach())
    tuned_model.save_pretrained(tmp_path / "tuned")
    compress(base, tmp_path / "tuned", tmp_path / "delta", OPTIONS)
    artifact = read_artifact(tmp_path / "delta")
    own_head = ("lm_head.weight",) if change else ()
    assert artifact.config.base.untied == own_head
    out = reconstruct(base, tmp_path / "delta", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.tie_word_embeddings is not bool(change)
    table = tensors(base)["model.embed_tokens.weight"]
    deltas = {delta.name: delta for delta in artifact.tensors}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        delta = deltas[name if change else "model.embed_tokens.weight"]
        assert torch.equal(model.state_dict()[name], delta.reconstruct(table))
