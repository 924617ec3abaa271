"""CPUs and threads on made-up machines of 64 cores, and in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor import usable_cpus as module
from compressor.usable_cpus import (
    CHOSEN,
    PRODUCT_VARIABLES,
    Threads,
    UsableCpus,
    product_threads,
    set_thread_defaults,
    usable_cpus,
)

ROOT = Path(__file__).resolve().parent.parent.parent
CORES = 64
ALL = range(2 * CORES)
LIMITED = UsableCpus(2, 4, "cgroup limit")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.fixture(params=["core_cpus_list", "thread_siblings_list"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """64 cores of two threads each, numbered as x86 does: core 3 is the CPUs 3 and 67."""
    folder = tmp_path / "sys/devices/system/cpu"
    write(folder / "online", f"0-{len(ALL) - 1}")
    for cpu in ALL:
        siblings = f"{cpu % CORES},{cpu % CORES + CORES}"
        write(folder / f"cpu{cpu}" / "topology" / request.param, siblings)
    return tmp_path


def limit(root: Path, quota: str) -> None:
    write(root / "proc/self/cgroup", "0::/")
    write(root / "proc/self/mountinfo", "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    write(root / "sys/fs/cgroup/cpu.max", quota)


def test_whole_machine_counts_siblings_once(machine: Path) -> None:
    assert usable_cpus(machine, ALL, {}) == UsableCpus(64, 128, "physical cores")


@pytest.mark.parametrize(
    ("affinity", "found"),
    [
        ({5}, UsableCpus(1, 1, "CPU affinity")),
        ({3, 67}, UsableCpus(1, 2, "CPU affinity")),
        ({0, 1, 66, 67}, UsableCpus(4, 4, "CPU affinity")),
        (range(CORES), UsableCpus(64, 64, "physical cores")),
    ],
)
def test_affinity_leaves_its_own_cores(
    machine: Path, affinity: set[int], found: UsableCpus
) -> None:
    assert usable_cpus(machine, affinity, {}) == found


@pytest.mark.parametrize(
    ("quota", "found"),
    [
        ("200000 100000", UsableCpus(2, 2, "cgroup limit")),
        ("150000 100000", UsableCpus(2, 2, "cgroup limit")),
        ("50000 100000", UsableCpus(1, 1, "cgroup limit")),
        ("9600000 100000", UsableCpus(64, 96, "physical cores")),
        ("max 100000", UsableCpus(64, 128, "physical cores")),
    ],
)
def test_container_with_a_cpu_limit_counts_that(
    machine: Path, quota: str, found: UsableCpus
) -> None:
    limit(machine, quota)
    assert usable_cpus(machine, ALL, {}) == found


def test_affinity_and_limit_together_take_the_smaller(machine: Path) -> None:
    limit(machine, "400000 100000")
    assert usable_cpus(machine, range(8), {}) == UsableCpus(4, 4, "cgroup limit")
    assert usable_cpus(machine, range(3), {}) == UsableCpus(3, 3, "CPU affinity")


def test_python_cpu_count_narrows_and_never_widens(machine: Path) -> None:
    assert usable_cpus(machine, ALL, {"PYTHON_CPU_COUNT": "6"}) == UsableCpus(
        6, 6, "PYTHON_CPU_COUNT"
    )
    limit(machine, "200000 100000")
    for value in ("6", "default", "0", "-3", "many", "9" * 5000):
        found = usable_cpus(machine, ALL, {"PYTHON_CPU_COUNT": value})
        assert found == UsableCpus(2, 2, "cgroup limit"), value


def test_python_option_comes_before_its_variable(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys._xoptions, "cpu_count", "5")
    found = usable_cpus(machine, ALL, {"PYTHON_CPU_COUNT": "6"})
    assert found == UsableCpus(5, 5, "PYTHON_CPU_COUNT")


def test_unknown_topology_counts_every_cpu(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, range(8), {}) == UsableCpus(8, 8, "logical CPUs")
    write(tmp_path / "sys/devices/system/cpu/online", "nonsense")
    write(tmp_path / "sys/devices/system/cpu/cpu0/topology/core_cpus_list", "")
    assert usable_cpus(tmp_path, range(8), {}) == UsableCpus(8, 8, "logical CPUs")


@pytest.fixture
def no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)


@pytest.mark.usefixtures("no_affinity")
@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 8", UsableCpus(8, 12, "physical cores")),
        ("echo unknown oid >&2; exit 1", UsableCpus(12, 12, "logical CPUs")),
        ("echo eight", UsableCpus(12, 12, "logical CPUs")),
        (None, UsableCpus(12, 12, "logical CPUs")),
    ],
)
def test_mac_asks_sysctl_or_counts_every_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, found: UsableCpus
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        sysctl = tmp_path / "sysctl"
        write(sysctl, f'#!/bin/sh\n[ "$*" = "-n hw.physicalcpu" ] || exit 3\n{script}')
        sysctl.chmod(0o755)
    assert usable_cpus(tmp_path, environ={}) == found


@pytest.mark.usefixtures("no_affinity")
def test_system_without_affinity_counts_every_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert usable_cpus(tmp_path, environ={}) == UsableCpus(12, 12, "logical CPUs")


def test_this_machine_has_at_least_one_of_each() -> None:
    found = usable_cpus()
    assert 1 <= found.cores <= found.cpus <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("given", "environ", "text"),
    [
        (None, {}, "2 threads (cgroup limit)"),
        (None, {"OMP_NUM_THREADS": "8"}, "8 threads (OMP_NUM_THREADS)"),
        (None, {"OMP_NUM_THREADS": "1,2"}, "1 thread (OMP_NUM_THREADS)"),
        (None, {"MKL_NUM_THREADS": "3"}, "3 threads (MKL_NUM_THREADS)"),
        (None, {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "3"}, "4 threads (OMP_NUM_THREADS)"),
        (None, {"OMP_NUM_THREADS": "all", "MKL_NUM_THREADS": ""}, "2 threads (cgroup limit)"),
        (5, {"OMP_NUM_THREADS": "8"}, "5 threads (--torch-threads)"),
    ],
)
def test_threads_are_what_the_user_said_or_the_usable_cores(
    given: int | None, environ: dict[str, str], text: str
) -> None:
    assert str(product_threads(given, environ, LIMITED)) == text
    assert str(set_thread_defaults(given, environ, LIMITED)) == text
    # Once the variables are set, they do not look as if the user had set them.
    assert str(product_threads(None, environ, UsableCpus(9, 9, "physical cores"))) == text


def test_thread_defaults_fill_what_is_unset() -> None:
    environ = {"OPENBLAS_NUM_THREADS": "7", "RAYON_NUM_THREADS": "9"}
    set_thread_defaults(environ=environ, usable=LIMITED)
    assert environ.pop("OPENBLAS_NUM_THREADS") == "7"
    assert environ.pop("RAYON_NUM_THREADS") == "9"
    assert environ.pop(CHOSEN) == "2 cgroup limit"
    assert environ == dict.fromkeys(set(PRODUCT_VARIABLES) - {"OPENBLAS_NUM_THREADS"}, "2")


def test_thread_defaults_give_tokenizers_every_cpu() -> None:
    environ: dict[str, str] = {}
    set_thread_defaults(environ=environ, usable=LIMITED)
    assert environ["RAYON_NUM_THREADS"] == "4"


def test_thread_defaults_follow_the_users_openmp() -> None:
    """OpenBLAS would follow it too, were its own variable unset."""
    environ = {"OMP_NUM_THREADS": "3"}
    assert set_thread_defaults(environ=environ, usable=LIMITED) == Threads(3, "OMP_NUM_THREADS")
    assert environ["OPENBLAS_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == "3"


def run(code: str, **environ: str) -> str:
    """What a fresh Python prints, without this one's threads."""
    kept = {name: os.environ[name] for name in os.environ if not name.endswith("_NUM_THREADS")}
    kept.pop(CHOSEN, None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=kept | environ, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("name", [module.__name__, "server.__main__", "compressor.cli"])
def test_programs_load_no_library_with_threads_before_the_defaults(name: str) -> None:
    libraries = "{'numpy', 'torch', 'numba', 'tokenizers'}"
    assert run(f"import sys, {name}; print({libraries} & set(sys.modules))") == "set()"


def test_torch_follows_the_defaults_in_every_thread() -> None:
    """OpenMP's own number: torch's setting alone would not reach a thread that only multiplies."""
    code = """
import os
from compressor.usable_cpus import UsableCpus, set_thread_defaults
set_thread_defaults(usable=UsableCpus(1, 1, "cgroup limit"))
import threading, torch
from torch import randn
counts = [torch.get_num_threads()]
work = lambda: (randn(512, 512) @ randn(512, 512), counts.append(torch.get_num_threads()))
before = len(os.listdir("/proc/self/task"))
thread = threading.Thread(target=work); thread.start(); thread.join(); work()
print(counts, len(os.listdir("/proc/self/task")) - before)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted in /proc")
    assert run(code) == "[1, 1, 1] 0"
