"""The server's side of one text worker: start it, give it a task, end it.

For one thread of the pool.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from server.text.workers.frames import BrokenFrame, Frame, receive, send

Reason = Literal["cpu", "memory", "wall", "crash", "abandoned"]
# -P: the folder that the server was started in may hold a `server` package of its own.
CHILD = ("-P", "-m", "server.text.workers.child")
PACKAGES = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 120.0  # on a busy, slow machine; about a second otherwise
LOOK_S = 0.1  # how often the server looks whether a task is still wanted
ABANDONED_S = 0.5  # a task that nobody wants may go on so long, which is cheaper than a new worker
LATE_S = 1.0  # the kernel ends a worker in time; the server waits so much longer for that
SEND_TIMEOUT_S = 10.0


class WorkerEnded(Exception):
    """The worker is no more, and the task is not done."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


class WorkerProcess:
    """A process that does tasks; after `WorkerEnded` it is to be replaced."""

    def __init__(self, memory_bytes: int, first_folder: str = "") -> None:
        """Start it. Raises OSError.

        first_folder  of a tokenizer that is loaded before the first task, "": none is
        """
        arguments = [str(memory_bytes), first_folder]
        self._connection, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, *CHILD, str(theirs.fileno()), *arguments],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Wait until it takes tasks. Raises WorkerEnded if it never will."""
        self._connection.settimeout(START_TIMEOUT_S)
        try:
            receive(self._connection)
        except (OSError, EOFError, BrokenFrame) as error:
            raise self._ended("crash") from error

    def run(self, order: Frame, wall_s: float, is_wanted: Callable[[], bool]) -> Frame:
        """Do one task. Raises WorkerEnded.

        wall_s     after which it is ended, whatever the kernel's own timer did
        is_wanted  asked now and then; a task that is not is ended
        """
        try:
            self._connection.settimeout(SEND_TIMEOUT_S)
            send(self._connection, order)
            self._wait(wall_s + LATE_S, is_wanted)
            self._connection.settimeout(SEND_TIMEOUT_S)
            reply = receive(self._connection)
        except TimeoutError as error:
            raise self._ended("wall") from error
        except (OSError, EOFError) as error:
            raise self._ended(None) from error
        except BrokenFrame as error:
            raise self._ended("crash") from error
        if reply.record.get("ended") == "memory":
            raise self._ended("memory")
        return reply

    def close(self) -> None:
        """End the process and wait for it."""
        self._connection.close()
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()

    def _wait(self, wall_s: float, is_wanted: Callable[[], bool]) -> None:
        """Until there is a reply, or the end of the process. Raises WorkerEnded, TimeoutError."""
        started = time.monotonic()
        unwanted_since: float | None = None
        self._connection.settimeout(LOOK_S)
        while not self._has_reply():
            now = time.monotonic()
            if now - started > wall_s:
                raise TimeoutError
            if is_wanted():
                continue
            unwanted_since = unwanted_since or now
            if now - unwanted_since > ABANDONED_S:
                raise self._ended("abandoned")

    def _has_reply(self) -> bool:
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        return True

    def _ended(self, reason: Reason | None) -> WorkerEnded:
        """End it; without a reason, tell that by how it ended itself."""
        if reason is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LATE_S)
            reason = _reason_of(self._process.returncode)
        self.close()
        return WorkerEnded(reason)


def _reason_of(code: int | None) -> Reason:
    if code == -getattr(signal, "SIGPROF", 0):
        return "cpu"
    if code == -getattr(signal, "SIGALRM", 0):
        return "wall"
    # Native code that gets no memory aborts; the kernel may also kill for a lack of it.
    if code in (-signal.SIGABRT, -getattr(signal, "SIGKILL", 9)):
        return "memory"
    return "crash"


def _environment() -> dict[str, str]:
    """The server's own, so that the worker finds what the server found, however it was started."""
    found = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join(found),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's: a thread takes address space
    }
