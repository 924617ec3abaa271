"""A tar that a client sent, into a folder: plain files of an artifact, each bounded and once.

No link, device, path or name that is not an artifact's is ever made, so there is nothing to escape
by. Headers are bounded too: a tar may declare a name of gigabytes, which `tarfile` would read.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO

from compressor.artifact.files import CHECKSUMS, CONFIG, README, SIGNATURES, TENSORS, is_auxiliary
from server.errors import ArtifactRefused
from server.fleet.folder import flush, telling_full

MAX_MEMBERS = 64
MAX_READ_BYTES = 1 << 20
_NAMES = frozenset({CHECKSUMS, CONFIG, README, SIGNATURES, TENSORS})


class _Bounded:
    """A file that is read in small pieces only."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, n_bytes: int = -1) -> bytes:
        if not 0 <= n_bytes <= MAX_READ_BYTES:
            raise tarfile.ReadError("it has a header beyond all bounds")
        return self._file.read(n_bytes)


def unpack_upload(path: Path, folder: Path) -> None:
    """Write the files of a tar into an empty folder. Raises ArtifactRefused, StorageFull."""
    try:
        with (
            telling_full(),
            path.open("rb") as file,
            tarfile.open(fileobj=_Bounded(file), mode="r:") as tar,  # type: ignore[call-overload]
        ):
            for n_members, member in enumerate(tar):
                if n_members == MAX_MEMBERS:
                    raise ArtifactRefused(f"The tar has more than {MAX_MEMBERS} members.")
                _unpack_one(tar, member, folder)
            flush(folder)
    except (tarfile.TarError, UnicodeError, ValueError, EOFError) as error:
        raise ArtifactRefused(
            "The body is no tar of an artifact's folder; send `tar -C FOLDER -c .`, not compressed."
        ) from error


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    if member.isdir():
        return
    parts = [part for part in PurePosixPath(member.name).parts if part != "."]
    if len(parts) not in (1, 2) or ".." in parts or parts[0] == "/":
        raise ArtifactRefused("The tar has a path that is not a file of one folder.")
    name = parts[-1]
    if name.startswith("."):
        return  # what git and the Hub's client leave
    if not member.isreg() or member.issparse():
        raise ArtifactRefused("The tar has a link, a device or a sparse file; send plain files.")
    if name not in _NAMES and not is_auxiliary(name):
        raise ArtifactRefused(f"The tar has a file that no artifact has: {name!r:.80}.")
    content = tar.extractfile(member)
    assert content is not None, "a plain file has content"
    try:
        with (folder / name).open("xb") as file:
            while piece := content.read(MAX_READ_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ArtifactRefused(f"The tar has {name} twice.") from None
