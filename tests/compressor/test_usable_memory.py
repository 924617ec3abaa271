"""Memory on made-up trees: the machine's, a container's, and where neither is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from compressor import usable_memory
from compressor.usable_memory import usable_memory_bytes

GIB = 1 << 30
V1 = "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2 = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def machine(root: Path, available_gib: int, mount: str = "") -> None:
    kib = available_gib << 20
    write(root, proc__meminfo=f"MemTotal: {2 * kib} kB\nMemAvailable:   {kib} kB")
    write(root, proc__self__mountinfo=mount, proc__self__cgroup="0::/app\n7:memory:/app")


def test_usable_memory_without_cgroups_is_what_the_machine_has(tmp_path: Path) -> None:
    machine(tmp_path, 3)
    assert usable_memory_bytes(tmp_path) == 3 * GIB


def test_usable_memory_in_a_container_of_v2_is_what_its_limit_leaves(tmp_path: Path) -> None:
    machine(tmp_path, 30, V2)
    folder = tmp_path / "sys/fs/cgroup/app"
    write(folder, memory_dot_max=str(4 * GIB), memory_dot_current=str(GIB))
    assert usable_memory_bytes(tmp_path) == 3 * GIB
    write(folder, memory_dot_max="max")
    assert usable_memory_bytes(tmp_path) == 30 * GIB


def test_usable_memory_of_nested_groups_is_the_smallest(tmp_path: Path) -> None:
    machine(tmp_path, 30, V1)
    folder = tmp_path / "sys/fs/cgroup/memory"
    for group, limit in ((folder / "app", 8), (folder, 6)):
        write(
            group,
            memory_dot_limit_in_bytes=str(limit * GIB),
            memory_dot_usage_in_bytes=str(GIB),
        )
    assert usable_memory_bytes(tmp_path) == 5 * GIB


def test_usable_memory_past_its_limit_is_none(tmp_path: Path) -> None:
    machine(tmp_path, 30, V2)
    folder = tmp_path / "sys/fs/cgroup/app"
    write(folder, memory_dot_max=str(GIB), memory_dot_current=str(2 * GIB))
    assert usable_memory_bytes(tmp_path) == 0


@pytest.mark.parametrize("text", ["", "MemAvailable: much kB", "MemAvailable:"])
def test_usable_memory_that_is_not_told_is_all(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, proc__meminfo=text)
    assert 0 < usable_memory_bytes(tmp_path) <= sys.maxsize
    monkeypatch.delattr(os, "sysconf")
    assert usable_memory_bytes(tmp_path) == sys.maxsize


def test_usable_memory_here_is_some() -> None:
    assert usable_memory.usable_memory_bytes() > 1 << 20
