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

from benchmarks.gpu.__main__ import run_apart
from benchmarks.gpu.engine_section import serve
from benchmarks.gpu.plan import SMALL
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import Codec

ROOT = Path(__file__).resolve().parents[3]
# What a machine with a GPU need not have.
ABSENT = ("fastapi", "numba", "pydantic", "prometheus_client", "uvicorn", "rich", "typer", "openai")


def test_engine_section_times_steps_and_loads_of_the_servers_engine(tmp_path: Path) -> None:
    plan = replace(SMALL, n_steps=2, n_loads=2)
    assert serve(plan, Report(tmp_path / "out.md"), Codec(4, 2), loads=True)
    text = (tmp_path / "out.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    decode = [row for row in rows if len(row) == 6 and row[0].strip().isdigit()]
    assert [(int(row[1]), int(row[0])) for row in decode] == plan.mixes
    loads = [row for row in rows if len(row) == 11 and row[0].strip().isdigit()]
    assert len(loads) == plan.n_loads
    for row in loads:
        read, shown, first = (float(cell) for cell in row[1:4])
        assert read <= shown <= first


@pytest.mark.slow
def test_tiny_run_writes_every_section_and_finds_the_kernels_right(tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "60", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text()
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
    ):
        assert part in text, part
        assert part in done.stdout, part


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
        *("(device: CUT OFF, no time left)", "(device: CUT OFF, 0 s)"),
        *("(kernels: FAILED with exit status 1, ", "(engine: done, "),
    )
    assert len(lines) == len(beginnings)
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(beginning)
