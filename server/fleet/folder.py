"""The folder of variants that this server made: fetched, uploaded or converted.

    state_dir/deltas/NAME                  an artifact, whole and verified
    state_dir/deltas/.NAME.partial-TAG     one that is on its way; what is there is fetched no more
    state_dir/deltas/.NAME.upload-TAG      bytes that a client sends
    state_dir/deltas/.NAME.removed-TAG     one that nobody asks for by name any more

A name appears whole or not at all: its folder is written beside it, flushed and renamed. What a
crash leaves begins with a dot, is never served, and goes at the next start, but for what a fetch
can go on from.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from server.errors import ConfigError, StorageFull
from server.setting_kinds import size_text

FOLDER = "deltas"
MODE = 0o700
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def managed_path(state_dir: Path | None) -> Path | None:
    """Return the folder of this server's own variants, which is there then. Raises ConfigError."""
    if state_dir is None:
        return None
    path = state_dir / FOLDER
    try:
        path.mkdir(mode=MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made ({error.strerror}); give --state-dir a folder that this user "
            "may write to"
        ) from None
    return path


class ManagedFolder:
    """Blocking; of one name by one thread at a time.

    budget_bytes  the most that may lie in it
    """

    def __init__(self, path: Path, budget_bytes: int) -> None:
        """Take over the folder, and remove what an earlier run has left."""
        self.path = path
        self._budget_bytes = budget_bytes
        for entry in list(os.scandir(self.path)):
            if entry.name.startswith(".") and ".partial-" not in entry.name:
                remove(Path(entry.path))

    def staging(self, name: str, tag: str) -> Path:
        """Return the folder in which an artifact is made; others of this name go."""
        wanted = self._beside(name, "partial", tag)
        for other in self.path.glob(f".{name}.partial-*"):
            if other != wanted:
                remove(other)
        wanted.mkdir(mode=MODE, exist_ok=True)
        return wanted

    def upload(self, name: str) -> Path:
        """Return the name of a file for what a client sends."""
        return self._beside(name, "upload", secrets.token_hex(4))

    def has(self, name: str) -> bool:
        return (self.path / name).is_dir()

    def check_room(self, n_bytes: int) -> None:
        """Raise StorageFull where so many more bytes may not be, or are not there."""
        if n_bytes > self.room_bytes():
            self.refuse(n_bytes)

    def refuse(self, n_bytes: int) -> NoReturn:
        """Raise StorageFull."""
        raise StorageFull(
            f"There is no room for {n_bytes} bytes more: the variants of this server may take "
            f"{size_text(self._budget_bytes)}, as far as the disk has that. Delete some, or raise "
            "--disk-budget-bytes."
        )

    def room_bytes(self) -> int:
        """Return how many bytes more may lie in it; it looks at every file."""
        return min(self._budget_bytes - self.used_bytes(), shutil.disk_usage(self.path).free)

    def used_bytes(self) -> int:
        """Return the bytes of all files in it."""
        found = (file for file in self.path.rglob("*") if file.is_file())
        return sum(file.stat(follow_symlinks=False).st_size for file in found)

    def publish(self, staged: Path, name: str) -> Path | None:
        """Give a staged folder its name; return where the one that had it is now."""
        flush(staged)
        moved = self.retire(name)
        os.rename(staged, self.path / name)
        flush(self.path)
        return moved

    def retire(self, name: str) -> Path | None:
        """Take a folder's name; return where it is now, None if there is none."""
        moved = self._beside(name, "removed", secrets.token_hex(4))
        try:
            os.rename(self.path / name, moved)
        except FileNotFoundError:
            return None
        flush(self.path)
        return moved

    def _beside(self, name: str, kind: str, tag: str) -> Path:
        return self.path / f".{name}.{kind}-{tag}"


def flush(folder: Path) -> None:
    """Have the entries of a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def telling_full() -> Iterator[None]:
    """Raise StorageFull where the system says that there is no room."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("The disk of --state-dir is full. Delete some variants.") from error
        raise
