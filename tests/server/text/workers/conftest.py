"""A pool over a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from server.text.encoding import Conversation, LengthLimit
from server.text.workers.frames import Frame
from server.text.workers.pool import Limits, TextTask, TextWorkers

LIMIT = LengthLimit(400, 100_000)
LIMITS = Limits(cpu_s=1.0, wall_s=60.0, memory_bytes=1 << 30)
ARITHMETIC = "{{ 7 ** 30000000 % 7 }}"  # minutes, with the interpreter held
HUNGRY = "{{ 'a' * 3000000000 }}"
LOOPS = "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


class Pool:
    """Text workers and short ways to give them tasks."""

    def __init__(self, workers: TextWorkers, folder: Path) -> None:
        self.workers = workers
        self.folder = folder

    def chat(
        self,
        template: str = "{{ 'ok' }}",
        *,
        key: str = "base",
        shares: tuple[str, ...] = (),
        tenant: str = "",
    ) -> Future[Frame]:
        conversation = Conversation([{"role": "user", "content": "x"}], template)
        record = {"limit": asdict(LIMIT), "conversation": asdict(conversation)}
        return self.give("render", record, key=key, shares=shares, tenant=tenant)

    def give(self, name: str, record: dict[str, Any], blob: bytes = b"", **task: Any) -> Any:
        fields = {"key": "base", "shares": ()} | task
        folder = fields.pop("folder", self.folder)
        return self.workers.submit(TextTask(name, str(folder), record=record, blob=blob, **fields))


@pytest.fixture
def pool_of(tiny_llama: Path) -> Iterator[Callable[..., Pool]]:
    """Make pools; they are closed afterwards."""
    made: list[TextWorkers] = []

    def make(n_workers: int = 1, limits: Limits = LIMITS) -> Pool:
        made.append(TextWorkers(n_workers, limits))
        return Pool(made[-1], tiny_llama)

    yield make
    for workers in made:
        workers.close()
