"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
PARTS = 1000  # of a stage that is told in shares

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the work done in it so far, and all of its work."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
    del stage, done, total


def counted(
    progress: Progress, stage: str, items: Sequence[T], size: Callable[[T], int]
) -> Iterator[T]:
    """Yield the items, telling before each how much of the stage is done, and in the end all."""
    sizes = [size(item) for item in items]
    done = 0
    for item, item_size in zip(items, sizes, strict=True):
        progress(stage, done, sum(sizes))
        yield item
        done += item_size
    progress(stage, sum(sizes), sum(sizes))


def within(progress: Progress, stage: str, start: float, end: float) -> Progress:
    """Return a Progress for work that is only a share of a stage: whatever its own stages are
    called, they are told as going from `start` to `end` (0 to 1) of `stage`, and never back.
    """
    furthest = round(start * PARTS)

    def tell(_: str, done: int, total: int) -> None:
        nonlocal furthest
        share = done / total if total else 1.0
        furthest = max(furthest, round((start + (end - start) * share) * PARTS))
        progress(stage, furthest, PARTS)

    return tell


@contextmanager
def whole(progress: Progress, stage: str) -> Iterator[None]:
    """Tell of work that cannot be counted: that it begins, and that it is over, however it ends."""
    progress(stage, 0, 1)
    try:
        yield
    finally:
        progress(stage, 1, 1)
