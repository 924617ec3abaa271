"""The cold load benchmark: its copies, its gaps and its table; no server is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cold_loads import Round, copy_artifacts, table
from compressor.artifact.reader import read_artifact
from tests.compressor.artifacts import same_delta, write_artifact


def test_copies_are_whole_artifacts_of_different_digests(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    write_artifact(tmp_path / "made" / "one")
    (tmp_path / "copies").mkdir()
    names = copy_artifacts(tmp_path / "made", tmp_path / "copies", 3)
    original = read_artifact(tmp_path / "made" / "one")
    copies = [read_artifact(tmp_path / "copies" / name) for name in names]
    assert len({original.digest, *(copy.digest for copy in copies)}) == 4
    for copy in copies:
        for got, want in zip(copy.tensors, original.tensors, strict=True):
            same_delta(got, want)


def test_table_has_every_round_and_medians_of_ratios() -> None:
    def measured(cold_s: float) -> Round:
        return Round({"quiet": [0.02] * 5, "cold": [cold_s] * 5, "warm": [0.04] * 5}, 0.5, 2.0)

    lines = table({"main": [measured(s) for s in (0.02, 0.06, 0.04)]}).splitlines()
    assert len(lines) == 2 + 3 + 1
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[0] == "**main**"
    assert [float(cell) for cell in cells[6:8]] == pytest.approx([2.0, 1.0])
    assert cells[8] == "0.50 / 2.00"
