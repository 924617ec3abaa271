"""A base that stores experts one by one and a fine-tune that stores them together, and the reverse.

transformers loads either form into the same parameters: it is the oracle.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint.expert_rows import PartRows, expert_parts
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import empty_model
from compressor.checkpoint.pairing import pair_tensors
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.errors import CheckpointError, UnsupportedTensor
from compressor.export.reconstruct import reconstruct
from tests.compressor.checkpoint.test_layout import logits, make

OPTIONS = Options(codec="lowrank", codec_options={"bits": 32}, ratio=2)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_stored_in_two_forms_come_back(kind: str, whole: bool, tmp_path: Path) -> None:
    make(kind, tmp_path / "base", whole=whole)
    tuned = make(kind, tmp_path / "tuned", change=0.02, whole=not whole)
    delta = compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", OPTIONS).path
    out = reconstruct(tmp_path / "base", delta, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-3, atol=1e-3)
    same = load_file(out / "model.safetensors").keys()
    assert same == load_file(tmp_path / "base" / "model.safetensors").keys()


def test_expert_parts_are_the_rows_that_saving_takes_apart(tmp_path: Path) -> None:
    """gate and up lie one below the other; where nothing is taken apart there are no parts."""
    make("mixtral", tmp_path / "m", whole=True)
    model = empty_model(tmp_path / "m")
    parts = expert_parts(model, "model.layers.1.mlp.experts.gate_up_proj", 4, 96)
    inner = "model.layers.1.block_sparse_moe.experts.2"
    assert parts[f"{inner}.w1.weight"] == PartRows(2, 0, 48)
    assert parts[f"{inner}.w3.weight"] == PartRows(2, 48, 96)
    assert len(parts) == 8
    make("gpt_oss", tmp_path / "g")
    assert not expert_parts(
        empty_model(tmp_path / "g"), "model.layers.1.mlp.experts.gate_up_proj", 4, 32
    )


def test_rows_of_composed_tensors_are_those_of_their_pieces(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    first, second = (f"model.layers.0.block_sparse_moe.experts.1.w{n}.weight" for n in (1, 3))
    whole = torch.cat([stored[first][8:20], stored[second][:7]])
    with Checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.compose("x", [(first, 8, 20), (second, 0, 7)])
        assert "x" not in checkpoint.tensors
        assert checkpoint.tensors["x"].shape == whole.shape
        for start in range(19):
            for end in range(start, 20):
                assert torch.equal(checkpoint.read_rows("x", start, end), whole[start:end])
        assert torch.equal(checkpoint.slice("x", 3, 15, 2, 9), whole[3:15, 2:9])
        with pytest.raises(CheckpointError, match=r"w2.*does not fit beside"):
            checkpoint.compose("y", [(first, 0, 4), (second.replace("w3", "w2"), 0, 4)])


def test_forms_without_a_rule_between_them_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("mixtral", tmp_path / "base")
    make("mixtral", tmp_path / "tuned", change=0.1, whole=True)
    monkeypatch.setattr("compressor.checkpoint.expert_rows.expert_parts", lambda *_: {})
    with (
        Checkpoint(tmp_path / "base") as b,
        Checkpoint(tmp_path / "tuned") as t,
        pytest.raises(
            UnsupportedTensor, match=r"experts.*stored like this in the.*save_pretrained"
        ),
    ):
        pair_tensors(b, t)


def test_expert_that_one_form_lacks_is_refused(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "base", whole=True)
    make("mixtral", tmp_path / "tuned", change=0.1)
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, file, {"format": "pt"})
    with (
        Checkpoint(tmp_path / "base") as b,
        Checkpoint(tmp_path / "tuned") as t,
        pytest.raises(CheckpointError, match=r"experts\.1\.w3\.weight is missing"),
    ):
        pair_tensors(b, t)
