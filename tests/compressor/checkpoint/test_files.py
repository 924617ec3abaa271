"""Lazy safetensors reader, against the safetensors library itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.files import Checkpoint
from compressor.errors import CheckpointError
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return make_tiny("llama", folder, seed=1, max_shard_size="60KB", dtype=torch.bfloat16)


def minimal(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_rows_sharded_checkpoint_equal_safetensors_library(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    expected = {name: t for file in files for name, t in load_file(file).items()}
    with Checkpoint(sharded) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        assert checkpoint.n_bytes == sum(file.stat().st_size for file in files)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read_rows(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slice_any_dtype_equals_indexing(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(37, 23).to(dtype)
    with Checkpoint(minimal(tmp_path / "m", {"w": matrix})) as checkpoint:
        block = checkpoint.slice("w", 5, 31, 2, 19)
        assert block.dtype == torch.float32
        assert torch.equal(block, matrix[5:31, 2:19].float())
        assert torch.equal(checkpoint.read_rows("w", 36, 37), matrix[36:])


def test_rows_scalar_and_empty_tensor_are_read(tmp_path: Path) -> None:
    folder = minimal(tmp_path / "m", {"s": torch.tensor(2.5), "e": torch.empty(0, 4)})
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.read_rows("s").item() == 2.5
        assert checkpoint.read_rows("e").shape == (0, 4)


def test_dtype_integer_tensor_raises_checkpoint_error(tmp_path: Path) -> None:
    folder = minimal(tmp_path / "m", {"w": torch.zeros(2, 2, dtype=torch.int8)})
    with (
        Checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"w is stored as I8"),
    ):
        checkpoint.read_rows("w")


def test_open_pickle_checkpoint_names_the_conversion_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"python -c .*save_pretrained") as caught:
        Checkpoint(tmp_path)
    command = str(caught.value).split('python -c "')[1].rstrip('"')
    compile(command, "command", "exec")  # what we tell users to run is Python


def test_open_truncated_file_raises_checkpoint_error(tmp_path: Path) -> None:
    folder = minimal(tmp_path / "m", {"w": torch.zeros(8, 8)})
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 20, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint(folder)


def test_open_header_length_beyond_file_raises_checkpoint_error(tmp_path: Path) -> None:
    folder = minimal(tmp_path / "m", {"w": torch.zeros(8, 8)})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Checkpoint(folder)


def test_open_size_contradicting_shape_raises_checkpoint_error(tmp_path: Path) -> None:
    folder = minimal(tmp_path / "m", {"w": torch.zeros(8, 8)})
    header = {"w": {"dtype": "F32", "shape": [8, 9], "data_offsets": [0, 256]}}
    text = json.dumps(header).encode()
    body = struct.pack("<Q", len(text)) + text + bytes(256)
    (folder / "model.safetensors").write_bytes(body)
    with pytest.raises(CheckpointError, match="size and shape of w disagree"):
        Checkpoint(folder)


def test_open_missing_shard_raises_checkpoint_error(sharded: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((sharded / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"shard model-00001.* is missing"):
        Checkpoint(tmp_path)


def test_open_index_naming_outside_file_raises_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"w": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its own directory"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"auto_map": {"AutoModelForCausalLM": "x.Y"}}', "auto_map"),
        ('{"quantization_config": {}}', "quantised"),
        ("[]", "JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_open_unusable_config_raises_checkpoint_error(
    tmp_path: Path, config: str, message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_open_directory_without_model_raises_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)
