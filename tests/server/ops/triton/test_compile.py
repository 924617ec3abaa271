"""Every kernel becomes machine code for a GPU that is not here, at Llama-3-8B shapes.

The interpreter accepts what the compiler does not (a name that changes its type, a tile that does
not fit the registers); this is the check that needs no device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[4]
KERNELS = {
    "rope", "rms_norm", "silu_mul", "attend", "combine", "prefill", "blockdiag",
    "shrink", "expand", "packed_shrink", "linear", "parts", "rank",
}  # fmt: skip


def python(cache: Path, *arguments: str) -> list[str]:
    """Lines that Python prints with the compiler instead of the interpreter; it succeeds."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def compile_all(cache: Path, *options: str) -> list[tuple[int, int, str]]:
    """Registers, spilled bytes and name of every kernel compiled."""
    lines = python(cache, "-m", "benchmarks.gpu.offline", *options)
    found = [line.split(",") for line in lines if line.startswith("sm_")]
    return [(int(row[3]), int(row[4]), row[1]) for row in found]


# Several in one process, which takes longer to start than to compile: a line of JSON for each.
START_UP = """
import json
import sys
import torch
from benchmarks.gpu.offline import compiling
from server.ops.triton.kernels import TritonKernels
from server.ops.selfcheck import cases

cpu, kernels = torch.device("cpu"), TritonKernels(torch.device("cpu"))
for arch, dtype, *wanted in map(json.loads, sys.argv[1:]):
    with compiling(arch) as found, torch.inference_mode():
        for name, run in cases(cpu, getattr(torch, dtype)):
            if "float8" in name and arch < 89 or wanted and name not in wanted:
                continue
            seen = len(found)
            run(kernels)
            for kernel in found[seen:]:
                print(arch, kernel.name, kernel.spilled_bytes, kernel.shared_bytes, sep=",")
"""
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}  # a program's, at most
SPILLED_BYTES = 1024  # a thread's: reserved for all threads of the device, not for those that run


def compile_start_up(cache: Path, *wanted: tuple[int | str, ...]) -> list[str]:
    """What the server's check at start launches: architecture, dtype, cases (else all)."""
    return in_bounds(cache, START_UP, *wanted)


def in_bounds(cache: Path, script: str, *wanted: tuple[int | str, ...]) -> list[str]:
    """What a script compiles, a line a kernel, each with no more spills and shared memory than
    there may be.
    """
    lines = python(cache, "-c", script, *map(json.dumps, wanted))
    for line in lines:
        arch, _, spilled, shared = line.split(",")
        assert int(spilled) <= SPILLED_BYTES, line
        assert int(shared) <= SHARED_BYTES[int(arch)], line
    return lines


LARGE_HEADS = """
import json
import sys
import torch
from benchmarks.gpu.offline import compiling
from server.ops.attention import PrefillChunk
from server.ops.triton.attention import paged_decode
from server.ops.triton.prefill import paged_prefill_, prefill_tiles

options = {"scale": 0.1, "window": 4096, "softcap": 50.0}
for arch, dim, name in map(json.loads, sys.argv[1:]):
    dtype = getattr(torch, name)
    q = torch.zeros(100, 8, dim, dtype=dtype)
    caches = torch.zeros(2, 8, 16, 4, dim, dtype=dtype)
    kv_blocks = torch.zeros(8, dtype=torch.int64)
    tiles = prefill_tiles([PrefillChunk(0, 100, 0, kv_blocks)], torch.device("cpu"), dtype)
    with compiling(arch) as found:
        paged_prefill_(torch.empty_like(q), q, caches[0], caches[1], tiles, **options)
        table, lengths = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        paged_decode(q[:4], caches[0], caches[1], table, lengths, **options)
    for kernel in found:
        print(arch, kernel.name, kernel.spilled_bytes, kernel.shared_bytes, sep=",")
"""


def test_attention_of_large_heads_fits(tmp_path: Path) -> None:
    wanted = [(89, 256, "bfloat16"), (90, 128, "float32"), (90, 256, "float32")]
    found = in_bounds(tmp_path, LARGE_HEADS, *wanted)
    assert sum(line.startswith("89,") for line in found) >= 2
    assert sum(line.startswith("90,") for line in found) >= 4


def test_float8_base_and_float32_deltas_compile(tmp_path: Path) -> None:
    wanted = [(90, "bfloat16", "float8 linear"), (90, "float32", "blockdiag 4 bit")]
    assert len(compile_start_up(tmp_path, *wanted, (90, "float32", "float8 linear"))) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_start_up_check_compiles_in_every_dtype(tmp_path: Path, arch: int, dtype: str) -> None:
    assert len(compile_start_up(tmp_path, (arch, dtype))) > 30


def test_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    found = compile_all(tmp_path, "--few")
    assert {name for _, _, name in found} == KERNELS
    assert [entry for entry in found if entry[1]] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_every_width_compiles_for_other_devices(tmp_path: Path, arch: int) -> None:
    found = compile_all(tmp_path, "--arch", str(arch))
    assert {name for _, _, name in found} == KERNELS
