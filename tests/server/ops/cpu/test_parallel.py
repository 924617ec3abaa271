"""Compiling and running kernels: threads, the cache on disk, machines without either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from server.ops.choose import choose_kernels
from server.ops.cpu import compile as compile_module
from server.ops.cpu import parallel
from server.ops.cpu.codegen.intrinsics import i64_at, next_task
from server.ops.cpu.compile import cache_folder, compile_kernel
from server.ops.cpu.parallel import Kernel, Parallel
from server.ops.kernels import TorchKernels

CPU = torch.device("cpu")


def mark_tasks(address):  # type: ignore[no-untyped-def]
    """Add 1 to the place of each task: arguments are the counter, n, an address."""
    a = i64_at(address)
    marks = i64_at(a[np.uint64(2)])
    while True:
        task = next_task(address)
        if task >= a[np.uint64(1)]:
            break
        marks[np.uint64(task)] += 1


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return compile_kernel(mark_tasks)


def run(kernel: Kernel, runner: Parallel, n: int) -> np.ndarray:
    marks = np.zeros(n, np.int64)
    runner.run(kernel, np.array([-1, n, marks.ctypes.data]), n)
    return marks


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_parallel_every_task_runs_exactly_once(kernel: Kernel, n: int) -> None:
    for _ in range(20):
        assert (run(kernel, Parallel(), n) == 1).all()


def test_parallel_without_openmp_runs_on_one_thread(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "torch_openmp", lambda: None)
    runner = Parallel()
    assert runner.n_threads == 1
    assert (run(kernel, runner, 50) == 1).all()


def test_compile_kernel_cache_that_cannot_be_written_compiles_anyway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (run(compile_kernel(mark_tasks), Parallel(), 5) == 1).all()
    monkeypatch.setattr(compile_module, "_private_root", lambda: None)
    assert (run(compile_kernel(mark_tasks), Parallel(), 5) == 1).all()


def test_cache_folder_depends_on_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache_folder()
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: read(p) + (b"#" if p.name == "vectors.py" else b"")
    )
    assert cache_folder() != before


def test_choose_kernels_half_precision_on_the_cpu_is_plain_torch() -> None:
    assert isinstance(choose_kernels("auto", CPU, torch.float16), TorchKernels)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        choose_kernels("numba", CPU, torch.float16)


def test_choose_kernels_numba_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.ops.choose.find_spec", lambda name: None)
    assert isinstance(choose_kernels("auto", CPU, torch.float32), TorchKernels)
    assert "pip install numba" in caplog.text
    with pytest.raises(ValueError, match="pip install numba"):
        choose_kernels("numba", CPU, torch.float32)


def test_choose_kernels_triton_off_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="CUDA devices only"):
        choose_kernels("triton", CPU, torch.float32)
