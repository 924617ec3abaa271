"""Counting is writing without a file; coding that does not pay is not done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressor.artifact.assembly import assemble, headers_bytes
from compressor.artifact.coded_file import decode_frames
from compressor.artifact.config import TensorEntry
from compressor.artifact.staging import StagedTensor, Staging
from compressor.artifact.tensor_file import parse_tensor_file
from compressor.codecs import DenseRows, TensorDelta
from tests.compressor.artifacts import deltas


def group_of(entry: TensorEntry, is_exact: bool) -> str:
    return "exact" if is_exact else entry.name[:1]


@pytest.fixture
def staged(tmp_path: Path) -> list[StagedTensor]:
    """Twelve tensors that code badly, and three frames' worth of one that codes well."""
    staging = Staging(tmp_path / "parts", "run")
    found = [staging.add(delta.name, delta) for delta in deltas()]
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 50, (600_000,), generator=generator).float()
    shape = (len(values),)
    large = TensorDelta("z", shape, shape, False, (), DenseRows(0, values))
    return [*found, staging.add("z", large)]


@pytest.mark.parametrize("coded", [False, True])
def test_assemble_counts_without_a_path_what_it_writes_with_one(
    staged: list[StagedTensor], tmp_path: Path, coded: bool
) -> None:
    counted = assemble(staged, group_of, None, coded=coded)
    written = assemble(staged[::-1], group_of, tmp_path / "file", coded=coded)
    raw = (tmp_path / "file").read_bytes()
    assert counted == written
    assert len(raw) == written.n_bytes
    assert written.is_coded == coded
    assert written.header_bytes == headers_bytes(staged, group_of, coded=coded)
    file = parse_tensor_file(raw)
    if coded:
        file = decode_frames(file)
    parts = {
        f"{index}.{key}": b"".join(tensor.chunks(key))
        for index, tensor in enumerate(sorted(staged, key=lambda tensor: tensor.name))
        for key in tensor.parts
    }
    assert {key: bytes(file.data[s.start : s.end]) for key, s in file.tensors.items()} == parts
    assert sum(written.raw.values()) == sum(map(len, parts.values()))


def test_assemble_coding_that_does_not_pay_writes_plain_tensors(
    staged: list[StagedTensor], tmp_path: Path
) -> None:
    few = [tensor for tensor in staged if tensor.name == "norm.weight"]
    written = assemble(few, group_of, tmp_path / "file", coded=True)
    assert not written.is_coded
    assert written == assemble(few, group_of, None, coded=False)
    assert list(parse_tensor_file((tmp_path / "file").read_bytes()).tensors) == ["0.exact"]
    forced = assemble(few, group_of, None, coded=True, always=True)
    assert forced.is_coded
    assert forced.n_bytes > written.n_bytes
