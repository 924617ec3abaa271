"""A GGUF file given by its path is the dense model that its blocks stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from compressor.artifact.identity import base_identity
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.folder import resolve
from compressor.checkpoint.gguf import converted_gguf
from compressor.errors import CheckpointError
from tests.gguf_files import q8_0, write_gguf
from tests.tiny import make_tiny


@pytest.fixture
def in_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Path, Path]]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    base = make_tiny("llama", tmp_path / "base", intermediate_size=96, num_hidden_layers=1)
    return lambda: (base, write_gguf(base, tmp_path / "tiny.gguf"))


def test_gguf_file_is_read_as_the_values_of_its_blocks(
    in_gguf: Callable[[], tuple[Path, Path]],
) -> None:
    base, file = in_gguf()
    with Checkpoint(file) as checkpoint:
        original = load_file(base / "model.safetensors")
        assert set(checkpoint.tensors) == set(original)
        for key, value in original.items():
            wanted = q8_0(value) if value.ndim == 2 else value
            assert torch.equal(checkpoint.read_rows(key), wanted.bfloat16()), key
        assert checkpoint.name == "tiny"
        assert (checkpoint.path / "tokenizer.json").is_file()


def test_gguf_file_is_converted_once(in_gguf: Callable[[], tuple[Path, Path]]) -> None:
    _, file = in_gguf()
    folder = resolve(file)
    identity = base_identity(folder)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    moved = file.rename(file.with_name("moved.gguf"))
    assert converted_gguf(moved).parent == folder.parent  # known by what is in it
    assert base_identity(moved) == identity
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("keep", [3, 200, 40_000])
def test_gguf_file_that_is_cut_short_is_refused(
    in_gguf: Callable[[], tuple[Path, Path]], keep: int
) -> None:
    _, file = in_gguf()
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="GGUF file") as refused:
        resolve(file)
    assert "\n" not in str(refused.value)


def test_gguf_file_without_the_library_names_it(
    in_gguf: Callable[[], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = in_gguf()
    monkeypatch.setattr("compressor.checkpoint.gguf.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'impart-serve\[gguf\]'"):
        resolve(file)
