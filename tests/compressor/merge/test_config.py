"""mergekit-style YAML: what is understood, and that nothing is silently ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import InputError
from compressor.merge.config import MergeConfig, MergeModel, constant, read_merge_config

MERGEKIT = """
models:
  - model: org/base
    # no parameters necessary for base model
  - model: org/one@v1
    parameters:
      density: 0.5
      weight: 0.3
  - model: ./two
    parameters:
      weight:
        - filter: self_attn
          value: 0.75
        - value: 0.25
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
  lambda: 0.8
dtype: float16
"""


def read(tmp_path: Path, text: str) -> MergeConfig:
    file = tmp_path / "merge.yaml"
    file.write_text(text)
    return read_merge_config(file)


def test_read_mergekit_example_is_understood(tmp_path: Path) -> None:
    config = read(tmp_path, MERGEKIT)
    assert (config.base, config.method, config.mask) == ("org/base", "ties", "none")
    assert (config.scale, config.is_mean, config.dtype) == (0.8, True, "float16")
    one, two = config.models
    assert (one.name, one.density, one.weight) == ("org/one@v1", constant(0.5), constant(0.3))
    assert two.density == constant(0.2)
    assert two.weight.at("model.layers.0.self_attn.q_proj.weight") == 0.75
    assert two.weight.at("model.norm.weight") == 0.25


@pytest.mark.parametrize(("name", "method"), [("dare_linear", "ta"), ("dare_ties", "ties")])
def test_read_dare_density_is_the_masks(tmp_path: Path, name: str, method: str) -> None:
    config = read(
        tmp_path,
        MERGEKIT.replace("merge_method: ties", f"merge_method: {name}").replace(
            "lambda: 0.8", "density: 0.6"
        ),
    )
    assert (config.method, config.mask, config.trims) == (method, "dare", False)
    assert [model.mask_density for model in config.models] == [constant(0.5), constant(0.6)]


def test_read_own_keys_mask_scope_and_seed(tmp_path: Path) -> None:
    text = MERGEKIT.replace(
        "lambda: 0.8", "mask: impart\n  mask_density: 0.3\n  trim_scope: tensor"
    )
    config = read(tmp_path, text + "seed: 7\n")
    assert (config.mask, config.trim_scope, config.seed) == ("impart", "tensor", 7)
    assert config.models[0].density == constant(0.5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("int8_mask: true", "int9_mask: true", "parameters: unknown key int9_mask"),
        ("base_model", "slices: []\nbase_model", "unknown key slices"),
        ("weight: 0.3", "wait: 0.3", "org/one@v1: parameters: unknown key wait"),
        ("weight: 0.3", "weight: heavy", "org/one@v1: weight: expected a number"),
        ("weight: 0.3", "weight: [0.1, 0.9]", "gradients"),
        ("weight: 0.3", "weight: .nan", "expected a number"),
        ("density: 0.5", "density: 1.5", "density must be within"),
        ("density: 0.5", "density: [{filter: mlp, value: 0.5}, {value: 1}]", "trim_scope: tensor"),
        ("merge_method: ties", "merge_method: slerp", "merge_method 'slerp'"),
        ("normalize: true", "normalize: 1", "normalize must be true or false"),
        ("base_model: org/base", "", "base_model must name"),
        ("dtype: float16", "dtype: int8", "dtype must be one of"),
        ("dtype: float16", "tokenizer_source: union", "union"),
        ("lambda: 0.8", "mask: lottery", "mask must be one of none, dare, impart"),
        ("lambda: 0.8", "mask_density: 0.5", "without a mask"),
    ],
)
def test_read_what_is_not_understood_raises_naming_the_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in MERGEKIT
    with pytest.raises(InputError, match=message):
        read(tmp_path, MERGEKIT.replace(old, new, 1))


@pytest.mark.parametrize("text", ["- 1", "{", "a: [", ""])
def test_read_no_mapping_raises(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        read(tmp_path, text)
    with pytest.raises(InputError, match="No such file"):
        read_merge_config(tmp_path / "gone.yaml")


def test_config_setting_without_fitting_filter_raises_naming_the_tensor(tmp_path: Path) -> None:
    text = MERGEKIT.replace("        - value: 0.25\n", "")
    setting = read(tmp_path, text).models[1].weight
    with pytest.raises(InputError, match=r"model\.norm\.weight: no filter"):
        setting.at("model.norm.weight")


def test_config_nothing_to_merge_raises() -> None:
    with pytest.raises(InputError, match="nothing to merge"):
        MergeConfig("base", ())
    with pytest.raises(InputError, match="lambda"):
        MergeConfig("base", (MergeModel("a"),), scale=float("inf"))
