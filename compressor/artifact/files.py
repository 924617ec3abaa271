"""The files of an artifact directory: which there may be, safe reading, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from compressor.checkpoint.companions import COMPANIONS
from compressor.checkpoint.companions import TOKENIZER_FILES as TOKENIZER_FILES  # for the server
from compressor.errors import Corrupt, NotADelta, TooLarge, Unreadable

TENSORS = "delta.safetensors"
CONFIG = "delta_config.json"
CHECKSUMS = "SHA256SUMS"
CERTIFICATE = "certificate.json"
SIGNATURES = "SHA256SUMS.sig"
README = "README.md"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
_MAX_BYTES = {
    TENSORS: 1 << 36,
    CONFIG: 64 << 20,
    CHECKSUMS: 1 << 16,
    CERTIFICATE: 1 << 18,
    SIGNATURES: 1 << 13,
    GENERATION: 1 << 20,
    TEMPLATE: 1 << 20,
}
_MAX_AUXILIARY_BYTES = 256 << 20
# What opening a link (which we do not follow), a socket or a device without a driver ends with.
_NOT_A_FILE = (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.ENODEV)
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]{0,127})")


def is_auxiliary(name: str) -> bool:
    """Whether a file of this name may travel in an artifact beside tensors and configuration: data
    that transformers parses, and the certificate.
    """
    return name in COMPANIONS or name == CERTIFICATE


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    """Open an artifact directory; every read then goes through it, whatever is renamed.

    Raises NotADelta if there is none, Unreadable if the system does not open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotADelta(f"{path.name} cannot be opened as a directory: {error.strerror}") from error
    except OSError as error:
        _unreadable("its directory", error)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_file(directory: int, name: str) -> bytearray:
    """Read one file whole into memory.

    Raises Corrupt if it is missing, a symbolic link, not a regular file, or changes size meanwhile;
    Unreadable if the system does not let us; TooLarge beyond the limit for its kind. Never blocks
    on a pipe or device.
    """
    with _opened(directory, name) as (descriptor, n_bytes):
        try:
            return _read_exactly(descriptor, n_bytes, name)
        except OSError as error:
            _unreadable(name, error)


@contextmanager
def _opened(directory: int, name: str) -> Iterator[tuple[int, int]]:
    """Open one file, and say how many bytes it has; raises what `read_file` says."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        raise Corrupt(f"{name} is missing") from None
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise Corrupt(f"{name} must be a regular file, not a link") from error
        _unreadable(name, error)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Corrupt(f"{name} is not a regular file")
        _check_size(name, status.st_size)
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _unreadable(what: str, error: OSError) -> NoReturn:
    if isinstance(error, PermissionError):
        raise Unreadable(
            f"{what} may not be read by this process's user; allow it (chmod a+rX) or run as the "
            "owner"
        ) from error
    raise Unreadable(f"{what} cannot be read: {error.strerror}") from error


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


def read_if_there(directory: int, name: str) -> bytes | None:
    """Read one file as `read_file` does; None if there is none."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        _unreadable(name, error)
    return bytes(read_file(directory, name))


def read_checksums(directory: int) -> tuple[dict[str, str], str]:
    """Return the sha256 of every file by name, and the artifact's digest.

    Raises NotADelta without a ``SHA256SUMS``, Corrupt if it is not in the one form we write.
    """
    try:
        os.stat(CHECKSUMS, dir_fd=directory, follow_symlinks=False)
    except PermissionError as error:  # the directory may be listed, but not searched
        _unreadable(CHECKSUMS, error)
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
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name not in sums and entry.name not in (README, CHECKSUMS, SIGNATURES):
                    raise Corrupt(f"{entry.name!r:.80} is not listed in {CHECKSUMS}; remove it")
                total += entry.stat(follow_symlinks=False).st_size
    except OSError as error:
        _unreadable("its directory", error)
    return total


def check_files(directory: int, sums: Mapping[str, str]) -> None:
    """Check, without reading them, that all listed files can be read and are not too large.

    Raises Corrupt, TooLarge, Unreadable.
    """
    for name in sums:
        with _opened(directory, name) as (_, n_bytes):
            if n_bytes == 0 and name in (CONFIG, TENSORS):
                raise Corrupt(f"{name} is empty")


def check_sums(directory: int, sums: Mapping[str, str]) -> None:
    """Compare each listed file with its checksum, in little memory. Raises as `read_verified`."""
    for name, wanted in sums.items():
        with (
            _opened(directory, name) as (descriptor, _),
            os.fdopen(os.dup(descriptor), "rb") as file,
        ):
            try:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                _unreadable(name, error)
        if found != wanted:
            raise Corrupt(f"{name} differs from its checksum; copy or compress the delta again")


def _check_size(name: str, n_bytes: int) -> None:
    limit = _MAX_BYTES.get(name, _MAX_AUXILIARY_BYTES)
    if n_bytes > limit:
        raise TooLarge(f"{name}: {n_bytes} bytes, the limit is {limit}")
