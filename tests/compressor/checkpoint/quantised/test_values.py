"""Every stored form gives, bit for bit, the matrix that its element-by-element reader gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.quantised.values import unpack
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
from tests.quantised import is_packed, quantise
from tests.tiny import make_tiny

LOOPED = ("k_proj.weight", "down_proj.weight")  # two shapes of the seven matrices


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "base"
    return make_tiny("qwen2", folder, num_hidden_layers=1, intermediate_size=96)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_dequantised_weights_equal_an_element_loop(
    base: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    scheme = SCHEMES[name]
    folder = quantise(base, tmp_path / "q", scheme, dtype)
    stored = load_file(folder / "model.safetensors")
    original = load_file(base / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(original)
        assert "quantization_config" not in checkpoint.config
        for key in original:
            read = checkpoint.read_rows(key)
            assert checkpoint.tensors[key].shape == tuple(original[key].shape)
            assert checkpoint.tensors[key].n_bytes == read.numel() * read.itemsize
            if is_packed(key) and not key.endswith(LOOPED):
                continue
            wanted = scheme.unpack(key, stored) if is_packed(key) else stored[key]
            assert torch.equal(read, wanted.to(getattr(torch, dtype))), key
            assert read.dtype == checkpoint.dtype(key)


@pytest.mark.parametrize("name", ["gptq-3", "awq", "fp8-blocks"])
def test_rows_and_blocks_of_a_dequantised_matrix_are_parts_of_it(
    base: Path, tmp_path: Path, name: str
) -> None:
    folder = quantise(base, tmp_path / "q", SCHEMES[name])
    key = "model.layers.0.mlp.down_proj.weight"
    with Checkpoint(folder) as checkpoint:
        whole = checkpoint.read_rows(key)
        rows = checkpoint.read_rows(key, 3, 9)
        assert torch.equal(rows, whole[3:9])
        rows.zero_()  # what was read is the caller's own
        assert torch.equal(checkpoint.read_rows(key), whole)
        assert torch.equal(checkpoint.slice(key, 5, 50, 7, 20), whole[5:50, 7:20].float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 37])
def test_unpack_takes_each_element_from_its_bits(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits * count)
    n_words = -(-count * bits // 32)
    words = torch.randint(-(1 << 31), 1 << 31, (2, n_words), generator=generator).int()
    for row, found in zip(words.tolist(), unpack(words, bits, count).tolist(), strict=True):
        text = "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in row)
        assert found == [int(text[i * bits : (i + 1) * bits][::-1], 2) for i in range(count)]
