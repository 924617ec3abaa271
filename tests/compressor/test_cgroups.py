"""Quotas on made-up trees: both versions, nested, and seen from within containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.cgroups import cpu_quota

V2 = "0::"
V1 = "4:cpu,cpuacct:"
MOUNT_V2 = "31 23 0:28 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_V1 = "32 31 0:29 {root} {point} rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHERS = [
    "23 1 0:20 / / rw - overlay overlay rw,lowerdir=/a - b",
    "40 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
    "41 31 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd",
    "broken",
]
LINES = ["12:cpuset:/elsewhere", "1:name=systemd:/elsewhere"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def describe(root: Path, own: list[str], mounts: list[str]) -> None:
    write(root / "proc/self/cgroup", "\n".join([*LINES, *own]) + "\n")
    write(root / "proc/self/mountinfo", "\n".join([*OTHERS, *mounts]) + "\n")


def v2(root: Path, path: str, mount_root: str = "/", point: str = "/sys/fs/cgroup") -> Path:
    """A process in the cgroup `path`; returns the folder where the hierarchy is mounted."""
    describe(root, [V2 + path], [MOUNT_V2.format(root=mount_root, point=point)])
    return root / point[1:]


def v1(root: Path, path: str, mount_root: str = "/") -> Path:
    point = "/sys/fs/cgroup/cpu,cpuacct"
    describe(root, [V1 + path], [MOUNT_V1.format(root=mount_root, point=point)])
    return root / point[1:]


def limit_v1(folder: Path, quota: int, period: int = 100_000) -> None:
    write(folder / "cpu.cfs_quota_us", f"{quota}\n")
    write(folder / "cpu.cfs_period_us", f"{period}\n")


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("200000 100000", 2),
        ("max 100000", None),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("150000 100000", 2),
        ("25000 10000", 3),
        ("200000", None),
        ("200000 0", None),
        ("-1 100000", None),
        ("", None),
        ("two 100000", None),
    ],
)
def test_quota_of_v2_is_rounded_up(tmp_path: Path, text: str, cpus: int | None) -> None:
    write(v2(tmp_path, "/app") / "app/cpu.max", text + "\n")
    assert cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [(200_000, 100_000, 2), (-1, 100_000, None), (30_000, 100_000, 1), (250_000, 100_000, 3)],
)
def test_quota_of_v1_is_rounded_up(
    tmp_path: Path, quota: int, period: int, cpus: int | None
) -> None:
    limit_v1(v1(tmp_path, "/docker/abc") / "docker/abc", quota, period)
    assert cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize("tightest", ["", "kubepods", "kubepods/pod1", "kubepods/pod1/box"])
def test_quota_of_nested_groups_is_the_smallest_on_the_way_up(
    tmp_path: Path, tightest: str
) -> None:
    point = v2(tmp_path, "/kubepods/pod1/box")
    for folder in ("kubepods", "kubepods/pod1", "kubepods/pod1/box"):
        write(point / folder / "cpu.max", "800000 100000")
    write(point / tightest / "cpu.max", "300000 100000")
    write(point / "kubepods/pod2/cpu.max", "100000 100000")  # not on the way
    write(point / "kubepods/pod1/box/child/cpu.max", "100000 100000")
    assert cpu_quota(tmp_path) == 3


def test_quota_in_a_container_with_a_namespace_is_that_of_its_mount(tmp_path: Path) -> None:
    write(v2(tmp_path, "/") / "cpu.max", "200000 100000")
    assert cpu_quota(tmp_path) == 2


def test_quota_in_a_container_without_a_namespace_is_that_of_its_mount(tmp_path: Path) -> None:
    """The path is the host's, and so is the part of the hierarchy that is mounted."""
    limit_v1(v1(tmp_path, "/docker/abc", mount_root="/docker/abc"), 200_000)
    assert cpu_quota(tmp_path) == 2


def test_quota_below_what_is_mounted_is_found(tmp_path: Path) -> None:
    point = v1(tmp_path, "/docker/abc/worker", mount_root="/docker/abc")
    limit_v1(point, 400_000)
    limit_v1(point / "worker", 200_000)
    assert cpu_quota(tmp_path) == 2


@pytest.mark.parametrize(
    ("path", "mount_root"),
    [("/docker/abc", "/"), ("/", "/.."), ("/../other", "/"), ("/", "/docker/abc"), ("/x", "/y")],
)
def test_quota_whose_path_is_not_under_the_mount_is_that_of_the_mount(
    tmp_path: Path, path: str, mount_root: str
) -> None:
    point = v2(tmp_path, path, mount_root)
    write(point / "cpu.max", "200000 100000")
    write(point.parent / "other/cpu.max", "100000 100000")
    assert cpu_quota(tmp_path) == 2


def test_quota_with_both_versions_mounted_is_the_smaller(tmp_path: Path) -> None:
    old, new = "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/unified"
    mounts = [MOUNT_V1.format(root="/", point=old), MOUNT_V2.format(root="/", point=new)]
    describe(tmp_path, [V1 + "/a", V2 + "/b"], mounts)
    limit_v1(tmp_path / old[1:] / "a", 200_000)
    assert cpu_quota(tmp_path) == 2
    write(tmp_path / new[1:] / "b/cpu.max", "100000 100000")
    assert cpu_quota(tmp_path) == 1


def test_quota_where_the_mount_has_a_space_is_found(tmp_path: Path) -> None:
    v2(tmp_path, "/app", point="/mnt/my\\040groups")
    write(tmp_path / "mnt/my groups/app/cpu.max", "200000 100000")
    assert cpu_quota(tmp_path) == 2


def test_quota_without_any_file_is_none(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    v2(tmp_path, "/app")
    assert cpu_quota(tmp_path) is None


def test_quota_without_the_own_path_is_that_of_the_mount(tmp_path: Path) -> None:
    write(v2(tmp_path, "/app") / "cpu.max", "200000 100000")
    (tmp_path / "proc/self/cgroup").unlink()
    assert cpu_quota(tmp_path) == 2
