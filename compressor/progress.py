"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the work done in it so far, and all of its work."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
    del stage, done, total
