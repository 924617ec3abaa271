"""What a directory looked like: enough to see that its files were replaced, without reading them.

Failures are remembered with it: who asks again for an artifact that was found broken gets the
answer for a few system calls, and a mended one is read again at once.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from server.deltas.failures import Failure

Fingerprint = tuple[tuple[str, int, int, int, int], ...]
MAX_ENTRIES = 64  # an artifact has at most 15; of a heap of files the first will do


def fingerprint_of(path: Path) -> Fingerprint | None:
    """Name, inode, size, time of content and of attributes of the directory and of each file in it;
    None if that cannot be had.
    """
    try:
        with os.scandir(path) as entries:
            found = [entry for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
        stats = [(".", os.stat(path))]
        stats += [(entry.name, entry.stat(follow_symlinks=False)) for entry in found]
    except OSError:
        return None
    return tuple(
        (name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in sorted(stats)
    )


class KnownFailures:
    """Failures of directories, each for as long as its files stay as they are. Thread-safe.

    use  what the directory failed to be good for; it may be good for something else
    """

    def __init__(self) -> None:
        self._failures: dict[tuple[Path, str], tuple[Fingerprint, Failure]] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def of(self, path: Path, use: str) -> Failure | None:
        """What was noted of this directory, if it is still as it was then."""
        noted = self._failures.get((path, use))
        if noted is None:
            return None
        if fingerprint_of(path) == noted[0]:
            return noted[1]
        self._failures.pop((path, use), None)
        return None

    def note(self, path: Path, use: str, seen: Fingerprint | None, failure: Failure) -> None:
        """Remember a failure. `seen` is of before the directory was read: if somebody replaced
        files meanwhile, the next who asks sees a difference.
        """
        if seen is not None:
            self._failures[path, use] = (seen, failure)

    def keep(self, paths: Collection[Path]) -> None:
        """Forget all other directories."""
        for key in list(self._failures):
            if key[0] not in paths:
                self._failures.pop(key, None)
