"""What is paired with the weights that a quantised base was made from, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.original import pair_with_original
from compressor.checkpoint.pairing import Pairing
from compressor.errors import CheckpointError, ImpartError
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
from tests.gguf_files import write_gguf
from tests.quantised import quantise
from tests.tiny import Kind, make_tiny, perturb


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("original") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def tuned(original: Path) -> Path:
    return perturb(original, original.parent / "tuned", scale=0.05)


@pytest.fixture(scope="module")
def base(original: Path) -> Path:
    return quantise(original, original.parent / "base", SCHEMES["gptq-2"])


def pair(base: Path, original: Path, tuned: Path) -> Pairing:
    with Checkpoint(base) as b, Checkpoint(original) as o, Checkpoint(tuned) as t:
        return pair_with_original(b, o, t)


def with_tensors(model: Path, out: Path, **changed: torch.Tensor) -> Path:
    shutil.copytree(model, out)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | changed, out / "model.safetensors", {"format": "pt"})
    return out


def test_differences_are_from_the_original_and_settings_from_the_base(
    base: Path, original: Path, tuned: Path, tmp_path: Path
) -> None:
    generous = Path(shutil.copytree(base, tmp_path / "generous"))
    config = json.loads((base / "config.json").read_text())
    (generous / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    pairing = pair(generous, original, tuned)
    assert pairing.config_changes == {"attention_dropout": 0.0}
    with Checkpoint(original) as checkpoint:
        assert {one.base_key for one in pairing.pairs} == set(checkpoint.tensors)


@pytest.mark.parametrize("scheme", ["gptq-2", "awq", "fp8-blocks", "packed-4", "bnb-fp4"])
def test_every_way_to_quantise_an_original_is_taken(
    original: Path, tuned: Path, tmp_path: Path, scheme: str
) -> None:
    pair(quantise(original, tmp_path / "q", SCHEMES[scheme], "bfloat16"), original, tuned)


def test_gguf_file_and_the_model_it_was_made_from_are_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its embeddings are stored as, transformers' conversion has rounded them too."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    original = make_tiny("llama", tmp_path / "o", intermediate_size=96, num_hidden_layers=1)
    tuned = perturb(original, tmp_path / "tuned", scale=0.05)
    file = write_gguf(original, tmp_path / "tiny.gguf")
    pair(file, original, tuned)
    with pytest.raises(CheckpointError, match="was not made from tuned"):
        pair(file, tuned, original)


def test_original_with_other_norms_or_embeddings_is_refused(
    base: Path, original: Path, tuned: Path, tmp_path: Path
) -> None:
    norm, words = "model.norm.weight", "model.embed_tokens.weight"
    tensors = load_file(original / "model.safetensors")
    scaled = with_tensors(original, tmp_path / "scaled", **{norm: tensors[norm] * 1.5})
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(norm)}.*other values.*no scales of matrices explain"
    ):
        pair(base, scaled, tuned)
    other = with_tensors(original, tmp_path / "other", **{words: tensors[words].flip(0)})
    with pytest.raises(CheckpointError, match=rf"{re.escape(words)}.*other values there; give"):
        pair(base, other, tuned)


def test_original_with_unrelated_matrices_is_refused(
    base: Path, original: Path, tuned: Path, tmp_path: Path
) -> None:
    tensors = load_file(original / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    other = with_tensors(original, tmp_path / "other", **{name: tensors[name].flip(1)})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has other values"):
        pair(base, other, tuned)


def test_original_before_a_training_that_base_and_fine_tune_share_is_refused(
    original: Path, tmp_path: Path
) -> None:
    """Its difference would hold that training, which the base has already."""
    keep = ("norm", "embed", "lm_head")
    chat = perturb(original, tmp_path / "chat", scale=0.05, keep=keep, seed=7)
    tuned = perturb(chat, tmp_path / "tuned", scale=0.05, seed=8)
    base = quantise(chat, tmp_path / "base", SCHEMES["gptq-4"])
    with pytest.raises(CheckpointError, match=r"direction of tuned.* give --difference-from"):
        pair(base, original, tuned)
    pair(base, chat, tuned)


def test_original_of_another_size_or_other_ties_is_refused(
    base: Path, original: Path, tuned: Path, tmp_path: Path
) -> None:
    larger = make_tiny("llama", tmp_path / "larger", num_hidden_layers=2)
    with pytest.raises(ImpartError, match=r"layers\.1\.\S+ has shape none in base"):
        pair(base, larger, tuned)
    tied = make_tiny("llama", tmp_path / "tied", num_hidden_layers=1, tied=True)
    with pytest.raises(ImpartError, match=r"was not made from tied"):
        pair(base, tied, tuned)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_scales_that_a_base_has_in_its_norms_are_those_of_its_differences(
    tmp_path: Path, kind: Kind
) -> None:
    """A base that computes the same before it is rounded, as AWQ makes it."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_hidden_layers": 1}
    original = make_tiny(kind, tmp_path / "original", **sizes)
    tuned = perturb(original, tmp_path / "tuned", scale=0.05)
    scaled = with_tensors(original, tmp_path / "scaled", **folded(original, kind))
    base = quantise(scaled, tmp_path / "base", SCHEMES["awq"])
    pairing = pair(base, original, tuned)
    assert any("scales of weights in 2 norms" in note for note in pairing.notes)
    before, after = (load_file(model / "model.safetensors") for model in (original, scaled))
    theirs = load_file(tuned / "model.safetensors")
    checked = 0
    with Checkpoint(original) as o, Checkpoint(tuned) as t:
        for one in pairing.pairs:
            if "_proj" in one.name:
                difference = DeltaSource(o, t, one).block(0, *one.shape[:1], 0, *one.shape[1:])
                ratio = torch.where(before[one.name] != 0, after[one.name] / before[one.name], 1)
                wanted = (theirs[one.name] - before[one.name]) * ratio
                off = torch.linalg.vector_norm(difference - wanted)
                assert off < 0.03 * torch.linalg.vector_norm(wanted), one.name
                checked += 1
            elif one.scales is not None:
                plus = 1.0 if kind == "gemma" else 0.0
                wanted = (theirs[one.name] + plus) * (after[one.name] + plus)
                wanted = wanted / (before[one.name] + plus) - plus
                found = one.scales.of_vector(theirs[one.name])
                torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
                checked += 1
    assert checked == 9


def folded(model: Path, kind: Kind) -> dict[str, torch.Tensor]:
    """Tensors of a model of one layer, with scales moved as AWQ moves them."""
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    made = {}
    layer = "model.layers.0"
    for norm, layers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        name = f"{layer}.{norm}.weight"
        scale = torch.empty(len(tensors[name])).uniform_(-1, 1, generator=generator).exp()
        scale[3] = 0.02  # rounded away: the base's own column tells nothing
        plus = 1.0 if kind == "gemma" else 0.0
        made[name] = (tensors[name] + plus) / scale - plus
        for matrix in (f"{layer}.{part}.weight" for part in layers):
            made[matrix] = tensors[matrix] * scale
    down, up = f"{layer}.mlp.down_proj.weight", f"{layer}.mlp.up_proj.weight"
    scale = torch.empty(len(tensors[up])).uniform_(-1, 1, generator=generator).exp()
    scale[3] = 0.02
    made[up] = made[up] / scale.unsqueeze(1)
    made[down] = tensors[down] * scale
    return made
