"""Which parameters an architecture has, and which pairs of checkpoints are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint.difference import DeltaSource
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import Parameter, read_layout
from compressor.checkpoint.pairing import (
    Pairing,
    TensorPair,
    is_unchanged,
    pair_tensors,
    to_store,
)
from compressor.errors import CheckpointError, UnsupportedTensor
from tests.tiny import KINDS, Kind, make_tiny, perturb

Edit = Callable[[dict[str, torch.Tensor]], None]


def edited(source: Path, out: Path, edit: Edit | None = None, **config: object) -> Path:
    """Copy a model, changing its tensors and its config."""
    shutil.copytree(source, out)
    if edit is not None:
        tensors = load_file(out / "model.safetensors")
        edit(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(text | config))
    return out


def pair(base: Path, tuned: Path) -> Pairing:
    with Checkpoint(base) as b, Checkpoint(tuned) as t:
        return pair_tensors(b, t)


@pytest.mark.parametrize("kind", KINDS)
def test_layout_every_architecture_covers_the_stored_parameters(kind: Kind, tmp_path: Path) -> None:
    path = make_tiny(kind, tmp_path)
    layout = read_layout(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert layout.parameters.keys() == dict(model.named_parameters()).keys()
    for name, tensor in model.named_parameters():
        parameter = layout.parameters[name]
        assert parameter.kind == ("vector" if tensor.ndim == 1 else parameter.kind) != "other"
        shape = parameter.shape[::-1] if parameter.transposed else parameter.shape
        assert shape == tuple(tensor.shape)
    conv = [name for name, p in layout.parameters.items() if p.transposed]
    assert len(conv) == (8 if kind == "gpt2" else 0)
    tied = {"gemma": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}.get(kind)
    assert layout.tied == ((("lm_head.weight", tied),) if tied else ())


def test_pair_checkpoint_of_bare_model_gets_its_prefix(
    tiny_gpt2: Path, tiny_gpt2_ft: Path, tmp_path: Path
) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the mask old files carry

    pairing = pair(tiny_gpt2, edited(tiny_gpt2_ft, tmp_path / "bare", strip))
    found = {p.name: p.tuned_key for p in pairing.pairs}
    assert found["transformer.wte.weight"] == "wte.weight"
    assert found["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"


def test_pair_added_vocabulary_is_allowed_and_recorded(
    tiny_llama: Path, tiny_llama_ft_vocab: Path
) -> None:
    pairing = pair(tiny_llama, tiny_llama_ft_vocab)
    grown = {p.name: p.shape[0] - p.base_shape[0] for p in pairing.pairs if p.shape != p.base_shape}
    assert grown == {"model.embed_tokens.weight": 3, "lm_head.weight": 3}
    assert pairing.config_changes == {"vocab_size": 323}


def test_pair_smaller_vocabulary_raises(tiny_llama: Path, tiny_llama_ft_vocab: Path) -> None:
    with pytest.raises(UnsupportedTensor, match=r"model\.embed_tokens\.weight.*320 rows"):
        pair(tiny_llama_ft_vocab, tiny_llama)


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(UP), CheckpointError, rf"{UP} is missing"),
        (lambda t: t.update({"x.weight": torch.ones(2)}), UnsupportedTensor, r"x\.weight"),
        (lambda t: t.update({"model.experts.3.w1": t.pop(UP)}), UnsupportedTensor, "experts"),
        (lambda t: t.update({UP: t[UP][:, :-1].contiguous()}), UnsupportedTensor, UP),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), CheckpointError, "F8_E4M3"),
    ],
)
def test_pair_changed_tensors_raise_naming_them(
    tiny_llama: Path,
    tiny_llama_ft: Path,
    tmp_path: Path,
    edit: Edit,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        pair(tiny_llama, edited(tiny_llama_ft, tmp_path / "x", edit))


def test_pair_other_architecture_raises(tiny_llama: Path, tiny_qwen2: Path) -> None:
    with pytest.raises(CheckpointError, match=r"llama model.*qwen2"):
        pair(tiny_llama, tiny_qwen2)


def test_pair_changed_computation_raises(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTensor, match=r"rms_norm_eps is 1e-06 in the base and 0\.1"):
        pair(tiny_llama, edited(tiny_llama_ft, tmp_path / "x", rms_norm_eps=0.1))


def test_pair_harmless_config_changes_are_recorded(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tuned = edited(
        tiny_llama_ft,
        tmp_path / "x",
        eos_token_id=[2, 4],
        use_cache=False,
        max_position_embeddings=9,
    )
    expected = {"eos_token_id": [2, 4], "max_position_embeddings": 9}
    assert pair(tiny_llama, tuned).config_changes == expected


def test_pair_tied_twin_stored_too_is_one_parameter(tiny_gemma: Path, tmp_path: Path) -> None:
    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    names = [p.name for p in pair(tiny_gemma, edited(tiny_gemma, tmp_path / "x", copy)).pairs]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names

    def only_twin(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    pairing = pair(tiny_gemma, edited(tiny_gemma, tmp_path / "y", only_twin))
    assert {p.name: p.tuned_key for p in pairing.pairs}["model.embed_tokens.weight"] == (
        "lm_head.weight"
    )


def test_is_unchanged_single_bit_is_seen(tiny_llama: Path, tmp_path: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP].view(torch.int32)[-1, -1] ^= 1
        tensors[NORM][0] = -0.0

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][0] = 0.0

    base = edited(tiny_llama, tmp_path / "base", zero)
    tuned = edited(tiny_llama, tmp_path / "tuned", flip)
    pairing = pair(base, tuned)
    with Checkpoint(base) as b, Checkpoint(tuned) as t:
        changed = {p.name for p in pairing.pairs if not is_unchanged(b, t, p)}
    assert changed == {UP, NORM}


def test_is_unchanged_wider_dtype_of_equal_values_is_unchanged(
    tiny_dir: Path, tmp_path: Path
) -> None:
    base = make_tiny("llama", tmp_path / "b", dtype=torch.bfloat16)
    tuned = perturb(base, tmp_path / "t", keep=("layers",), dtype=torch.float32)
    pairing = pair(base, tuned)
    with Checkpoint(base) as b, Checkpoint(tuned) as t:
        for p in pairing.pairs:
            assert is_unchanged(b, t, p) == ("layers" in p.name)


def test_to_store_changed_convolution_is_exact(tiny_llama: Path) -> None:
    shape = (4, 8, 8)
    odd = Parameter("model.conv.weight", "other", shape, transposed=False, module="Conv1d")
    odd_pair = TensorPair(odd, shape, odd.name, "model.norm.weight")
    with Checkpoint(tiny_llama) as tuned:
        found = to_store(tuned, odd_pair, unchanged=False)
    assert found is not None
    assert (found.is_encoded, found.exact_start, found.exact_bytes) == (False, 0, 4 * 4 * 8 * 8)


def test_to_store_says_what_is_encoded_and_which_rows_are_exact(
    tiny_llama: Path, tiny_llama_ft_vocab: Path
) -> None:
    with Checkpoint(tiny_llama) as base, Checkpoint(tiny_llama_ft_vocab) as tuned:
        pairs = {p.name: p for p in pair_tensors(base, tuned).pairs}
        embedding = pairs["model.embed_tokens.weight"]
        n_added, width = embedding.shape[0] - embedding.base_shape[0], embedding.shape[1]
        for unchanged in (False, True):
            found = to_store(tuned, embedding, unchanged=unchanged)
            assert found is not None
            assert found.is_encoded is not unchanged
            assert found.exact_start == embedding.base_shape[0]
            assert found.exact_bytes == 4 * n_added * width
        norm = to_store(tuned, pairs["model.norm.weight"], unchanged=False)
        assert norm is not None
        assert (norm.is_encoded, norm.exact_start, norm.exact_bytes) == (False, 0, 4 * width)
        assert to_store(tuned, pairs["model.norm.weight"], unchanged=True) is None


@pytest.mark.parametrize("kept", [True, False])
def test_source_block_is_the_difference_turned_round(
    tiny_gpt2: Path, tiny_gpt2_ft: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    monkeypatch.setattr("compressor.checkpoint.difference._KEPT_BYTES", (64 << 20) * kept)
    name = "transformer.h.0.attn.c_attn.weight"
    expected = (
        load_file(tiny_gpt2_ft / "model.safetensors")[name]
        - load_file(tiny_gpt2 / "model.safetensors")[name]
    ).T
    pairing = pair(tiny_gpt2, tiny_gpt2_ft)
    with Checkpoint(tiny_gpt2) as b, Checkpoint(tiny_gpt2_ft) as t:
        source = DeltaSource(b, t, next(p for p in pairing.pairs if p.name == name))
        assert source.shape == (192, 64)
        assert torch.equal(source.block(0, 192, 0, 64), expected)
        assert torch.equal(source.block(100, 130, 5, 60), expected[100:130, 5:60])


def renamed(source: Path, out: Path, prefix: str) -> Path:
    """Copy a model with a prefix before every tensor's name."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return edited(source, out, add)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_pair_wrapped_fine_tune_loses_the_prefix_and_says_so(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path, prefix: str
) -> None:
    wrapped = pair(tiny_llama, renamed(tiny_llama_ft, tmp_path / "x", prefix))
    plain = pair(tiny_llama, tiny_llama_ft)
    assert [p.name for p in wrapped.pairs] == [p.name for p in plain.pairs]
    assert [p.tuned_key for p in wrapped.pairs] == [prefix + p.tuned_key for p in plain.pairs]
    assert prefix in wrapped.notes[0]
    assert not plain.notes


def test_pair_compiled_layers_lose_the_prefix_inside_names(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    def compile_layer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            tensors[name.replace("layers.1.", "layers.1._orig_mod.")] = tensors.pop(name)

    found = pair(tiny_llama, edited(tiny_llama_ft, tmp_path / "x", compile_layer))
    keys = {p.name: p.tuned_key for p in found.pairs}
    assert keys[UP] == UP.replace("layers.1.", "layers.1._orig_mod.")


def test_pair_wrapped_base_raises(tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path) -> None:
    base = renamed(tiny_llama, tmp_path / "x", "module.")
    with pytest.raises(CheckpointError, match=r"module\..*prefix of a wrapper"):
        pair(base, tiny_llama_ft)


def test_pair_rows_unlike_the_configuration_raise_with_both_numbers(
    tiny_llama: Path, tiny_llama_ft_vocab: Path, tmp_path: Path
) -> None:
    wrong = edited(tiny_llama_ft_vocab, tmp_path / "x", vocab_size=320)
    with pytest.raises(CheckpointError, match=r"323 rows.*320 \(vocab_size\)"):
        pair(tiny_llama, wrong)


def untied(tied: Path, out: Path, change: float) -> Path:
    """Copy a tied model as an untied one whose output differs from its embedding by `change`."""

    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 + change)

    return edited(tied, out, store_head, tie_word_embeddings=False)


def test_pair_untied_fine_tune_of_equal_values_stays_tied(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", tied=True)
    tuned = perturb(base, tmp_path / "tuned")
    found = pair(base, untied(tuned, tmp_path / "untied", 0.0))
    assert found.untied == ()
    assert [p.name for p in found.pairs] == [p.name for p in pair(base, tuned).pairs]


def test_pair_untied_fine_tune_is_a_difference_from_the_tied_weight(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", tied=True)
    found = pair(base, untied(perturb(base, tmp_path / "tuned"), tmp_path / "untied", 0.5))
    assert found.untied == ("lm_head.weight",)
    (head,) = (p for p in found.pairs if p.name == "lm_head.weight")
    assert (head.base_key, head.tuned_key) == ("model.embed_tokens.weight", "lm_head.weight")


def test_pair_tied_fine_tune_of_an_untied_base_has_both(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", tied=False)
    found = pair(base, make_tiny("llama", tmp_path / "tuned", tied=True))
    keys = {p.name: p.tuned_key for p in found.pairs}
    assert keys["lm_head.weight"] == keys["model.embed_tokens.weight"]


def test_pair_tie_of_two_values_in_one_checkpoint_raises(tiny_gemma: Path, tmp_path: Path) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    both = edited(tiny_gemma, tmp_path / "both", untie)
    with pytest.raises(UnsupportedTensor, match=r"lm_head\.weight: .* two different tensors"):
        pair(tiny_gemma, both)
