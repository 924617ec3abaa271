"""The GPU benchmark's script: section by section, tiny, on a CPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import load_section
from benchmarks.gpu.__main__ import run_apart
from benchmarks.gpu.engine import Engine, make_engine
from benchmarks.gpu.engine_section import serve
from benchmarks.gpu.load_section import Load
from benchmarks.gpu.random_model import write_random_delta
from benchmarks.gpu.report import Report, facts
from benchmarks.gpu.scope import SMALL
from benchmarks.gpu.shapes import Codec
from compressor.artifact.reader import read_artifact
from server.deltas.upload import SlotUploader
from server.engine.request import Request

ROOT = Path(__file__).resolve().parents[3]
# What a machine with a GPU need not have.
ABSENT = (
    
        "fastapi",
        "numba",
        "pydantic_settings",
        "prometheus_client",
        "uvicorn",
        "rich",
        "typer",
        "openai",
    "zstandard",
)  # fmt: skip


def test_engine_section_times_steps_and_loads_of_the_servers_engine(tmp_path: Path) -> None:
    scope = replace(SMALL, n_steps=2, n_loads=2)
    assert serve(scope, Report(tmp_path / "out.md"), Codec(4, 2), loads=True)
    text = (tmp_path / "out.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    decode = [row for row in rows if len(row) == 8 and row[0].strip().isdigit()]
    assert [(int(row[1]), int(row[0])) for row in decode] == scope.mixes
    loads = [row for row in rows if len(row) == 13 and row[0].strip().isdigit()]
    assert len(loads) == scope.n_loads
    for row in loads:
        read, shown, first = (float(row[i]) for i in (1, 2, 4))
        assert read <= shown <= first
    # Both places were taken, and arrays this small grow by one.
    assert [row[5].strip() for row in loads] == ["yes", "yes"]
    assert "file system is" in text


def test_rows_that_end_during_a_load_are_flagged_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cold_load = tmp_path / "out.md", load_section.cold_load

    def ended(engine: Engine, key: str, artifact: Path, others: list[Request]) -> Load:
        engine.core.abort(others[0])
        return cold_load(engine, key, artifact, others)

    monkeypatch.setattr(load_section, "cold_load", ended)
    assert not serve(SMALL, Report(out), Codec(4, 2), loads=True)
    assert "ROWS ENDED BEFORE THE LOAD" in out.read_text()
    assert not facts(out, "load")


def test_variant_that_does_not_load_ends_filling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotUploader, "copy", lambda *_, **__: 1 / 0)
    write_random_delta(SMALL.shape, Codec(4, 2), tmp_path / "delta")
    engine = make_engine(SMALL)
    with pytest.raises(RuntimeError, match="variant a of b did not load: it could not be loaded"):
        engine.fill(read_artifact(tmp_path / "delta"), ["a", "b"])
    engine.core.stop()


def test_engine_section_needs_none_of_the_absent_packages(tmp_path: Path) -> None:
    done = run_without_packages(tmp_path, "--section", "engine")
    assert done.returncode == 0, done.stderr
    assert "### Cold load" in done.stdout


def run_without_packages(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.gpu --tiny` where nothing in ABSENT can be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    (folder / "sitecustomize.py").write_text(blocked)
    out = str(folder / "results.md")
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", out, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_tiny_run_writes_every_section_and_finds_the_kernels_right(tmp_path: Path) -> None:
    done = run_without_packages(tmp_path, "--minutes", "60")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results.md").read_text()
    for part in (
        "copy bandwidth",
        "start-up check of every kernel: passed",
        "### Engine, bf16 base",
        "### Cold load",
        "blockdiag prefill",
        "All kernels within bounds",
        "### Engine, int8 base",
        "### Kernels' decoder",
        "### Prefill of 40 tokens",
        "Every section went right",
        "### Targets",
    ):
        assert part in text, part
        assert part in done.stdout, part
    assert "not measured" not in text


def test_section_that_fails_or_has_no_time_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.md"
    arguments = argparse.Namespace(tiny=True, out=out)
    assert not run_apart("device", arguments, 0.0)
    assert not run_apart("device", arguments, 0.01)
    monkeypatch.setattr(sys, "executable", "false")
    assert not run_apart("kernels", arguments, 60.0)
    monkeypatch.setattr(sys, "executable", "true")
    assert run_apart("engine", arguments, 60.0)
    lines = [line for line in out.read_text().splitlines() if line]
    beginnings = (
        "(device: CUT OFF, no time left)", "(device: CUT OFF, 0 s)",
        "(kernels: FAILED with exit status 1, ", "(engine: done, ",
    )  # fmt: skip
    assert len(lines) == len(beginnings)
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(beginning)
