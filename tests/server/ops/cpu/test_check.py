"""Kernels that crash, are wrong or hang in their trial are not used, and that is said."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.ops.cpu import check, compile
from server.ops.cpu.check import (
    VERDICTS,
    passed_kernels,
    try_kernels,
    untried_kernels,
    usable_kernels,
    wanted_kernels,
)
from server.ops.cpu.check_child import END_WITH_STDIN, deviations, find_problem
from server.ops.cpu.compile import cache_folder, cache_key
from server.ops.cpu.features import Target, host_target
from server.ops.cpu.kernels import NumbaKernels
from server.process.early_stop import Stopped, stop_signals
from tests.server.ops.cpu.kinds import KINDS, kind

# A child that does to each kernel what the table says, and writes down that it was started.
CHILD = """
import json, os, signal, sys, time
how = json.loads(os.environ["FATES"])
open(os.environ["STARTS"], "a").write("x")
for name in sys.argv[1:]:
    fate = how.get(name, "fine")
    if fate == "crash":
        sys.stderr.write("LLVM ERROR: Do not know how to split\\nStack dump:\\n0. ...\\n")
        sys.stderr.flush()
        os.abort()
    if fate == "hang":
        time.sleep(600)
    if fate == "exit":
        sys.exit(3)
    if fate.startswith("signal "):
        number = int(fate.split()[1])
        if number != signal.SIGKILL:  # what started these tests may have told them to ignore it
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    print(json.dumps([name, None if fate == "fine" else fate]), flush=True)
"""


class Fates:
    """What happens to which kernel, in children that do nothing else."""

    def __init__(self, folder: Path) -> None:
        self._starts = folder / "starts"

    def __call__(self, **fates: str) -> dict[str, str]:
        return os.environ | {"FATES": json.dumps(fates), "STARTS": str(self._starts)}

    @property
    def n_started(self) -> int:
        return len(self._starts.read_text()) if self._starts.exists() else 0


SCRIPT = ("-c", CHILD)


@pytest.fixture
def fates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fates:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    return Fates(tmp_path)


def test_try_kernels_crash_names_signal_and_error_and_the_rest_is_tried(fates: Fates) -> None:
    verdicts = try_kernels(["a", "b", "c"], child=SCRIPT, environment=fates(b="crash"))
    assert verdicts == {
        "a": None,
        "b": "ended its trial process with SIGABRT (LLVM ERROR: Do not know how to split)",
        "c": None,
    }
    assert fates.n_started == 2


def test_try_kernels_every_one_crashes_ends(fates: Fates) -> None:
    environment = fates(a="crash", b="exit")
    verdicts = try_kernels(["a", "b"], child=SCRIPT, environment=environment)
    assert "SIGABRT" in str(verdicts["a"])
    assert verdicts["b"] == "ended its trial process with status 3"


def test_try_kernels_hang_is_ended_after_the_time(fates: Fates) -> None:
    verdicts = try_kernels(["a", "b"], child=SCRIPT, environment=fates(a="hang"), timeout_s=2.0)
    assert verdicts == {"a": "did not finish within 2 s", "b": None}


def test_try_kernels_says_of_each_when_it_is_ready(
    fates: Fates, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        try_kernels(["a", "b", "c"], child=SCRIPT, environment=fates(b="is wrong"))
    said = [record.getMessage() for record in caplog.records]
    assert [line.rpartition(" ready ")[0] for line in said] == [
        "the CPU kernel 'a' is",
        "the CPU kernel 'c' is",
    ]
    assert said[-1].endswith("(3 of 3)")


def test_try_kernels_asked_to_stop_ends_its_child(
    fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def stop_soon(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        children.append(start(*arguments, **options))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return children[0]

    monkeypatch.setattr(subprocess, "Popen", stop_soon)
    with stop_signals(), pytest.raises(Stopped):
        try_kernels(["a"], child=SCRIPT, environment=fates(a="hang"))
    assert children[0].returncode == -signal.SIGKILL


def test_try_kernels_without_a_python_to_start_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert "could not be tried" in str(try_kernels(["a"])["a"])


def test_try_kernels_from_a_folder_with_a_server_package_of_its_own_tries_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text("raise SystemExit('theirs')")
    monkeypatch.chdir(tmp_path)
    assert try_kernels(["nonsense"]) == {"nonsense": "is unknown"}


def test_usable_kernels_leaves_out_what_failed_and_warns_at_every_start(
    fates: Fates, caplog: pytest.LogCaptureFixture
) -> None:
    environment = fates(attention="crash", rows="is wrong in float32")
    expected = set(wanted_kernels(host_target())) - {"attention", "rows"}
    for _ in range(2):
        caplog.clear()
        assert usable_kernels(child=SCRIPT, environment=environment) == expected
        told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(told) == 2
        assert "'attention' ended its trial process with SIGABRT" in told[0]
        assert str(host_target()) in told[0]
        assert "torch does its work instead" in told[0]
        assert VERDICTS in told[0]
        assert "'rows' is wrong in float32" in told[1]
    assert fates.n_started == 2  # the second start asks nobody


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_usable_kernels_ended_from_outside_is_tried_again(fates: Fates, name: str) -> None:
    fate = f"signal {int(signal.Signals[name])}"
    assert "attention" not in usable_kernels(child=SCRIPT, environment=fates(attention=fate))
    assert "attention" in usable_kernels(child=SCRIPT, environment=fates())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attention": 3}'])
def test_usable_kernels_verdicts_that_cannot_be_read_are_made_anew(fates: Fates, text: str) -> None:
    folder = cache_folder()
    assert folder is not None
    (folder / VERDICTS).write_text(text)
    assert usable_kernels(child=SCRIPT, environment=fates()) == set(wanted_kernels(host_target()))


def test_usable_kernels_in_two_processes_at_once_are_tried_once(fates: Fates) -> None:
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(usable_kernels(child=SCRIPT, environment=fates()))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [set(wanted_kernels(host_target()))] * 4
    assert fates.n_started == 1


def test_usable_kernels_without_any_folder_to_write_to_still_tries(
    fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "cache_folder", lambda: None)
    assert usable_kernels(child=SCRIPT, environment=fates()) == set(wanted_kernels(host_target()))
    usable_kernels(child=SCRIPT, environment=fates())
    assert fates.n_started == 2  # nothing can be kept


def test_find_problem_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does nothing at all: the comparison can fail."""
    monkeypatch.setattr(NumbaKernels, "rms_norm", lambda self, x, weights, index, form: x)
    assert str(find_problem("rows")).startswith("is wrong in float32 (rms_norm, ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_none_usable_is_torch_for_every_case(dtype: torch.dtype) -> None:
    """Whatever fails, the rest goes on: each operation has a form without kernels."""
    found = dict(deviations(NumbaKernels(usable=()), dtype))
    assert len(found) > 20
    assert set(found.values()) == {None}


def test_every_kernel_has_cases() -> None:
    from server.ops.cpu.check_child import OF_KERNEL

    names = [name for name, _ in deviations(NumbaKernels(usable=()), torch.bfloat16)]
    assert tuple(OF_KERNEL) == wanted_kernels(host_target())
    for starts in OF_KERNEL.values():
        assert all(any(name.startswith(start) for name in names) for start in starts)


def test_usable_kernels_that_were_stopped_go_on_where_they_were(
    fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = wanted_kernels(host_target())
    assert untried_kernels() == wanted
    run_child = check._run_child

    def stopped(names: list[str], *rest: Any) -> Any:
        run_child(names[:2], *rest)
        raise Stopped("SIGTERM")

    monkeypatch.setattr(check, "_run_child", stopped)
    with pytest.raises(Stopped):
        usable_kernels(child=SCRIPT, environment=fates(**{wanted[0]: "is wrong"}))
    monkeypatch.setattr(check, "_run_child", run_child)
    assert untried_kernels() == wanted[2:]
    assert passed_kernels() == {wanted[1]}
    assert usable_kernels(child=SCRIPT, environment=fates()) == set(wanted[1:])
    assert untried_kernels() == ()


def test_try_kernels_keeps_signals_of_a_terminal_from_the_child() -> None:
    code = "import json, os, sys; print(json.dumps([sys.argv[1], str(os.getsid(0))]))"
    session = try_kernels(["a"], child=("-c", code))["a"]
    assert session != str(os.getsid(0))


def test_child_ends_when_the_process_that_waits_for_it_has(tmp_path: Path) -> None:
    code = "from server.ops.cpu import check_child as c; import time; c.find_problem = time.sleep\n"
    code += f"c.main([{END_WITH_STDIN!r}, 600])"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(120) == 1


# --- the cache that code and verdicts lie in ----------------------------------------------------


def test_cache_shared_between_kinds_of_cpu_is_a_folder_for_each() -> None:
    """Which kind a process is of: `test_host_target_follows_numbas_variables`."""
    targets = [Target("x86_64", one.name, frozenset(one.features)) for one in KINDS]
    assert len({cache_key(target) for target in targets}) == len(KINDS)
    assert cache_key(targets[0]) == cache_key(replace(targets[0]))


def test_cache_shared_between_kinds_never_hands_one_the_others_code(tmp_path: Path) -> None:
    """One kernel made for two kinds into one cache: each makes its own and finds only its own."""
    made: dict[str, dict[Path, bytes]] = {}
    seen: set[Path] = set()
    for name in ("x86-64-v2", "haswell"):
        environment = kind(name).environment() | {"NUMBA_CACHE_DIR": str(tmp_path)}
        verdicts = try_kernels(["rotary"], environment=environment)
        assert verdicts == {"rotary": None}
        (own,) = set(tmp_path.iterdir()) - seen
        seen.add(own)
        made[name] = {path.relative_to(own): path.read_bytes() for path in own.rglob("*.nbc")}
    assert made["x86-64-v2"].keys() == made["haswell"].keys() != set()
    assert all(made["x86-64-v2"][path] != made["haswell"][path] for path in made["haswell"])


def test_cache_is_found_from_another_environment(tmp_path: Path) -> None:
    """The same sources in another place and with other times, as `pip install` leaves them."""
    root = Path(check.__file__).parents[3]
    code = "from server.ops.cpu import compile, rope; "
    code += "print(compile.compile_kernel(rope._rotate_and_write)._compiled.cache_hits)"
    hits = []
    for name in ("one", "other"):
        for package in ("compressor", "server"):
            shutil.copytree(
                root / package, tmp_path / name / package, copy_function=shutil.copyfile
            )
        environment = os.environ | {
            "PYTHONPATH": str(tmp_path / name),
            "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        hits.append(done.stdout.strip())
    assert hits == ["0", "1"]


def test_cache_folder_that_was_filled_ahead_need_not_be_written(
    fates: Fates, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable_kernels(child=SCRIPT, environment=fates())
    filled = cache_folder()
    monkeypatch.setattr(compile, "_is_writable", lambda folder: False)
    assert cache_folder() == filled
    (filled / VERDICTS).unlink()
    assert cache_folder() != filled


def test_cache_folder_where_nothing_can_be_written_is_one_of_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    private = cache_folder()
    assert private is not None
    assert tmp_path not in private.parents
    assert private.parent.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(compile, "_private_root", lambda: None)
    assert cache_folder() is None


def test_cache_folder_without_a_home_is_one_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() is not None
