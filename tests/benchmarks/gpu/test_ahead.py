"""Kernels compiled ahead by other processes are those that a launch finds in triton's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
PARTS = ("layer", "4bit-s8")

AHEAD = f"""
from benchmarks.gpu import compile_section
from benchmarks.gpu.scope import FULL

compile_section.walks = lambda scope: ["kernels-" + part for part in {PARTS}]
if __name__ == "__main__":
    done = compile_section.compile_all(FULL, 90, 2, 500.0)
    assert not done.failures, done.failures
    print(len(done.keys), done.n_left)
"""
# What a section does, but for running the kernel.
LAUNCH = f"""
import torch, triton
from benchmarks.gpu.cases import Place
from benchmarks.gpu.offline import without_device
from benchmarks.gpu.scope import FULL
from benchmarks.gpu.specs import spec_parts

hits = []
triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
keys = set()
with without_device(90, lambda kernel: keys.add(kernel.hash)):
    for part in {PARTS}:
        for spec in spec_parts(FULL.shape, FULL.codecs, FULL.sizes)[part]:
            spec.make(Place(torch.device("cpu"), torch.bfloat16)).run()
print(len(keys), hits.count(False))
"""


def run(script: str, folder: Path) -> list[int]:
    path = folder / "script.py"
    path.write_text(script)
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.slow  # half a minute: some twenty kernels are compiled, in fresh processes
def test_launches_find_what_was_compiled_ahead(tmp_path: Path) -> None:
    n_compiled, n_left = run(AHEAD, tmp_path)
    n_launched, n_missed = run(LAUNCH, tmp_path)
    assert (n_left, n_missed) == (0, 0)
    assert n_launched == n_compiled > 10
