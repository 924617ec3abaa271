"""Systems without what Linux has: locks, lists of mapped files, signals, C library calls."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressor import atomic
from compressor.checkpoint.files import Checkpoint
from compressor.errors import OutputError
from compressor.readable import why_unreadable
from server.deltas import background
from server.deltas.host_memory import trim_heap
from server.ops.cpu import parallel
from server.process import run
from server.process.early_stop import Stopped, stop_signals

ROOT = Path(__file__).resolve().parent.parent


def raising(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("locks", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_run_lock_without_locks_warns_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    locks: int,
) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(locks))
    with atomic.RunLock(tmp_path / "x"):
        assert "no locks here" in caplog.text
    assert os.listdir(tmp_path) == []


def test_run_lock_another_failure_of_the_lock_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(errno.EIO))
    with pytest.raises(OutputError, match="cannot lock x"), atomic.RunLock(tmp_path / "x"):
        pass


def test_sync_directory_where_directories_are_not_flushed_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "fsync", raising(errno.EINVAL))
    atomic.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", raising(errno.EIO))
    with pytest.raises(OutputError, match="cannot flush"):
        atomic.sync_directory(tmp_path)


def test_checkpoint_without_preadv_reads_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensor = torch.arange(24.0).reshape(6, 4)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.delattr(os, "preadv")
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read_rows("w", 1, 4), tensor[1:4])


def test_torch_openmp_without_a_list_of_mapped_files_is_found_beside_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = parallel.torch_openmp()
    monkeypatch.setattr(parallel, "_MAPS", tmp_path / "none")
    other = parallel.torch_openmp()
    assert found is not None
    assert other is not None
    assert other._handle == found._handle


def test_torch_openmp_name_of_macos_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    for name in ("libomp.dylib", "libtorch_cpu.dylib", "libnvpl_blas_lp64_gomp.so.0"):
        (tmp_path / "torch" / "lib" / name).touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert parallel._shipped() == [str(tmp_path / "torch" / "lib" / "libomp.dylib")]


def test_torch_openmp_library_that_is_not_loaded_stays_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parallel, "_mapped", list)
    monkeypatch.setattr(parallel, "_shipped", lambda: [str(tmp_path / "libgomp.so.1")])
    assert parallel.torch_openmp() is None


def test_parallel_without_openmp_logs_that_it_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parallel, "torch_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert parallel.Parallel().n_threads == 1
    assert "one thread" in caplog.text


def test_mapped_path_that_is_no_text_of_the_locale_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = "7f00-7f01 r-xp 0 08:01 1   /home/é x/torch/lib/libgomp.so.1\n".encode("latin-1")
    (tmp_path / "maps").write_bytes(line)
    monkeypatch.setattr(parallel, "_MAPS", tmp_path / "maps")
    assert [os.fsencode(path) for path in parallel._mapped()] == [line.split(b"   ")[1].strip()]


def test_trim_heap_where_there_is_no_such_call_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    trim_heap()


def test_lower_priority_that_is_forbidden_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "setpriority", raising(errno.EPERM))
    background.lower_priority()


async def test_signal_that_the_system_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    run._on_signal("SIGHUP", lambda: None)


async def test_signal_in_a_loop_that_cannot_wait_for_it_reaches_its_action(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cannot(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", cannot)
    before, came = signal.getsignal(signal.SIGUSR1), asyncio.Event()
    try:
        run._on_signal("SIGUSR1", came.set)
        signal.raise_signal(signal.SIGUSR1)
        await asyncio.wait_for(came.wait(), 5)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_stop_signals_without_sighup_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    with pytest.raises(Stopped), stop_signals():
        signal.raise_signal(signal.SIGTERM)


def test_why_unreadable_without_user_ids_names_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.setattr(Path, "open", raising(errno.EACCES))
    said = why_unreadable(tmp_path / "weights")
    assert said is not None
    assert "may not be read by this process's user; allow it" in said


def test_run_in_loop_without_uvloop_uses_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    async def loop_module() -> str:
        return type(asyncio.get_running_loop()).__module__

    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run.run_in_loop(loop_module()).startswith("asyncio")


def ascii_only(**more: str) -> dict[str, Any]:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return dict(os.environ) | plain | more


def test_command_in_a_locale_without_the_letters_prints_escapes() -> None:
    code = (
        "import sys; from compressor.cli import app as cli; "
        "cli.app = lambda prog_name: print('\\u00e9 \\u2192 \\U0001f600'); cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ascii_only(), capture_output=True, check=False
    )
    assert done.stdout == b"\\xe9 \\u2192 \\U0001f600\n", done.stderr


def test_help_of_both_commands_in_a_plain_locale_prints() -> None:
    for module in ("compressor", "server"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=ROOT,
            env=ascii_only(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
