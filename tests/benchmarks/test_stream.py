"""Gaps of a stream, and artifacts that are changed and sealed again."""

from __future__ import annotations

from pathlib import Path

from benchmarks.stream import gaps_between, replace_files
from compressor.artifact.reader import read_artifact
from tests.compressor.artifacts import write_artifact


def test_gaps_are_those_that_overlap_the_phase() -> None:
    arrivals = [0.0, 1.0, 3.0, 6.0, 10.0]
    assert gaps_between(arrivals, 2.0, 5.0) == [2.0, 3.0]
    assert gaps_between(arrivals, 3.0, 6.0) == [3.0]
    assert gaps_between(arrivals, 20.0, 30.0) == []


def test_replaced_files_are_sealed(tmp_path: Path) -> None:
    write_artifact(tmp_path / "one")
    before = read_artifact(tmp_path / "one")
    replace_files(tmp_path / "one", {"chat_template.jinja": b"{{ 1 }}", "merges.txt": b""})
    after = read_artifact(tmp_path / "one")
    assert after.aux["chat_template.jinja"] == b"{{ 1 }}"
    assert after.aux["merges.txt"] == b""
    assert after.digest != before.digest
