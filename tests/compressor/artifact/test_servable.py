"""What no server takes is said while it is made, by the rules that a server has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.artifact.config import TensorEntry
from compressor.artifact.servable import ServedBase, check_servable, served_base
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.layout import read_layout
from compressor.errors import UnsupportedTensor
from tests.compressor.cli.test_app import impart

EMBED, HEAD = "embed.weight", "lm_head.weight"
BASE = ServedBase({EMBED, HEAD, "wpe.weight", "norm.weight"}, {EMBED}, 320)


def entry(name: str, rows: int, base_rows: int) -> TensorEntry:
    return TensorEntry(name, (rows, 8), (base_rows, 8))


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [entry(EMBED, 320, 320), entry("wpe.weight", 512, 512)],
        [entry(EMBED, 323, 320), entry(HEAD, 323, 320)],
        [entry(EMBED, 323, 320)],
    ],
)
def test_what_a_server_takes_passes(tensors: list[TensorEntry]) -> None:
    check_servable(tensors, BASE)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([entry("conv.weight", 4, 4)], "conv.weight: this server cannot give variants their own"),
        ([entry("a", 4, 4), entry("b", 4, 4)], r"a \(and 1 more\): this server"),
        ([entry("wpe.weight", 520, 512)], "can add rows for tokens only"),
        ([entry(EMBED, 323, 320), entry(HEAD, 322, 320)], "disagree on the number of added"),
        ([entry(HEAD, 323, 320)], "could be chosen but not read"),
    ],
)
def test_what_no_server_takes_is_refused_with_a_way_out(
    tensors: list[TensorEntry], says: str
) -> None:
    with pytest.raises(UnsupportedTensor, match=says):
        check_servable(tensors, BASE)


def test_served_base_of_a_checkpoint_knows_its_vocabulary(tiny_gpt2: Path) -> None:
    with Checkpoint(tiny_gpt2) as base:
        found = served_base(read_layout(base.path), base.config)
    assert found.vocabulary == 320
    assert set(found.embeddings) == {"transformer.wte.weight"}
    assert "lm_head.weight" in found.names  # of a tied weight: a variant may untie it
    assert "transformer.h.1.ln_1.bias" in found.names


@pytest.fixture(scope="module")
def longer(tiny_gpt2: Path, tiny_gpt2_ft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune with more learned positions than its base."""
    folder = Path(shutil.copytree(tiny_gpt2_ft, tmp_path_factory.mktemp("longer") / "tuned"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    old = model.transformer.wpe.weight.data
    model.transformer.wpe = torch.nn.Embedding(len(old) + 8, old.shape[1])
    model.transformer.wpe.weight.data[: len(old)] = old
    model.config.n_positions = len(old) + 8
    model.save_pretrained(folder)
    return folder


def test_compress_warns_of_what_no_server_takes(
    longer: Path, tiny_gpt2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (tiny_gpt2, longer, tmp_path / "delta", "--codec", "blockdiag", "--ratio", 8)
    code, stdout, _ = impart("compress", *arguments)
    assert code == 0
    says = "a server will refuse this artifact: transformer.wpe.weight: it has 520 rows"
    assert says in stdout
    assert says in caplog.text
    assert impart("verify", tmp_path / "delta", "--base", tiny_gpt2)[0] == 0
    assert impart("reconstruct", tiny_gpt2, tmp_path / "delta", tmp_path / "full")[0] == 0
