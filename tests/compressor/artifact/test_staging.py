"""Parts on disk: found again by key, replaced, verified, and never kept decoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.artifact.staging import StagedDeltas, Staging
from compressor.atomic import write_new
from compressor.codecs import DenseRows, TensorDelta
from compressor.errors import OutputError
from tests.compressor.artifacts import deltas, same_delta


def vector(name: str, value: float, size: int = 5) -> TensorDelta:
    return TensorDelta(name, (size,), (size,), False, (), DenseRows(0, torch.full((size,), value)))


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "parts", "run")


def test_staged_tensor_reads_back_as_it_was_added(staging: Staging) -> None:
    for delta in deltas():
        staged = staging.add(delta.name, delta, 0.25)
        assert staging.find(delta.name) == staged
        same_delta(staged.read(), delta)
        assert staged.entry.error == 0.25
        raw = {key: b"".join(staged.chunks(key)) for key in staged.parts}
        assert sum(map(len, raw.values())) == staged.n_bytes
        if delta.exact is not None:
            assert (
                raw["exact"] == delta.exact.values.contiguous().view(torch.uint8).numpy().tobytes()
            )


def test_add_under_a_known_key_replaces_the_part(staging: Staging) -> None:
    first = staging.add("key", vector("a", 1.0))
    second = staging.add("key", vector("a", 2.0))
    assert staging.find("key") == second
    assert not first.path.exists()
    again = staging.add("key", vector("a", 2.0))
    assert again == second
    assert again.path.exists()
    assert len(staging) == 1


def test_another_run_of_the_same_key_finds_what_is_whole(tmp_path: Path) -> None:
    first = Staging(tmp_path / "parts", "run")
    kept, torn = (first.add(name, vector(name, 1.0)) for name in "ab")
    torn.path.write_bytes(torn.path.read_bytes()[:-1])
    write_new(tmp_path / "parts" / "half.tmp", [b"what a kill left"])
    second = Staging(tmp_path / "parts", "run")
    assert second.find("a") == kept
    assert second.find("b") is None
    assert sorted(p.suffix for p in (tmp_path / "parts").iterdir()) == ["", ".part"]


@pytest.mark.parametrize(("run_key", "resume"), [("other", True), ("run", False)])
def test_another_run_starts_afresh(tmp_path: Path, run_key: str, resume: bool) -> None:
    Staging(tmp_path / "parts", "run").add("a", vector("a", 1.0))
    assert len(Staging(tmp_path / "parts", run_key, resume=resume)) == 0


def test_part_that_shrinks_while_it_is_copied_raises(staging: Staging) -> None:
    staged = staging.add("a", vector("a", 1.0))
    staged.path.write_bytes(staged.path.read_bytes()[:-4])
    with pytest.raises(OutputError, match="part of a was cut short"):
        b"".join(staged.chunks("exact"))


def test_staged_deltas_read_at_each_access_and_changes_stand_for_them(staging: Staging) -> None:
    found = StagedDeltas([staging.add(name, vector(name, 1.0)) for name in "ab"])
    assert found["a"] is not found["a"]
    changed = found.with_changes({"b": vector("b", 7.0)})
    assert list(changed) == ["a", "b"]
    same_delta(changed["a"], found["a"])
    same_delta(changed["b"], vector("b", 7.0))
    same_delta(found["b"], vector("b", 1.0))
    both = changed.with_changes({"a": replace(vector("a", 3.0))})
    same_delta(both["b"], vector("b", 7.0))
    same_delta(both["a"], vector("a", 3.0))
    assert len(StagedDeltas(changed={"x": vector("x", 0.0)})) == 1
