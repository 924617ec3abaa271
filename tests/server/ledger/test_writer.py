"""The writer's thread, with rows kept by the test: batches, retries, losses, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest

from server.ledger import writer
from server.ledger.writer import BatchWriter


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Broken(Exception):
    """What the database says while it cannot be written."""


class Store:
    """Keeps rows, or refuses them while `broken`."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.batches: list[int] = []
        self.broken = threading.Event()

    def write(self, rows: Sequence[int]) -> int:
        if self.broken.is_set():
            raise Broken("disk full")
        kept = [row for row in rows if row >= 0]
        self.rows += kept
        self.batches.append(len(rows))
        return len(rows) - len(kept)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(writer, "LAST_RETRY_S", 0.02)


def started(store: Store, max_pending: int = 10_000) -> BatchWriter[int]:
    made = BatchWriter(store.write, max_pending=max_pending)
    made.start()
    return made


def test_rows_of_several_threads_are_written_whole_and_in_batches() -> None:
    store = Store()
    writing = started(store)
    threads = [
        threading.Thread(target=lambda n=n: [writing.put(i) for i in range(n, 2000, 4)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writing.close(20) == 0
    assert sorted(store.rows) == list(range(2000))
    assert max(store.batches) <= writer.LAST_BATCH
    assert len(store.batches) < 500, "most rows share a transaction"
    assert writing.stats().n_written == 2000


def test_rows_wait_while_the_database_is_broken_and_are_written_in_order_once_it_is_not(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    store.broken.set()
    writing = started(store)
    for row in range(3):
        assert writing.put(row)
    until(lambda: writing.stats().n_failures >= 3)
    assert writing.stats().n_pending == 3
    store.broken.clear()
    writing.put(3)
    until(lambda: writing.stats().n_written == 4)
    assert store.rows == [0, 1, 2, 3]
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1, "a line a minute, however many tries"
    assert "disk full" in told[0]
    assert writing.close(5) == 0


def test_full_queue_drops_what_comes_counts_it_and_keeps_room_for_what_may_go_beyond(
    quick: None,
) -> None:
    store = Store()
    store.broken.set()
    writing = started(store, max_pending=2)
    assert [writing.put(row) for row in range(4)] == [True, True, False, False]
    assert writing.put(9, beyond=1)
    assert not writing.put(10, beyond=1)
    assert (writing.stats().n_dropped, writing.stats().n_pending) == (3, 3)
    store.broken.clear()
    until(lambda: writing.stats().n_pending == 0)
    assert store.rows == [0, 1, 9]
    assert writing.close(5) == 0


def test_close_tries_until_its_time_is_up_and_says_what_is_lost(quick: None) -> None:
    store = Store()
    store.broken.set()
    writing = started(store)
    writing.put(1)
    assert writing.close(0.1) == 1
    assert writing.stats().n_failures >= 1
    assert not writing.put(2), "nobody would write it"


def test_close_does_not_wait_for_a_database_that_hangs() -> None:
    hangs = threading.Event()
    writing = BatchWriter[int](lambda rows: int(not hangs.wait(60)))
    writing.start()
    writing.put(1)
    assert writing.close(0.1) == 1
    hangs.set()


def test_close_writes_what_the_database_takes_in_the_last_moment(quick: None) -> None:
    store = Store()
    store.broken.set()
    writing = started(store)
    for row in range(1200):
        writing.put(row)
    until(lambda: writing.stats().n_failures > 0)
    threading.Timer(0.05, store.broken.clear).start()
    assert writing.close(20) == 0
    assert store.rows == list(range(1200))


def test_rows_that_no_database_takes_are_counted_as_dropped() -> None:
    store = Store()
    writing = started(store)
    for row in (1, -1, 2):
        writing.put(row)
    assert writing.close(20) == 0
    assert (writing.stats().n_written, writing.stats().n_dropped) == (2, 1)
