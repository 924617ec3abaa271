"""How far `auto` is with what it tries: one stage for each try, out of as many as are expected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compressor.progress import Progress, within

# From where to where of a try each part of it goes: about as long as it takes.
_PARTS = {"sample": (0.0, 0.1), "encode": (0.1, 0.5), "variant": (0.5, 1.0)}


class Tries:
    """Counts tries and tells of them as ``try 2 of 4``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._n_begun = 0
        self._n_expected = 0
        self._about = ""

    def expect(self, n: int, *, at_most: bool = False) -> None:
        """So many more are to come, or `at_most` so many."""
        self._n_expected += n
        self._about = self._about or ("up to " if at_most else "")

    @contextmanager
    def next(self) -> Iterator[Progress]:
        """Yield what the parts of one try tell; afterwards it is over, however it ended."""
        self._n_begun += 1
        stage = f"try {self._n_begun} of {self._about}{max(self._n_begun, self._n_expected)}"
        shares = {part: within(self._progress, stage, *ends) for part, ends in _PARTS.items()}
        try:
            yield lambda part, done, total: shares[part](part, done, total)
        finally:
            self._progress(stage, 1, 1)
