"""The GPU benchmark's script from end to end, tiny, under the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_tiny_run_prints_every_section_and_finds_the_kernels_right() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "copy bandwidth",
        "blockdiag prefill",
        "int8 base",
        "### Prefill",
        "### Cold load",
    ):
        assert part in done.stdout, part
    assert "WRONG" not in done.stdout
