"""One text worker for many engines: each engine's own would take a second of CPU time to start."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.settings import Settings
from server.text import service
from server.text.workers.frames import Frame
from server.text.workers.pool import Limits, PoolStats, TextTask, TextWorkers


class LentWorkers:
    """A pool that outlives the engine which closes it."""

    def __init__(self, pool: TextWorkers) -> None:
        self._pool = pool

    def start(self) -> None:
        self._pool.start()

    def submit(self, task: TextTask) -> Future[Frame]:
        return self._pool.submit(task)

    def stats(self) -> PoolStats:
        return self._pool.stats()

    def close(self) -> None:
        """Leave the pool to the next engine."""


def usual_limits() -> Limits:
    """Those of settings that say nothing about text."""
    settings = Settings(base=Path("unused"))
    return Limits(
        settings.text_task_cpu_s, settings.text_task_timeout_s, settings.text_worker_memory_bytes
    )


@contextmanager
def lending(pool: TextWorkers) -> Iterator[None]:
    """Engines built meanwhile use the pool, unless their settings want other limits."""

    def lend(n_workers: int, limits: Limits, **options: str) -> TextWorkers | LentWorkers:
        is_usual = limits == usual_limits()
        return LentWorkers(pool) if is_usual else TextWorkers(n_workers, limits, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "TextWorkers", lend)
        yield
