"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

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
