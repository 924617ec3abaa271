"""A thread that writes rows in batches, and a queue before it that never makes anybody wait.

What cannot be written stays in the queue and is tried again; when the queue is full, new rows are
dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from server.ledger.records import LedgerStats

GATHER_S = 0.2  # rows that come within so long are one batch
BREATH_S = 0.01  # between batches while more wait: streams want the interpreter, too
MAX_BATCH = 50  # few, so that the event loop soon has the interpreter again
LAST_BATCH = 1000  # when nobody else needs it
MAX_PENDING = 50_000  # rows; 31 MB
FIRST_RETRY_S = 0.25
LAST_RETRY_S = 5.0
LOG_AGAIN_S = 60.0

log = logging.getLogger(__name__)
T = TypeVar("T")


class BatchWriter(Generic[T]):
    """Thread-safe. `start`, then `put`, and `close` in the end."""

    def __init__(
        self,
        write: Callable[[Sequence[T]], int],
        *,
        explain: Callable[[Exception], str] = str,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """Write rows by `write`, which raises or returns how many no database will ever take.

        explain  what an error of `write` says in the log
        """
        self._write = write
        self._explain = explain
        self._max_pending = max_pending
        self._pending: deque[T] = deque()
        self._changed = threading.Condition()
        self._closes_at: float | None = None  # time.monotonic() at which it gives up
        self._n_written = self._n_failures = self._n_dropped = 0
        self._logged_at = -LOG_AGAIN_S
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, row: T, *, beyond: int = 0) -> bool:
        """Queue a row; False if it was dropped. `beyond` is how many more than usual may wait."""
        with self._changed:
            if self._closes_at is not None or len(self._pending) >= self._max_pending + beyond:
                self._n_dropped += 1
                return False
            self._pending.append(row)
            if len(self._pending) == 1:
                self._changed.notify_all()
            return True

    def stats(self) -> LedgerStats:
        with self._changed:
            return LedgerStats(
                self._n_written, self._n_failures, self._n_dropped, len(self._pending)
            )

    def close(self, timeout_s: float) -> int:
        """Write what waits and end; return how many rows are lost after `timeout_s`."""
        with self._changed:
            self._closes_at = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s + 0.1)
        return self.stats().n_pending

    def _run(self) -> None:
        retry_s = 0.0  # none: the last try went well
        while True:
            batch = self._next_batch(retry_s)
            if not batch:
                return
            try:
                n_refused = self._write(batch)
            except Exception as error:  # of any kind: the next try may be luckier
                retry_s = min(2 * retry_s, LAST_RETRY_S) or FIRST_RETRY_S
                self._failed(error)
            else:
                retry_s = 0.0
                self._done(len(batch), n_refused)

    def _next_batch(self, retry_s: float) -> list[T]:
        """Wait for rows, and a little for more of them; none when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closes_at is not None)
            if self._closes_at is None:
                gather_s = GATHER_S if len(self._pending) < MAX_BATCH else BREATH_S
                self._changed.wait_for(lambda: self._closes_at is not None, retry_s or gather_s)
            elif retry_s:
                if time.monotonic() >= self._closes_at:
                    return []
                self._changed.wait(FIRST_RETRY_S)
            most = MAX_BATCH if self._closes_at is None else LAST_BATCH
            return list(islice(self._pending, most))

    def _done(self, n_rows: int, n_refused: int) -> None:
        with self._changed:
            for _ in range(n_rows):
                self._pending.popleft()
            self._n_written += n_rows - n_refused
            self._n_dropped += n_refused
            n_pending = len(self._pending)
        if self._logged_at > 0 and n_pending < MAX_BATCH:
            self._logged_at = -LOG_AGAIN_S
            log.info("the ledger is written again")

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._n_failures += 1
            n_pending, n_dropped = len(self._pending), self._n_dropped
        if time.monotonic() - self._logged_at < LOG_AGAIN_S:
            return
        self._logged_at = time.monotonic()
        log.error(
            "the ledger cannot be written (%s); the server goes on, %d rows wait for the next try, "
            "%d were dropped",
            self._explain(error),
            n_pending,
            n_dropped,
        )
