"""Bringing an artifact from a place into a folder: bounded before it is taken, checked, resumable.

`SHA256SUMS` comes first. It names the files, and its own digest the artifact, and so also the
folder that an earlier, interrupted fetch of the same bytes went into: what is there is kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from compressor.artifact.files import (
    CHECKSUMS,
    README,
    SIGNATURES,
    TENSORS,
    open_directory,
    read_checksums,
)
from compressor.errors import ArtifactError
from server.errors import ArtifactRefused, SourceNotFound
from server.fleet.files import PlaceFiles
from server.fleet.folder import ManagedFolder, flush, telling_full
from server.setting_kinds import size_text

MAX_SUMS_BYTES = 1 << 16
TAG_CHARS = 16


def read_sums(files: PlaceFiles) -> bytes | None:
    """Return what says which artifact it is, None if there is none."""
    n_bytes = files.size(CHECKSUMS)
    if n_bytes is None:
        return None
    if n_bytes > MAX_SUMS_BYTES:
        raise ArtifactRefused(f"{CHECKSUMS} has {n_bytes} bytes; {MAX_SUMS_BYTES} are the limit.")
    return b"".join(files.read(CHECKSUMS, end=MAX_SUMS_BYTES + 1))


def digest_of(raw: bytes) -> str:
    """Return the digest of the artifact that has this SHA256SUMS."""
    return hashlib.sha256(raw).hexdigest()


def fetch_delta(
    files: PlaceFiles, raw: bytes, name: str, folder: ManagedFolder, max_bytes: int
) -> Path:
    """Fetch an artifact whose SHA256SUMS is `raw`; return its folder, not published yet.

    Raises ArtifactRefused, StorageFull, and as `PlaceFiles` does.
    """
    with telling_full():
        staged = folder.staging(name, digest_of(raw)[:TAG_CHARS])
        sums = _kept_sums(staged, raw)
        sizes = {file: _size(files, file) for file in sums}
        for extra in (README, SIGNATURES):  # which no checksum covers
            n_bytes = files.size(extra)
            if n_bytes is not None and n_bytes <= MAX_SUMS_BYTES:
                sizes[extra] = n_bytes
        _check_size(sum(sizes.values()), max_bytes)
        folder.check_room(sum(sizes.values()) - _held_bytes(staged))
        for file in sorted(sizes, key=lambda file: (file == TENSORS, file)):
            _fetch_file(files, file, staged / file, sizes[file], sums.get(file))
        flush(staged)
    return staged


def _kept_sums(staged: Path, raw: bytes) -> dict[str, str]:
    (staged / CHECKSUMS).write_bytes(raw)
    try:
        with open_directory(staged) as directory:
            return read_checksums(directory)[0]
    except ArtifactError as error:
        raise ArtifactRefused(f"The source is no artifact that can be served: {error}.") from error


def _size(files: PlaceFiles, name: str) -> int:
    found = files.size(name)
    if found is None:
        raise SourceNotFound(f"The source lacks {name}, which its {CHECKSUMS} names.")
    return found


def _check_size(n_bytes: int, max_bytes: int) -> None:
    if n_bytes > max_bytes:
        raise ArtifactRefused(
            f"The artifact has {n_bytes} bytes, and {size_text(max_bytes)} are the limit: see "
            "--max-artifact-bytes."
        )


def _held_bytes(staged: Path) -> int:
    return sum(file.stat().st_size for file in staged.iterdir())


def _fetch_file(files: PlaceFiles, name: str, path: Path, size: int, wanted: str | None) -> None:
    """Go on from what is there; begin again if that was not the same file's beginning.

    wanted  its sha256; None: it has none
    """
    held = path.stat().st_size if path.exists() else 0
    start = held if wanted is not None and held <= size else 0
    found = _append(files.read, name, path, start, size)
    if wanted is not None and found != wanted and start:
        found = _append(files.read, name, path, 0, size)
    if wanted is not None and found != wanted:
        path.unlink()
        raise ArtifactRefused(f"{name} at the source differs from its checksum.")


def _append(
    read: Callable[[str, int, int], Iterator[bytes]], name: str, path: Path, start: int, size: int
) -> str:
    """Write a file from `start` on; return the sha256 of all of it."""
    digest = hashlib.sha256()
    with path.open("r+b" if start else "wb") as file:
        left = start
        while left:
            piece = file.read(min(left, 1 << 20))
            digest.update(piece)
            left -= len(piece)
        if start < size:
            for piece in read(name, start, size):
                file.write(piece)
                digest.update(piece)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
