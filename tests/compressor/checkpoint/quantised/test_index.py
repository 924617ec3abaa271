"""Tensors of quantised weights that do not fit together are refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.headers import slice_name
from compressor.checkpoint.quantised.index import dense_tensors
from compressor.errors import CheckpointError
from tests.compressor.checkpoint.quantised.schemes import SCHEMES
from tests.quantised import Parts, quantise
from tests.quantised_floats import pack_mxfp4, unpack_mxfp4
from tests.tiny import make_tiny

Q = "model.layers.0.self_attn.q_proj"
Change = Callable[[Parts], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("index") / "base", num_hidden_layers=1)


def changed(base: Path, out: Path, scheme: str, change: Change) -> Path:
    folder = quantise(base, out, SCHEMES[scheme])
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def instead(name: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("scheme", "change", "says"),
    [
        ("gptq-4", without(f"{Q}.qzeros"), "q_proj.qzeros is missing"),
        ("gptq-4", without(f"{Q}.scales"), "q_proj.scales is missing"),
        ("gptq-4-act-order-asymmetric", without(f"{Q}.g_idx"), "without .*q_proj.g_idx"),
        ("gptq-4", instead(f"{Q}.g_idx", torch.zeros(63).int()), r"shape \[63\] instead of \[64\]"),
        ("gptq-4", instead(f"{Q}.scales", torch.ones(4, 63)), "beside 64 outputs"),
        ("gptq-4", instead(f"{Q}.scales", torch.ones(3, 64)), "q_proj"),
        ("gptq-4", instead(f"{Q}.qweight", torch.ones(8, 64)), "stored as F32 instead of I32"),
        ("gptq-4", instead(f"{Q}.weight", torch.ones(64, 64)), "stored quantised and as it is"),
        ("gptq-4", instead("x.weight", torch.ones(8, 8).to(torch.int8)), "stored as I8 without"),
        ("awq", instead(f"{Q}.qzeros", torch.ones(4, 7).int()), r"instead of \[4, 8\]"),
        ("awq", instead(f"{Q}.scales", torch.ones(2, 64)), "q_proj"),
        ("fp8-blocks", without(f"{Q}.weight_scale_inv"), "q_proj.weight_scale is missing"),
        ("fp8-blocks", instead(f"{Q}.weight_scale_inv", torch.ones(2, 1)), "beside 64 rows"),
        ("fp8-tensor", without(f"{Q}.weight_scale"), "q_proj.weight_scale is missing"),
        ("packed-4", instead(f"{Q}.weight_shape", torch.tensor([64, 65])), "words a row"),
        ("packed-4", instead(f"{Q}.weight_shape", torch.tensor([1 << 40, 64])), "beside 64 out"),
        ("packed-4", instead(f"{Q}.weight_scale", torch.ones(64, 3)), "3 groups for 64 inputs"),
        ("packed-4-asymmetric", without(f"{Q}.weight_zero_point"), "zero_point is missing"),
        ("bnb-int8", instead(f"{Q}.weight_format", torch.tensor(1).byte()), "order of elements"),
        ("bnb-nf4-nested", without(f"{Q}.weight.nested_absmax"), "nested_absmax is missing"),
        (
            "bnb-fp4",
            instead(f"{Q}.weight.quant_state.bitsandbytes__fp4", torch.ones(9).byte()),
            "does not parse",
        ),
        (
            "bnb-fp4",
            instead(
                f"{Q}.weight.quant_state.bitsandbytes__fp4",
                torch.tensor(list(b'{"shape": [64, 65], "blocksize": 32}')).byte(),
            ),
            "takes 2048 bytes",
        ),
        (
            "bnb-fp4",
            instead(f"{Q}.weight.quant_state.bitsandbytes__fp4", torch.ones(1 << 17).byte()),
            "more than such a tensor has",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    base: Path, tmp_path: Path, scheme: str, change: Change, says: str
) -> None:
    folder = changed(base, tmp_path / "q", scheme, change)
    with pytest.raises(CheckpointError, match=says) as refused:
        Checkpoint(folder)
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match=says):
        dense_tensors(folder)


@pytest.mark.parametrize(
    ("scheme", "change", "says"),
    [
        ("gptq-4", instead(f"{Q}.g_idx", torch.full((64,), 4).int()), "group beyond the 4"),
        ("gptq-4", instead(f"{Q}.g_idx", torch.full((64,), -1).int()), "group beyond the 4"),
        ("fp8-tensor", instead(f"{Q}.weight_scale", torch.tensor(float("nan"))), "not finite"),
        ("gptq-4", instead(f"{Q}.scales", torch.full((4, 64), 3e4)), "not finite in torch.float16"),
    ],
)
def test_values_that_cannot_be_are_refused_when_they_are_read(
    base: Path, tmp_path: Path, scheme: str, change: Change, says: str
) -> None:
    folder = changed(base, tmp_path / "q", scheme, change)
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=says):
        checkpoint.read_rows(f"{Q}.weight")


def test_scales_of_activations_and_caches_are_left_out(base: Path, tmp_path: Path) -> None:
    extra = {f"{Q}.input_scale": torch.ones(()), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    folder = changed(base, tmp_path / "q", "fp8-blocks", lambda tensors: tensors.update(extra))
    assert set(dense_tensors(folder)) == set(load_file(base / "model.safetensors"))


@pytest.mark.parametrize("group_size", [-1, 64])
def test_gptq_with_one_group_reads_one_scale_an_output(
    base: Path, tmp_path: Path, group_size: int
) -> None:
    def one_group(tensors: Parts) -> None:
        for name in [name for name in tensors if name.endswith(("scales", "qzeros"))]:
            tensors[name] = tensors[name][:1].clone()
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    folder = changed(base, tmp_path / "q", "gptq-4", one_group)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = group_size
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    word = int(stored[f"{Q}.qweight"][2, 5]) & 0xFFFFFFFF
    with Checkpoint(folder) as checkpoint:
        found = checkpoint.read_rows(f"{Q}.weight")[5, 16 + 3]
    assert found == ((word >> 12 & 15) - 8) * stored[f"{Q}.scales"][0, 5]


def test_experts_in_mxfp4_are_read_whole_and_one_by_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks, scales = pack_mxfp4(torch.randn(3, 64, 5, generator=generator))
    wanted = unpack_mxfp4(blocks, scales).bfloat16()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    config = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors[name].shape == (3, 64, 5)
        assert torch.equal(checkpoint.read_rows(name), wanted)
        assert torch.equal(checkpoint.read_rows(slice_name(name, 2), 3, 40), wanted[2, 3:40])
        with pytest.raises(CheckpointError, match="asks for a matrix number 3"):
            checkpoint.read_rows(slice_name(name, 3))
