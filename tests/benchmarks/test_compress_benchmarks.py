"""Merging and speed: what the scripts count, on artifacts and pairs of a few kilobytes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import compress_speed, merge
from benchmarks.compress_memory import Sizes, make_pair, parameter_shapes
from compressor.checkpoint.layout import read_layout
from tests.tiny import make_tiny, perturb


def test_speed_measures_one_matrix_of_each_shape_the_model_has(tmp_path: Path) -> None:
    sizes = Sizes(layers=1, hidden=32, intermediate=112, vocabulary=64)
    make_pair(tmp_path / "base", tmp_path / "tuned", sizes)
    names = read_layout(tmp_path / "base").parameters
    assert compress_speed.MATRICES.keys() <= names.keys()
    whole = dict(parameter_shapes(compress_speed.SIZES))
    matrices = {name: shape for name, shape in whole.items() if len(shape) == 2}
    measured = {matrices[name] for name in compress_speed.MATRICES}
    assert measured == set(matrices.values())
    n_layers = compress_speed.LAYERS
    for name, count in compress_speed.MATRICES.items():
        same = sum(shape == matrices[name] for shape in matrices.values())
        assert count == (2 if "embed" in name else same * n_layers)


def test_merge_measures_controls_and_every_merge_once(tmp_path: Path) -> None:
    base = make_tiny("llama", tmp_path / "base", seed=1)
    tuned = perturb(base, tmp_path / "tuned", seed=2)
    data = tmp_path / "test.csv"
    data.write_text("text,category\n" + "".join(f"t{i},c_{i}\n" for i in range(4)))
    out = tmp_path / "rows.csv"
    arguments = ["--base", str(base), "--task", f"intent={tuned},{data}", "--out", str(out)]
    arguments += ["--items", "3"]
    assert merge.main(arguments) == 0
    rows = merge.read_rows(out)
    assert [(row["model"], row["mask"]) for row in rows] == [
        ("base", ""), ("intent", ""), ("ta", "none"), ("ties", "none"), ("ta", "dare"),
        ("ties", "dare"), ("ta", "impart"), ("ties", "impart"),
    ]  # fmt: skip
    kl = {(row["model"], row["mask"]): float(row["kl"]) for row in rows}
    assert kl["intent", ""] == 0
    assert kl["ta", "dare"] > 0
    assert kl["ta", "none"] < 1e-3 * kl["base", ""]  # one model, lambda 1: the fine-tune, rounded
    before = out.read_bytes()
    assert merge.main(arguments) == 0
    assert out.read_bytes() == before


def test_merge_weights_are_one_for_each_task() -> None:
    options = argparse.Namespace(task=["a=x,y", "b=x,y"], weight=[1.0, 0.5, 2.0])
    with pytest.raises(SystemExit, match="2 tasks"):
        merge.check_weights(options)
