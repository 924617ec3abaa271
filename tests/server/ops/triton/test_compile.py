"""Every kernel becomes machine code for a GPU that is not here, at Llama-3-8B shapes.

The interpreter accepts what the compiler does not (a name that changes its type, a tile that does
not fit the registers); this is the check that needs no device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[4]
KERNELS = {
    *("rope", "rms_norm", "silu_mul", "attend", "combine", "prefill", "blockdiag"),
    *("shrink", "expand", "packed_shrink", "linear", "parts", "rank"),
}


def compile_all(cache: Path, *options: str) -> list[tuple[int, int, str]]:
    """Registers, spilled bytes and name of every kernel compiled."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.offline", *options],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split(",") for line in done.stdout.splitlines() if line.startswith("sm_")]
    return [(int(row[3]), int(row[4]), row[1]) for row in found]


def test_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    found = compile_all(tmp_path, "--few")
    assert {name for _, _, name in found} == KERNELS
    assert [entry for entry in found if entry[1]] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_every_width_compiles_for_other_devices(tmp_path: Path, arch: int) -> None:
    found = compile_all(tmp_path, "--arch", str(arch))
    assert {name for _, _, name in found} == KERNELS
