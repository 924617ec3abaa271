"""The pool of text workers: processes, a thread of the server for each, one queue.

    submit -> ShareQueue -> a thread takes it -> WorkerProcess.run -> the task's future

A thread does nothing but wait for its worker, and replaces it when it has ended. The time that a
task waits is not counted: limits begin with the work. A task whose future is cancelled leaves the
queue, or its worker is ended if it goes on for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from server.errors import ContextTooLong, InvalidRequest, QueueFull
from server.text.description import Undescribed
from server.text.workers.frames import Frame
from server.text.workers.shares import ShareQueue
from server.text.workers.worker import Reason, WorkerEnded, WorkerProcess

log = logging.getLogger(__name__)
MAX_WAITING = 1024
LOAD_FACTOR = 4.0  # the time that loading a tokenizer may take, in times of a task
RESTART_WAIT_S = 5.0  # after a worker that could not start
JOIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one task; memory is a worker's."""

    cpu_s: float
    wall_s: float
    memory_bytes: int


class TaskFailed(Exception):
    """The task raised something unforeseen; the message is that error's name."""


@dataclass(eq=False, slots=True)
class TextTask:
    """One piece of work.

    name    in `server.text.workers.tasks.TASKS`
    folder  of the tokenizer that it is done with
    key     whose turn it is among those of its tenant
    shares  what it counts for; see `server.text.workers.shares`
    tenant  who asks; "": the server itself
    """

    name: str
    folder: str
    key: str
    shares: tuple[str, ...]
    record: dict[str, Any]
    blob: bytes = b""
    tenant: str = ""
    future: Future[Frame] = field(default_factory=Future)

    @property
    def is_wanted(self) -> bool:
        return not self.future.cancelled()


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts for the metrics; kills since the start, by reason."""

    n_busy: int = 0
    n_waiting: int = 0
    n_kills: dict[str, int] = field(default_factory=dict)


class TextWorkers:
    """Thread-safe. Processes start with `start`, or with the first task."""

    def __init__(
        self,
        n_workers: int,
        limits: Limits,
        *,
        first_folder: str = "",
        make_worker: Callable[[int, str], WorkerProcess] = WorkerProcess,
    ) -> None:
        self._limits = limits
        self._first_folder = first_folder
        self._make_worker = make_worker
        self._n_workers = n_workers
        self._queue: ShareQueue[TextTask] = ShareQueue(n_workers, MAX_WAITING)
        self._changed = threading.Condition()
        self._closed = False
        self._n_busy = 0
        self._n_ready = 0  # workers that do a task or wait for one
        self._kills: Counter[str] = Counter()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the processes, so that they are warm when the first task comes."""
        with self._changed:
            if self._threads or self._closed:
                return
            for index in range(self._n_workers):
                name = f"text-worker-{index}"
                self._threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def submit(self, task: TextTask) -> Future[Frame]:
        """Queue a task; return its future, which is the task's own.

        The future raises InvalidRequest, Undescribed, TaskFailed or WorkerEnded. Raises QueueFull.
        """
        self.start()
        with self._changed:
            if self._closed or not self._queue.put(task):
                raise QueueFull(
                    "Too many texts wait to be tokenised; try again later.", retry_after_s=5
                )
            self._changed.notify_all()
        return task.future

    def stats(self) -> PoolStats:
        with self._changed:
            waiting, kills = len(self._queue), dict(self._kills)
            return PoolStats(self._n_busy, waiting, kills)

    def close(self) -> None:
        """Drop what waits and end every process."""
        with self._changed:
            self._closed = True
            left = self._queue.clear()
            self._changed.notify_all()
        for task in left:
            task.future.cancel()
        deadline = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- a worker's thread -----------------------------------------------------------------------

    def _serve(self) -> None:
        worker: WorkerProcess | None = None
        try:
            while not self._closed:
                worker = worker or self._started()
                if worker is None:
                    self._wait_closed(RESTART_WAIT_S)
                    continue
                task = self._next()
                if task is None:
                    return
                if not worker.is_alive:  # ended while it waited: no fault of this task
                    worker = self._replaced(worker)
                if worker is None:
                    self._drop(task)
                elif not self._do(worker, task):
                    worker = None
        finally:
            if worker is not None:
                worker.close()

    def _started(self) -> WorkerProcess | None:
        """A new worker that takes tasks; None if it could not start."""
        try:
            worker = self._make_worker(self._limits.memory_bytes, self._first_folder)
            worker.wait_ready()
        except (OSError, WorkerEnded) as error:
            log.error("a text worker could not start (%s); the server tries again", error)
            return None
        with self._changed:
            self._n_ready += 1
            self._changed.notify_all()
        return worker

    def _replaced(self, worker: WorkerProcess) -> WorkerProcess | None:
        """A new worker in the place of one that has ended; None when the pool is closed."""
        self._count("crash")
        worker.close()
        with self._changed:
            self._n_ready -= 1
        while not self._closed:
            started = self._started()
            if started is not None:
                return started
            self._wait_closed(RESTART_WAIT_S)
        return None

    def _drop(self, task: TextTask) -> None:
        task.future.cancel()
        with self._changed:
            self._n_busy -= 1
            self._queue.done(task)

    def _next(self) -> TextTask | None:
        """Wait for a task; None when the pool is closed."""
        with self._changed:
            while not self._closed:
                task = self._queue.take(self._n_ready)
                if task is not None:
                    self._n_busy += 1
                    return task
                self._changed.wait()
        return None

    def _do(self, worker: WorkerProcess, task: TextTask) -> bool:
        """Do a task and settle its future; return whether the worker is there for another."""
        is_sound = False
        try:
            if task.is_wanted:
                reply = worker.run(self._order(task), self._wall_s, lambda: self._wants(task))
                _settle(task.future, reply)
            is_sound = True
        except WorkerEnded as error:
            self._count(error.reason)
            with suppress(InvalidStateError):
                task.future.set_exception(error)
        except Exception as error:  # of an order that cannot be sent, for one
            log.exception("a text task failed in the server")
            with suppress(InvalidStateError):
                task.future.set_exception(error)
            worker.close()
        finally:
            with self._changed:
                self._n_busy -= 1
                self._n_ready -= not is_sound
                self._queue.done(task)
                self._changed.notify_all()
        return is_sound

    @property
    def _wall_s(self) -> float:
        """The longest that a task may take with the loading of its tokenizer."""
        return self._limits.wall_s * (1 + LOAD_FACTOR)

    def _wants(self, task: TextTask) -> bool:
        return task.is_wanted and not self._closed

    def _order(self, task: TextTask) -> Frame:
        order = {
            "task": task.name,
            "folder": task.folder,
            "record": task.record,
            "cpu_s": self._limits.cpu_s,
            "wall_s": self._limits.wall_s,
            "load_factor": LOAD_FACTOR,
        }
        return Frame(order, task.blob)

    def _count(self, reason: Reason) -> None:
        with self._changed:
            self._kills[reason] += 1
        if reason != "abandoned":
            log.warning("a text worker was ended (%s); another one takes its place", reason)

    def _wait_closed(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, timeout_s)


def _settle(future: Future[Frame], reply: Frame) -> None:
    """Give the task's future what the worker answered."""
    record = reply.record
    error: Exception | None = None
    if "refused" in record:
        param = record.get("param")
        is_too_long = record.get("code") == ContextTooLong.code
        refusal = ContextTooLong if is_too_long else InvalidRequest
        error = refusal(str(record["refused"]), param=None if param is None else str(param))
    elif "unusable" in record:
        error = Undescribed(str(record["unusable"]))
    elif "done" not in record:
        error = TaskFailed(str(record.get("failed", "no reply")))
    with suppress(InvalidStateError):  # cancelled meanwhile
        if error is None:
            future.set_result(Frame(record["done"], reply.blob))
        else:
            future.set_exception(error)
