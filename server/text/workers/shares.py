"""Which waiting task is next: fair between tenants and between a tenant's variants, and no share of
the work takes all workers.

A task has a tenant, a key (a variant's or the base's) and shares (what it counts for: its key, long
texts). Tenants take turns, and within a tenant's turns its keys do. Each share may have all workers
but one of those that are ready, so that whoever fills one always leaves a worker for others, also
while one is being replaced. So may each tenant, once there are several.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from itertools import chain
from typing import Generic, Protocol, TypeVar


class Shared(Protocol):
    """What waits. The server's own work is no tenant's: "", which has no share."""

    @property
    def tenant(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def shares(self) -> tuple[str, ...]: ...
    @property
    def is_wanted(self) -> bool: ...


T = TypeVar("T", bound=Shared)
Turns = OrderedDict[str, deque[T]]  # of one tenant, by key


class ShareQueue(Generic[T]):
    """Not thread-safe; the pool has a lock."""

    def __init__(self, n_workers: int, max_waiting: int) -> None:
        self._n_workers = n_workers
        self._max_waiting = max_waiting
        self._turns: OrderedDict[str, Turns[T]] = OrderedDict()  # by tenant
        self._tenants: set[str] = set()  # that have had work
        self._running: Counter[str] = Counter()  # by share
        self._running_of: Counter[str] = Counter()  # by tenant

    def __len__(self) -> int:
        return sum(len(tasks) for turns in self._turns.values() for tasks in turns.values())

    def put(self, task: T) -> bool:
        """Queue a task; False if too many wait."""
        if len(self) >= self._max_waiting:
            self._forget_unwanted()
        if len(self) >= self._max_waiting:
            return False
        self._add(task)
        return True

    def take(self, n_ready: int) -> T | None:
        """The next task that may run; it counts for its tenant and its shares until `done`.

        n_ready  workers that do a task or wait for one
        """
        most = 1 if self._n_workers == 1 else n_ready - 1
        for tenant, turns in list(self._turns.items()):
            if self._has_share(tenant) and self._running_of[tenant] >= most:
                continue
            task = self._take_of(turns, most)
            if task is not None:
                del self._turns[tenant]
                if turns:
                    self._turns[tenant] = turns  # last in turn
                self._running.update(task.shares)
                self._running_of[tenant] += 1
                return task
        return None

    def done(self, task: T) -> None:
        """A task that was taken has ended."""
        self._running.subtract(task.shares)
        self._running += Counter()  # drops those at zero
        self._running_of[task.tenant] -= 1

    def clear(self) -> list[T]:
        """Forget all that wait, and return them."""
        waiting = [tasks for turns in self._turns.values() for tasks in turns.values()]
        self._turns.clear()
        return list(chain.from_iterable(waiting))

    def _add(self, task: T) -> None:
        if task.tenant:
            self._tenants.add(task.tenant)
        turns: Turns[T] = self._turns.setdefault(task.tenant, OrderedDict())
        turns.setdefault(task.key, deque()).append(task)

    def _has_share(self, tenant: str) -> bool:
        return bool(tenant) and len(self._tenants) > 1

    def _take_of(self, turns: Turns[T], most: int) -> T | None:
        """A tenant's first task whose shares have fewer workers than `most`; its key's turn is then
        over.
        """
        for key, tasks in turns.items():
            for at, task in enumerate(tasks):
                if any(self._running[share] >= most for share in task.shares):
                    continue
                del tasks[at]
                del turns[key]
                if tasks:
                    turns[key] = tasks  # last in turn
                return task
        return None

    def _forget_unwanted(self) -> None:
        for task in self.clear():
            if task.is_wanted:
                self._add(task)
