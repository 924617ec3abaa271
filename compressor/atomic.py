"""Durable, all-or-nothing writes.

A file or directory appears under its final name complete and flushed, or not at all: write
beside it, fsync, rename, fsync the parent directory. A failed fsync is never retried, because
the kernel may have dropped the pages (PostgreSQL's lesson of 2018): the write fails.
Every OSError becomes an OutputError that says what could not be done.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from filelock import FileLock, Timeout

from compressor.errors import OutputError

# What file systems say that have no locks, or do not flush directories.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

log = logging.getLogger(__name__)


def write_new(path: Path, chunks: Iterable[bytes | memoryview], *, sync: bool = True) -> int:
    """Create `path` (which must not exist) from `chunks`, flushed to disk; return its size.

    sync=False leaves flushing to the kernel, for files whose reader checks them.
    On failure nothing is left behind.
    """
    with new_file(path, sync=sync) as stream:
        for chunk in chunks:
            stream.write(chunk)
        return stream.tell()


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` whole and flushed, in place of a file that may be there; other names of that
    file keep what it held.
    """
    staged = path.with_name(f".{path.name}.partial")
    with _as_output_error(f"cannot write {path}"):
        staged.unlink(missing_ok=True)
        write_new(staged, [data])
        os.replace(staged, path)
    sync_directory(path.parent)


@contextmanager
def new_file(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Create `path` (which must not exist) and yield it for writing; see `write_new`."""
    with _as_output_error(f"cannot write {path.name}"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise


def sync_directory(path: Path) -> None:
    """Flush a directory's entries."""
    with _as_output_error(f"cannot flush directory {path.name}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FLUSH:
                raise
        finally:
            os.close(descriptor)


def publish_directory(staged: Path, final: Path) -> None:
    """Rename the complete directory `staged` to `final`, replacing what is there.

    Two renames replace a directory, so a crash between them leaves the old one under the name
    `replaced_name`; `recover_directory` puts it back. Files must be flushed already.
    """
    old = replaced_name(final)
    with _as_output_error(f"cannot put {final.name} into place"):
        sync_directory(staged)
        exists = final.exists()
        if exists:
            os.rename(final, old)
        try:
            os.rename(staged, final)
            try:
                sync_directory(final.parent)
            except BaseException:
                os.rename(final, staged)  # a failed write shows nothing
                raise
        except BaseException:
            if exists:
                os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def recover_directory(final: Path) -> None:
    """Finish or undo a `publish_directory` that a crash interrupted. The caller holds the lock."""
    old = replaced_name(final)
    if not old.exists():
        return
    with _as_output_error(f"cannot restore {final.name}"):
        if final.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, final)


def replaced_name(final: Path) -> Path:
    """Where the previous directory waits while a new one takes its name."""
    return final.with_name(f".{final.name}.replaced")


class RunLock:
    """An exclusive lock on writing `target`; a second run gets OutputError at once.

    The kernel drops it when the process ends, however it ends, so there are no stale locks.
    Where there are none (some network file systems) it says so and goes on without.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f".{target.name}.lock")
        self._lock = FileLock(
            self._path, blocking=False, thread_local=False, fallback_to_soft=False
        )

    def __enter__(self) -> Self:
        with _as_output_error(f"cannot lock {self._target.name}"):
            try:
                self._lock.acquire()
            except Timeout:
                raise OutputError(
                    f"{self._target} is being written by another run; wait for it, "
                    "or choose another output"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                name = self._target.name
                log.warning("%s: no locks here; do not write it from two runs at once", name)
        return self

    def __exit__(self, *_: object) -> None:
        # While it is held: whoever opened the file before this will find that it has no name.
        with suppress(OSError):
            self._path.unlink()
        self._lock.release()


@contextmanager
def _as_output_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what}: {error.strerror or error}") from error
