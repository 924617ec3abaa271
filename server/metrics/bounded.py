"""Series by name, for a bounded number of names: a thousand variants make no million series."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

OTHER = "other"  # the label that all names share for which there is no room

T = TypeVar("T")


class BoundedSeries(Generic[T]):
    """Thread-safe. The first `max_names` names get a label of their own, for good."""

    def __init__(self, make: Callable[[str], T], max_names: int) -> None:
        """`make` returns the series of a label."""
        self._make = make
        self._max_names = max_names
        self._series: dict[str, T] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> T:
        """The series that this name counts for."""
        return self._found(name)[1]

    def label(self, name: str) -> str:
        """The label that this name counts under: its own, or `OTHER`."""
        return self._found(name)[0]

    def items(self) -> list[tuple[str, T]]:
        """All series by their labels."""
        with self._lock:
            return list(self._series.items())

    def _found(self, name: str) -> tuple[str, T]:
        with self._lock:
            label = name if name in self._series or len(self._series) < self._max_names else OTHER
            if label not in self._series:
                self._series[label] = self._make(label)
            return label, self._series[label]
