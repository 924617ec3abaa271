"""Which settings of config.json may differ between a base and its fine-tune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.settings import ConfigChanges, compare_configs, with_changes
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import CheckpointError, InputError, UnsupportedTensor
from compressor.export.reconstruct import reconstruct
from tests.tiny import make_tiny


def compared(
    base: Path, tmp_path: Path, ignore: tuple[str, ...] = (), **given: Any
) -> ConfigChanges:
    """Compare a model with a copy whose config.json has these settings as well."""
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | given))
    with Checkpoint(base) as ours, Checkpoint(tuned) as theirs:
        return compare_configs(ours, theirs, ignore)


@pytest.mark.parametrize(
    "given",
    [
        {"_attn_implementation_autoset": True},
        {"use_cache": False, "transformers_version": "4.1", "_name_or_path": "x"},
        {"torch_dtype": "float16"},
        {"attention_bias": False},  # the default, written
        {"use_mrope": None},
    ],
)
def test_compare_configs_what_says_nothing_is_no_difference(
    given: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    assert compared(tiny_llama, tmp_path, **given) == ConfigChanges({}, {})


@pytest.mark.parametrize(
    "given",
    [
        {"use_mrope": False},  # nothing of the definition reads it
        {"neftune_noise_alpha": 5.0},
        {"attention_dropout": 0.1},
        {"initializer_range": 0.5},
        {"max_position_embeddings": 1024},
        {"some_trainer": {"lr": 1}},
    ],
)
def test_compare_configs_what_is_not_computed_with_is_kept(
    given: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    assert compared(tiny_llama, tmp_path, **given) == ConfigChanges(given, {})


@pytest.mark.parametrize("key", ["max_window_layers", "sliding_window"])
def test_compare_configs_inert_window_is_kept(key: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    found = compared(tiny_qwen2, tmp_path, **{key: 7})
    assert not found.ignored
    assert found.kept in ({key: 7}, {})


def test_compare_configs_window_in_use_raises(tmp_path: Path) -> None:
    base = make_tiny("qwen2", tmp_path / "base", use_sliding_window=True, max_window_layers=1)
    with pytest.raises(UnsupportedTensor, match="layer_types"):
        compared(base, tmp_path, max_window_layers=2, layer_types=None)


@pytest.mark.parametrize(
    "given",
    [
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"num_attention_heads": 2},
    ],
)
def test_compare_configs_what_is_computed_with_raises_with_the_way_out(
    given: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    (key,) = given
    with pytest.raises(UnsupportedTensor, match=rf"{key} is .*--ignore-config {key}"):
        compared(tiny_llama, tmp_path, **given)


def test_compare_configs_ignored_is_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    found = compared(tiny_llama, tmp_path, ("rms_norm_eps",), rms_norm_eps=0.1, eos_token_id=7)
    assert found == ConfigChanges({"eos_token_id": 7}, {"rms_norm_eps": 0.1})


def test_compare_configs_ignoring_what_is_equal_raises(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rms_norm_eps.*the same"):
        compared(tiny_llama, tmp_path, ("rms_norm_eps",))


def test_compare_configs_other_architecture_raises(tiny_llama: Path, tiny_qwen2: Path) -> None:
    with (
        Checkpoint(tiny_llama) as ours,
        Checkpoint(tiny_qwen2) as theirs,
        pytest.raises(CheckpointError, match=r"llama model.*qwen2"),
    ):
        compare_configs(ours, theirs)


def test_with_changes_of_a_part_keeps_its_others() -> None:
    config = {"a": 1, "text_config": {"b": 2, "c": 3}, "id2label": {"0": "x"}}
    found = with_changes(config, {"text_config": {"b": 5}, "id2label": {"1": "y"}})
    assert found == {"a": 1, "text_config": {"b": 5, "c": 3}, "id2label": {"1": "y"}}


def test_compress_ignored_setting_is_recorded_and_the_bases(
    tiny_llama: Path, tiny_llama_ft: Path, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_llama_ft, tuned)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    options = Options(ratio=8, ignore_config=("rms_norm_eps",))
    compress(tiny_llama, tuned, tmp_path / "delta", options)
    record = json.loads((tmp_path / "delta" / "delta_config.json").read_text())
    assert record["finetuned"]["ignored_config"] == {"rms_norm_eps": 0.1}
    assert "rms_norm_eps" in (tmp_path / "delta" / "README.md").read_text()
    out = reconstruct(tiny_llama, tmp_path / "delta", tmp_path / "out")
    assert AutoConfig.from_pretrained(out).rms_norm_eps == 1e-6
