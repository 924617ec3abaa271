"""Heavy differences are told as such, whatever the codec; so are random weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from compressor.artifact.config import TensorEntry
from compressor.checkpoint.files import Checkpoint
from compressor.checkpoint.pairing import is_unchanged, pair_tensors, to_store
from compressor.compress.options import Options
from compressor.compress.pipeline import compress
from compressor.measure.heaviness import heavy_warnings, mean_error, relative_change
from tests.tiny import make_tiny, perturb


def test_relative_change_of_small_matrices_is_that_of_all(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned", scale=0.3)
    with Checkpoint(base) as b, Checkpoint(tuned) as t:
        pairs = [to_store(t, p, unchanged=is_unchanged(b, t, p)) for p in pair_tensors(b, t).pairs]
        found = relative_change(b, t, [pair for pair in pairs if pair is not None])
    ours, theirs = (load_file(path / "model.safetensors") for path in (base, tuned))
    matrices = [name for name in ours if ours[name].ndim == 2]
    wanted = sum(float((theirs[n] - ours[n]).double().square().sum()) for n in matrices)
    whole = sum(float(ours[n].double().square().sum()) for n in matrices)
    assert found == pytest.approx(math.sqrt(wanted / whole), rel=0.05)


def test_mean_error_is_weighted_by_elements() -> None:
    entries = [
        TensorEntry("a", (2, 3), (2, 3), error=1.0),
        TensorEntry("b", (2, 1), (2, 1), error=5.0),
        TensorEntry("c", (9,), (9,)),
    ]
    assert mean_error(entries) == 2.0
    assert mean_error([]) == 0.0


@pytest.mark.parametrize(
    ("change", "error", "kl_share", "words"),
    [
        (0.02, 3.0, None, []),
        (0.1, 3.0, None, ["too heavy"]),
        (0.1, 3.0, 0.01, []),
        (0.01, 0.1, 0.3, ["too heavy"]),
        (1.4, 0.0, None, ["random weights"]),
        (1.4, 3.0, None, ["random weights", "too heavy"]),
    ],
)
def test_heavy_warnings_say_what_is_heavy(
    change: float, error: float, kl_share: float | None, words: list[str]
) -> None:
    found = list(heavy_warnings(change, error, kl_share))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize(("codec", "ratio"), [("blockdiag", 16), ("impart", 16), ("lowrank", 8)])
def test_compress_random_weights_are_told(codec: str, ratio: float, tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base")
    other = make_tiny("llama", tmp_path / "other", seed=5)
    made = compress(base, other, tmp_path / "delta", Options(codec=codec, ratio=ratio))
    assert any("random weights" in note for note in made.notes)
    assert any("too heavy" in note for note in made.notes)
