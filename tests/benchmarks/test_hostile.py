"""The benchmark of hostile input: its artifacts and its table; no server is started."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.hostile import (
    TEMPLATES,
    Felt,
    attacks,
    extra,
    loop_cpu_s,
    row,
    write_artifacts,
)
from compressor.artifact.reader import read_artifact
from tests.compressor.artifacts import write_artifact
from tests.tiny import make_tiny


def test_hostile_artifacts_are_whole_and_of_different_digests(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    (tmp_path / "made").mkdir()
    write_artifact(tmp_path / "made" / "one")
    (tmp_path / "hostile").mkdir()
    write_artifacts(tmp_path / "made", base, tmp_path / "hostile")
    made = {path.name: read_artifact(path) for path in (tmp_path / "hostile").iterdir()}
    assert made.keys() == {*TEMPLATES, "tokenizer"}
    assert len({artifact.digest for artifact in made.values()}) == len(made)
    record = json.loads(made["tokenizer"].aux["tokenizer.json"])
    record["added_tokens"] = record["added_tokens"][:9]  # all of them take seconds
    Tokenizer.from_str(json.dumps(record))


def test_row_says_what_was_felt_and_whether_the_server_died() -> None:
    answers = Counter({"200": 2, "no answer": 1})
    felt = Felt([0.02] * 9, [0.02, 1.5], [0.1, 3.0], 1, 2_000_000, answers, 0.25)
    cells = [cell.strip() for cell in row("an attack", "here", felt).strip("|").split("|")]
    assert cells[:3] == ["an attack", "here", "20 / 20"]
    assert cells[3].endswith("/ 1500")
    assert cells[4:] == ["0.25", "1 of 2, 3.0 s", "2", "2 x 200, 1 x no answer"]
    dead = Felt([0.02], [0.02], [], 0, 0, Counter(), lived_s=2.0)
    assert "**died** after 2.0 s" in row("an attack", "here", dead)


def test_time_of_the_loop_is_told_beyond_its_quiet_pace() -> None:
    assert extra((0, 4, 6), (1.0, 1.4, 2.1)) == pytest.approx(0.5)
    assert extra((0, 4, 6), (1.0, None, 2.1)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_time_of_the_loop_is_that_of_the_first_thread() -> None:
    used_s = loop_cpu_s(os.getpid())
    assert used_s is not None
    assert 0 < used_s < sum(os.times()[:2]) + 60
    assert loop_cpu_s(2**22 + 1) is None


def test_attacks_have_names_that_tell_them_apart() -> None:
    names = list(attacks())
    assert len(names) == 9
    assert not any(one in other for one in names for other in names if one != other)
