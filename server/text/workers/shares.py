"""Which waiting task is next: fair between keys, and no share of the work takes all workers.

A task has a key (whose turn it is: a variant; later a tenant) and shares (what it counts for: its
key, long texts). Keys take turns. Each share may have all workers but one of those that are ready,
so that whoever fills one always leaves a worker for others, also while one is being replaced.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import Generic, Protocol, TypeVar


class Shared(Protocol):
    """What waits."""

    @property
    def key(self) -> str: ...
    @property
    def shares(self) -> tuple[str, ...]: ...
    @property
    def is_wanted(self) -> bool: ...


T = TypeVar("T", bound=Shared)


class ShareQueue(Generic[T]):
    """Not thread-safe; the pool has a lock."""

    def __init__(self, n_workers: int, max_waiting: int) -> None:
        self._n_workers = n_workers
        self._max_waiting = max_waiting
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._running: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(tasks) for tasks in self._waiting.values())

    def put(self, task: T) -> bool:
        """Queue a task; False if too many wait."""
        if len(self) >= self._max_waiting:
            self._forget_unwanted()
        if len(self) >= self._max_waiting:
            return False
        self._waiting.setdefault(task.key, deque()).append(task)
        return True

    def take(self, n_ready: int) -> T | None:
        """The next task that may run; it counts for its shares until `done`.

        n_ready  workers that do a task or wait for one
        """
        most = 1 if self._n_workers == 1 else n_ready - 1
        for key in list(self._waiting):
            task = self._take_of(key, most)
            if task is not None:
                self._running.update(task.shares)
                return task
        return None

    def done(self, task: T) -> None:
        """A task that was taken has ended."""
        self._running.subtract(task.shares)
        self._running += Counter()  # drops those at zero

    def clear(self) -> list[T]:
        """Forget all that wait, and return them."""
        tasks = [task for waiting in self._waiting.values() for task in waiting]
        self._waiting.clear()
        return tasks

    def _take_of(self, key: str, most: int) -> T | None:
        """The first task of a key whose shares have fewer workers than `most`; its key's turn is
        then over.
        """
        tasks = self._waiting[key]
        for at, task in enumerate(tasks):
            if any(self._running[share] >= most for share in task.shares):
                continue
            del tasks[at]
            del self._waiting[key]
            if tasks:
                self._waiting[key] = tasks  # last in turn
            return task
        return None

    def _forget_unwanted(self) -> None:
        for key, tasks in list(self._waiting.items()):
            wanted = deque(task for task in tasks if task.is_wanted)
            if wanted:
                self._waiting[key] = wanted
            else:
                del self._waiting[key]
