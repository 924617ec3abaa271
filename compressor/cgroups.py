"""What cgroups leave this process: a number of CPUs, and memory.

    v2  cpu.max                                  "quota period", or "max" without a limit
        memory.max, memory.current               bytes, or "max"
    v1  cpu.cfs_quota_us, cpu.cfs_period_us      -1 without a limit
        memory.limit_in_bytes, .usage_in_bytes   bytes; without a limit more than any machine has

A limit binds everything below it, so the smallest on the way from the process's own cgroup up to
the root of the mount counts. Where that cgroup lies is said by two files together: its path in the
hierarchy (/proc/self/cgroup), and which part of the hierarchy is mounted where
(/proc/self/mountinfo). In a container either may be relative to what it cannot see; then the root
of its mount is the nearest that can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes spaces


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted cgroup hierarchy: `root` of it is seen at `point`."""

    is_v2: bool
    root: PurePosixPath
    point: PurePosixPath


def cpu_quota(root: Path) -> int | None:
    """The smallest quota in CPUs, rounded up, or None without one. root: of /proc and of mounts.

    Rounded up, because of 1.5 CPUs a single thread leaves a third unused, while two use all of it
    and are stopped for a quarter of the time. So less than one CPU is one.
    """
    quotas = (_quota(folder, is_v2) for folder, is_v2 in _folders(root, "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_left(root: Path) -> int | None:
    """Bytes until the nearest limit, 0 at least, or None without one.

    What caches take counts as used, though the kernel would give it back: a cautious number.
    """
    found = (_memory_left(folder, is_v2) for folder, is_v2 in _folders(root, "memory"))
    return min((left for left in found if left is not None), default=None)


def _folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of the process's cgroup and of those above it, and whether they are v2's."""
    paths = _own_paths(_lines(root / "proc/self/cgroup"), controller)
    for mount in _mounts(_lines(root / "proc/self/mountinfo"), controller):
        for folder in _way_up(mount, paths.get(mount.is_v2, PurePosixPath("/"))):
            yield root / folder.relative_to("/"), mount.is_v2


def _own_paths(lines: list[str], controller: str) -> dict[bool, PurePosixPath]:
    """The process's cgroup in the v2 hierarchy (True) and in v1's of this controller (False)."""
    paths = {}
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            paths[True] = PurePosixPath(path)
        elif controller in controllers.split(","):
            paths[False] = PurePosixPath(path)
    return paths


def _mounts(lines: list[str], controller: str) -> Iterator[_Mount]:
    for line in lines:
        left, _, right = line.partition(" - ")
        where, what = left.split(), right.split()
        if len(where) < 5 or len(what) < 3:
            continue
        is_v2 = what[0] == "cgroup2"
        if is_v2 or (what[0] == "cgroup" and controller in what[2].split(",")):
            mount_root, point = (PurePosixPath(_unescaped(text)) for text in where[3:5])
            if point.is_absolute():
                yield _Mount(is_v2, mount_root, point)


def _way_up(mount: _Mount, path: PurePosixPath) -> Iterator[PurePosixPath]:
    """The folders of the cgroup `path` and of those above it, as far as they are mounted."""
    inside = path.is_relative_to(mount.root) and ".." not in path.parts
    below = path.relative_to(mount.root) if inside else PurePosixPath()
    for part in (below, *below.parents):
        yield mount.point / part


def _quota(folder: Path, is_v2: bool) -> int | None:
    if is_v2:
        fields = " ".join(_lines(folder / "cpu.max")).split()
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        fields = [line for name in names for line in _lines(folder / name)]
    try:
        quota, period = map(int, fields)
    except ValueError:  # "max", or no such files
        return None
    return -(-quota // period) if quota > 0 and period > 0 else None


def _memory_left(folder: Path, is_v2: bool) -> int | None:
    limit, used = "memory.max", "memory.current"
    if not is_v2:
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    try:
        most, taken = (int("".join(_lines(folder / name))) for name in (limit, used))
    except ValueError:  # "max", or no such files
        return None
    return max(most - taken, 0)


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def _lines(path: Path) -> list[str]:
    """Of a file that need not exist."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
