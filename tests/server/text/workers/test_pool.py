"""The pool with real processes: limits, replacement, shares, cancelling, the end."""

from __future__ import annotations

import copy
import copyreg
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from server.errors import InvalidRequest, QueueFull
from server.text.workers import pool as module
from server.text.workers.pool import TaskFailed
from server.text.workers.tasks import ids_of, share_added_tokens
from server.text.workers.worker import Reason, WorkerEnded
from tests.server.text.workers.conftest import ARITHMETIC, HUNGRY, LIMITS, LOOPS, Pool

Make = Callable[..., Pool]
PATIENCE_S = 120  # for a busy machine; nothing is timed by it


def children() -> set[int]:
    """Processes whose parent this one is."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getpid():
                found.add(int(entry.name))
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_tasks_are_done_as_they_would_be_here(pool_of: Make, tiny_llama: Path) -> None:
    pool = pool_of()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert ids_of(pool.chat("fox").result(PATIENCE_S)) == tokenizer.encode(
        "fox", add_special_tokens=False
    )


def test_task_over_its_limits_ends_and_the_next_is_done(pool_of: Make) -> None:
    pool = pool_of()
    wanted: dict[Reason, list[str]] = {"cpu": [ARITHMETIC, LOOPS], "memory": [HUNGRY]}
    for reason, templates in wanted.items():
        for template in templates:
            pool.chat().result(PATIENCE_S)  # a task that loads a tokenizer may take longer
            bad, good = pool.chat(template), pool.chat()
            with pytest.raises(WorkerEnded) as caught:
                bad.result(PATIENCE_S)
            assert caught.value.reason == reason
            assert good.result(PATIENCE_S).blob
    stats = pool.workers.stats()
    assert (stats.n_kills, stats.n_waiting) == ({"cpu": 2, "memory": 1}, 0)


def test_task_over_its_wall_time_ends(pool_of: Make) -> None:
    pool = pool_of(limits=replace(LIMITS, cpu_s=600.0, wall_s=2.0))
    pool.chat().result(PATIENCE_S)
    with pytest.raises(WorkerEnded) as caught:
        pool.chat(ARITHMETIC).result(PATIENCE_S)
    assert caught.value.reason == "wall"


def test_time_in_the_queue_is_not_counted(pool_of: Make) -> None:
    """All of them together take longer than one may."""
    pool = pool_of(limits=replace(LIMITS, cpu_s=60.0, wall_s=4.0))
    pool.chat().result(PATIENCE_S)
    busy = (
        "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}"
        "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}ok"
    )
    started = time.monotonic()
    pool.chat(busy).result(PATIENCE_S)
    n_tasks = 2 + int(4.0 / (time.monotonic() - started))
    for task in [pool.chat(busy) for _ in range(n_tasks)]:
        assert task.result(PATIENCE_S).blob


def test_errors_of_a_task_keep_the_worker(pool_of: Make, tmp_path: Path) -> None:
    pool = pool_of()
    before = pool.workers.stats()
    with pytest.raises(InvalidRequest, match="no such role") as caught:
        pool.chat("{{ raise_exception('no such role') }}").result(PATIENCE_S)
    assert caught.value.param == "messages"
    with pytest.raises(TaskFailed):
        pool.give("encode", {}, folder=tmp_path).result(PATIENCE_S)
    with pytest.raises(TaskFailed, match="KeyError"):
        pool.give("unknown", {}).result(PATIENCE_S)
    assert pool.chat().result(PATIENCE_S).blob
    assert pool.workers.stats().n_kills == before.n_kills == {}


def test_share_of_one_variant_leaves_a_worker_for_others(pool_of: Make) -> None:
    pool = pool_of(n_workers=2, limits=replace(LIMITS, cpu_s=600.0, wall_s=600.0))
    hogs = [pool.chat(LOOPS, key="bad", shares=("bad",)) for _ in range(3)]
    for _ in range(5):
        assert pool.chat(key="good", shares=("good",)).result(PATIENCE_S).blob
    assert not any(hog.done() for hog in hogs)
    for hog in hogs:
        hog.cancel()


def test_tenant_that_floods_with_slow_templates_leaves_a_worker_for_others(pool_of: Make) -> None:
    pool = pool_of(n_workers=2, limits=replace(LIMITS, cpu_s=600.0, wall_s=600.0))
    assert pool.chat(tenant="b").result(PATIENCE_S).blob
    flood = [pool.chat(LOOPS, key=f"v{i}", shares=(f"v{i}",), tenant="a") for i in range(4)]
    for _ in range(5):
        assert pool.chat(tenant="b").result(PATIENCE_S).blob
    assert not any(task.done() for task in flood)
    for task in flood:
        task.cancel()


def test_cancelled_task_leaves_the_queue_and_its_worker(pool_of: Make) -> None:
    pool = pool_of(limits=replace(LIMITS, cpu_s=600.0, wall_s=600.0))
    running, waiting = pool.chat(ARITHMETIC), pool.chat(LOOPS)
    until(lambda: pool.workers.stats().n_busy == 1)
    assert waiting.cancel()
    assert running.cancel()
    assert pool.chat().result(PATIENCE_S).blob
    assert pool.workers.stats().n_kills == {"abandoned": 1}


def test_full_queue_refuses(pool_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    pool = pool_of(limits=replace(LIMITS, cpu_s=600.0, wall_s=600.0))
    first = pool.chat(LOOPS)
    until(lambda: pool.workers.stats().n_busy == 1)
    waiting = [pool.chat() for _ in range(2)]
    with pytest.raises(QueueFull):
        pool.chat()
    first.cancel()
    assert all(task.result(PATIENCE_S).blob for task in waiting)


def test_close_ends_every_process_and_drops_what_waits(pool_of: Make) -> None:
    before = children()
    pool = pool_of(n_workers=2, limits=replace(LIMITS, cpu_s=600.0, wall_s=600.0))
    busy = [pool.chat(ARITHMETIC) for _ in range(3)]
    until(lambda: pool.workers.stats().n_busy == 2)
    assert len(children() - before) == 2
    pool.workers.close()
    assert children() <= before
    assert busy[2].cancelled()
    with pytest.raises(QueueFull):
        pool.chat()


def test_worker_that_ended_while_it_waited_is_replaced_before_the_next_task(
    pool_of: Make,
) -> None:
    before = children()
    pool = pool_of()
    pool.chat().result(PATIENCE_S)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    until(lambda: "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())
    assert pool.chat().result(PATIENCE_S).blob
    assert pool.workers.stats().n_kills == {"crash": 1}


def test_worker_that_cannot_start_is_tried_again(
    pool_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of()
    make = pool.workers._make_worker
    failures = iter([OSError("no more processes")])

    def flaky(memory_bytes: int, first_folder: str) -> object:
        for error in failures:
            raise error
        return make(memory_bytes, first_folder)

    monkeypatch.setattr(pool.workers, "_make_worker", flaky)
    monkeypatch.setattr(module, "RESTART_WAIT_S", 0.01)
    assert pool.chat().result(PATIENCE_S).blob


def test_added_tokens_are_shared_by_copies_of_settings_and_equal() -> None:
    token = AddedToken("<a>", special=True)
    try:
        share_added_tokens()
        copied = copy.deepcopy({"tokens": [token], "name": ["x"]})
        assert copied["tokens"][0] is token
    finally:
        del copyreg.dispatch_table[AddedToken]
    assert copy.deepcopy(token) is not token
