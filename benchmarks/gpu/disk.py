"""Where an artifact lies while loads of it are timed: on a disk, and not in the page cache."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = ("tmpfs", "ramfs")  # nothing there is ever read from a disk
CHUNK_BYTES = 16 << 20


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """Type of the file system that holds `path`: ext4, overlay, tmpfs, ..."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return "unknown"
    found, longest = "unknown", -1
    for line in lines:
        before, _, after = line.partition(" - ")
        at = before.split()[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(at) and len(at) >= longest:  # the last mount hides others
            found, longest = after.split()[0], len(at)
    return found


@contextmanager
def folder_on_disk() -> Iterator[Path]:
    """A temporary folder, on a disk if any of the usual places is."""
    places = [Path(tempfile.gettempdir()), Path.cwd(), Path("/var/tmp"), Path.home()]
    usable = [place for place in places if os.access(place, os.W_OK)]
    best = next((p for p in usable if file_system(p) not in IN_MEMORY), usable[0])
    with tempfile.TemporaryDirectory(dir=best) as folder:
        yield Path(folder)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them reads the disk."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    """Of reading a folder's files once, after `forget`, by one thread."""
    forget(folder)
    start = time.perf_counter()
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.read(CHUNK_BYTES):
                pass
    return time.perf_counter() - start
