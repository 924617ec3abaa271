"""The files of an artifact directory: which there may be, safe reading, and their checksums."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from compressor.checkpoint.companions import COMPANIONS
from compressor.checkpoint.companions import TOKENIZER_FILES as TOKENIZER_FILES  # for the server
from compressor.errors import Corrupt, NotADelta, TooLarge

TENSORS = "delta.safetensors"
CONFIG = "delta_config.json"
CHECKSUMS = "SHA256SUMS"
README = "README.md"
_MAX_BYTES = {TENSORS: 1 << 36, CONFIG: 64 << 20, CHECKSUMS: 1 << 16}
_MAX_AUXILIARY_BYTES = 256 << 20
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]{0,127})")


def is_auxiliary(name: str) -> bool:
    """Whether a file of this name may travel in an artifact: data that transformers parses."""
    return name in COMPANIONS


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """Open an artifact directory; every read then goes through it, whatever is renamed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError as error:
        raise NotADelta(
            f"{path.name} may not be read by this process's user; allow it (chmod a+rx) or run as "
            "the owner"
        ) from error
    except OSError as error:
        raise NotADelta(f"{path.name} cannot be opened as a directory: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(directory: int, name: str) -> bytearray:
    """Read one file whole into memory.

    Raises Corrupt if it is missing, a symbolic link, not a regular file, unreadable, or changes
    size meanwhile; TooLarge beyond the limit for its kind. Never blocks on a pipe or device.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise Corrupt(f"{name} is missing") from None
    except PermissionError as error:
        raise Corrupt(
            f"{name} may not be read by this process's user; allow it (chmod a+r) or run as the "
            "owner"
        ) from error
    except OSError as error:
        raise Corrupt(
            f"{name} cannot be opened ({error.strerror}); it must be a readable regular file, "
            "not a link"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Corrupt(f"{name} is not a regular file")
        limit = _MAX_BYTES.get(name, _MAX_AUXILIARY_BYTES)
        if status.st_size > limit:
            raise TooLarge(f"{name}: {status.st_size} bytes, the limit is {limit}")
        return _read_exactly(descriptor, status.st_size, name)
    except OSError as error:
        raise Corrupt(f"{name} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _read_exactly(descriptor: int, size: int, name: str) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    position = 0
    while position < size:
        n_read = os.readv(descriptor, [view[position : position + (64 << 20)]])
        if n_read == 0:
            raise Corrupt(f"{name} became shorter while it was read")
        position += n_read
    return buffer


def read_checksums(directory: int) -> tuple[dict[str, str], str]:
    """Return the sha256 of every file by name, and the artifact's digest.

    Raises NotADelta without a ``SHA256SUMS``, Corrupt if it is not in the one form we write.
    """
    try:
        os.stat(CHECKSUMS, dir_fd=directory, follow_symlinks=False)
    except OSError:
        raise NotADelta(
            f"no {CHECKSUMS} here: not a delta artifact (or an incomplete copy of one)"
        ) from None
    raw = bytes(read_file(directory, CHECKSUMS))
    sums: dict[str, str] = {}
    try:
        lines = raw.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise Corrupt(f"{CHECKSUMS} is not text") from None
    if lines.pop() != "":
        raise Corrupt(f"{CHECKSUMS} is cut short")
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise Corrupt(f"{CHECKSUMS} does not parse")
        sums[match[2]] = match[1]
    if raw != format_checksums(sums):
        raise Corrupt(f"{CHECKSUMS} is not sorted or names a file twice")
    for name in (CONFIG, TENSORS):
        if name not in sums:
            raise Corrupt(f"{CHECKSUMS} does not list {name}")
    for name in sums:
        if name not in (CONFIG, TENSORS) and not is_auxiliary(name):
            raise Corrupt(f"{name} does not belong in a delta artifact")
    return sums, hashlib.sha256(raw).hexdigest()


def format_checksums(sums: Mapping[str, str]) -> bytes:
    """Return the bytes of ``SHA256SUMS``: coreutils format, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode("ascii")


def read_verified(directory: int, name: str, sums: Mapping[str, str]) -> bytearray:
    """Read one file and compare it with its checksum."""
    buffer = read_file(directory, name)
    if hashlib.sha256(buffer).hexdigest() != sums[name]:
        raise Corrupt(f"{name} differs from its checksum; copy or compress the delta again")
    return buffer


def check_listing(directory: int, sums: Mapping[str, str]) -> int:
    """Check that nothing else is there, and return the bytes of all files together.

    Names that begin with a dot (what git and the Hub client leave) are ignored, never read.
    """
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name not in sums and entry.name not in (README, CHECKSUMS):
                raise Corrupt(f"{entry.name!r:.80} is not listed in {CHECKSUMS}; remove it")
            total += entry.stat(follow_symlinks=False).st_size
    return total
