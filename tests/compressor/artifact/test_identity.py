from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.artifact.reader import base_identity
from compressor.errors import CheckpointError
from tests.tiny import make_tiny


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", "pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def rewrite(path: Path, change) -> None:
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_base_identity_is_stable_hex_and_ignores_the_folder(model: Path, tiny_llama: Path) -> None:
    identity = base_identity(model)
    assert identity == base_identity(tiny_llama) == base_identity(str(model))
    assert len(identity) == 64
    assert set(identity) <= set("0123456789abcdef")


def test_base_identity_sharded_equals_single(tmp_path: Path) -> None:
    single = make_tiny("llama", tmp_path / "single", seed=3)
    sharded = make_tiny("llama", tmp_path / "sharded", seed=3, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert base_identity(single) == base_identity(sharded)


@pytest.mark.parametrize("key", ["_name_or_path", "transformers_version", "dtype", "use_cache"])
def test_base_identity_ignores_volatile_config_keys(model: Path, key: str) -> None:
    before = base_identity(model)
    config = json.loads((model / "config.json").read_bytes()) | {key: "other"}
    (model / "config.json").write_text(json.dumps(config, indent=7))
    assert base_identity(model) == before


@pytest.mark.parametrize("key", ["architectures", "rope_theta", "vocab_size", "new_key"])
def test_base_identity_config_change_changes_it(model: Path, key: str) -> None:
    before = base_identity(model)
    config = json.loads((model / "config.json").read_bytes()) | {key: ["other"]}
    (model / "config.json").write_text(json.dumps(config))
    assert base_identity(model) != before


@pytest.mark.parametrize("position", [0, -1, 100])
def test_base_identity_any_value_of_a_small_tensor_changes_it(model: Path, position: int) -> None:
    before = base_identity(model)

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[position] += 1e-3

    rewrite(model, change)
    assert base_identity(model) != before


def test_base_identity_renamed_reshaped_or_cast_tensor_changes_it(model: Path) -> None:
    seen = {base_identity(model)}
    original = tensors_of(model)
    name = "model.norm.weight"
    for change in (
        lambda t: t.update({"other": t.pop(name)}),
        lambda t: t.update({name: t[name].reshape(2, -1)}),
        lambda t: t.update({name: t[name].view(torch.float16)}),
        lambda t: t.pop(name),
    ):
        tensors = dict(original)
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        seen.add(base_identity(model))
    assert len(seen) == 5


def _large(path: Path, change: dict[int, float] | None = None) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    values = torch.zeros(100_000)  # 400 kB: sampled
    for position, value in (change or {}).items():
        values[position] = value
    save_file({"w": values}, path / "model.safetensors")
    return base_identity(path)


def test_base_identity_large_tensor_is_sampled_at_both_ends_and_between(tmp_path: Path) -> None:
    before = _large(tmp_path / "m")
    assert _large(tmp_path / "m", {0: 1.0}) != before
    assert _large(tmp_path / "m", {99_999: 1.0}) != before
    assert _large(tmp_path / "m", dict.fromkeys(range(0, 100_000, 500), 1.0)) != before
    assert _large(tmp_path / "m") == before


def test_base_identity_unusable_directories_raise_checkpoint_error(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError):
        base_identity(tmp_path / "no" / "such" / "place")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        base_identity(tmp_path / "empty")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        base_identity(model)
