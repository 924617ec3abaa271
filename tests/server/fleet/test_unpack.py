"""A tar that declares more than it may; what else is refused is tested over HTTP."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from server.errors import ArtifactRefused
from server.fleet.unpack import MAX_MEMBERS, unpack_upload


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def test_folder_within_the_tar_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    named, hidden = tarfile.TarInfo("name/merges.txt"), tarfile.TarInfo("name/.gitattributes")
    named.size = hidden.size = 3
    unpack_upload(tar_of(tmp_path / "t.tar", named, hidden), tmp_path / "to")
    assert [(f.name, f.read_bytes()) for f in (tmp_path / "to").iterdir()] == [
        ("merges.txt", b"xxx")
    ]


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\x1f\x8b" + b"\0" * 600])
def test_bytes_that_are_no_tar_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(ArtifactRefused, match="tar"):
        unpack_upload(tmp_path / "t.tar", tmp_path)


def test_long_name_of_gigabytes_is_never_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    (tmp_path / "t.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(ArtifactRefused):
        unpack_upload(tmp_path / "t.tar", tmp_path)


def test_more_members_than_an_artifact_has_are_refused(tmp_path: Path) -> None:
    members = [tarfile.TarInfo(f".{n}") for n in range(MAX_MEMBERS + 1)]
    with pytest.raises(ArtifactRefused, match="members"):
        unpack_upload(tar_of(tmp_path / "t.tar", *members), tmp_path)
