"""Names of stored tensors, with and without an adapter's name in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import InputError
from compressor.peft.keys import AdapterKey, choose_adapter, parse_key
from tests.compressor.cli.test_app import impart, one_line_error
from tests.compressor.peft.test_adapter import Q, adapter, imported, lora


@pytest.mark.parametrize(
    ("key", "parameter", "part", "owner"),
    [
        ("base_model.model.a.q.lora_A.weight", "a.q.weight", "A", None),
        ("base_model.model.a.q.lora_A.default.weight", "a.q.weight", "A", "default"),
        ("a.q.lora_B.bias", "a.q.bias", "added", None),
        ("a.q.lora_B.reference.bias", "a.q.bias", "added", "reference"),
        ("a.q.lora_E", "a.q.weight", "E", None),
        ("a.q.lora_E.default", "a.q.weight", "E", "default"),
        ("a.e.lora_embedding_A.default", "a.e.weight", "embedding_A", "default"),
        ("a.q.lora_magnitude_vector.default.weight", "a.q.weight", "magnitude", "default"),
        ("a.q.lora_magnitude_vector", "a.q.weight", "magnitude", None),
        ("a.e.token_adapter.trainable_tokens_delta", "a.e.weight", "tokens", None),
        ("a.e.token_adapter.trainable_tokens_delta.x", "a.e.weight", "tokens", "x"),
        ("a.q.ia3_l", "a.q.weight", "ia3", None),
        ("a.q.lokr_w1_a.default", "a.q.weight", "lokr_w1_a", "default"),
        ("a.n.modules_to_save.default.weight", "a.n.weight", "full", "default"),
        ("a.n.modules_to_save.bias", "a.n.bias", "full", None),
        ("a.n.ln_tuning_layers.default.bias", "a.n.bias", "full", "default"),
        ("base_model.vera_A", "", "vera_A", None),
        ("base_model.vera_B.default", "", "vera_B", "default"),
    ],
)
def test_key_is_read_with_and_without_a_name(
    key: str, parameter: str, part: str, owner: str | None
) -> None:
    assert parse_key(key) == AdapterKey(parameter, part, owner)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_key_below_wrappers_of_other_parameters_says_how_many(depth: int) -> None:
    key = f"model.experts{'.base_layer' * depth}.lora_B.default.weight"
    assert parse_key(key) == AdapterKey("model.experts.weight", "B", "default", depth=depth)


def test_key_of_a_value_without_a_wrapper_is_everybodys() -> None:
    assert parse_key("base_model.model.a.q.bias") == AdapterKey("a.q.bias", "full", None, True)
    assert parse_key("a.e.base_layer.weight") == AdapterKey("a.e.weight", "full", None, True)
    assert parse_key("lm_head.original_module.weight") is None


def named(name: str, seed: int) -> dict[str, torch.Tensor]:
    return {
        key.replace(".weight", f".{name}.weight"): tensor
        for key, tensor in lora(Q, 64, 64, seed=seed).items()
    }


def test_two_adapters_in_one_file_are_refused_unless_one_is_chosen(
    tiny_llama: Path, tmp_path: Path
) -> None:
    both = adapter(tmp_path / "both", named("default", 0) | named("reference", 1))
    for command in ("import", "compress"):
        error = one_line_error(command, tiny_llama, both, tmp_path / "out")
        assert "adapters default, reference; choose one with --adapter-name" in error
        error = one_line_error(
            command, tiny_llama, both, tmp_path / "out", "--adapter-name", "other"
        )
        assert "holds no adapter other; it has default, reference" in error
    weights = {}
    for name, seed in (("default", 0), ("reference", 1)):
        alone = adapter(tmp_path / name, lora(Q, 64, 64, seed=seed))
        arguments = (tiny_llama, both, tmp_path / f"{name}-delta", "--adapter-name", name)
        assert impart("import", *arguments)[0] == 0
        delta = tmp_path / f"{name}-delta"
        assert impart("reconstruct", tiny_llama, delta, tmp_path / f"{name}-full")[0] == 0
        weights[name] = load_file(tmp_path / f"{name}-full" / "model.safetensors")[f"{Q}.weight"]
        base = load_file(tiny_llama / "model.safetensors")[f"{Q}.weight"]
        expected = imported(tiny_llama, alone)[f"{Q}.weight"].reconstruct(base)
        assert torch.equal(weights[name], expected)
    assert not torch.equal(weights["default"], weights["reference"])


def test_one_adapter_with_a_name_needs_no_choice_and_unnamed_ones_count() -> None:
    keys = list(named("default", 0))
    assert set(choose_adapter(keys, None)) == set(choose_adapter(keys, "default")) == set(keys)
    with pytest.raises(InputError, match=r"adapters \(no name\), default"):
        choose_adapter([*keys, *lora(Q, 64, 64)], None)
    with pytest.raises(InputError, match=r"no adapter x; it has \(no name\)"):
        choose_adapter(list(lora(Q, 64, 64)), "x")
