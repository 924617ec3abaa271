"""Which file system a folder lies on, and forgetting what was read."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import disk

MOUNTS = r"""22 1 8:1 / / rw - ext4 /dev/vda rw
23 22 0:5 / /tmp rw,nosuid shared:2 - ext4 /dev/vdb rw
24 23 0:6 / /tmp rw - tmpfs tmpfs rw
25 22 0:7 / /with\040space rw - xfs /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/x", "ext4"), ("/tmp/a/b", "tmpfs"), ("/tmpfoo", "ext4"), ("/with space/a", "xfs")],
)
def test_file_system_is_of_the_innermost_and_last_mount(
    path: str, kind: str, tmp_path: Path
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert disk.file_system(Path(path), mounts) == kind


def test_folder_avoids_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, on_disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    on_disk.mkdir()
    monkeypatch.setattr(disk.tempfile, "gettempdir", lambda: str(memory))
    monkeypatch.chdir(on_disk)
    kinds = {memory: "tmpfs", on_disk: "ext4"}
    monkeypatch.setattr(disk, "file_system", lambda path: kinds.get(path, "tmpfs"))
    with disk.folder_on_disk() as folder:
        assert folder.parent == on_disk
        (folder / "file").write_bytes(bytes(1000))
        assert disk.read_seconds(folder) > 0
    assert not folder.exists()
