"""One process: what it may do, how its end is told, that it outlives nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.text.workers.frames import Frame
from server.text.workers.limits import NICENESS
from server.text.workers.worker import WorkerEnded, WorkerProcess

MEMORY_BYTES = 1 << 30
PROGRAM = """
import sys
from server.text.workers.worker import WorkerProcess
worker = WorkerProcess(1 << 30)
worker.wait_ready()
print(worker.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker() -> WorkerProcess:
    made = WorkerProcess(MEMORY_BYTES)
    made.wait_ready()
    yield made
    made.close()


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_worker_has_no_torch_and_its_limits(worker: WorkerProcess) -> None:
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "libtorch" not in maps
    limits = Path(f"/proc/{worker.pid}/limits").read_text().splitlines()
    of = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert of["Max address space"] == str(MEMORY_BYTES)
    assert (of["Max file size"], of["Max core file size"]) == ("0", "0")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(own + NICENESS, 19)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_worker_goes_on_while_the_server_drains(worker: WorkerProcess, number: int) -> None:
    os.kill(worker.pid, number)
    reply = worker.run(order("unknown"), 60, lambda: True)
    assert "failed" in reply.record


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGPROF, "cpu"),
        (signal.SIGALRM, "wall"),
        (signal.SIGABRT, "memory"),
        (signal.SIGSEGV, "crash"),
    ],
)
def test_end_of_a_worker_is_told_by_its_signal(
    worker: WorkerProcess, number: int, reason: str
) -> None:
    os.kill(worker.pid, number)
    with pytest.raises(WorkerEnded) as caught:
        worker.run(order("encode"), 60, lambda: True)
    assert caught.value.reason == reason
    assert gone(worker.pid)


def test_worker_that_stands_still_is_ended(worker: WorkerProcess) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerEnded) as caught:
        worker.run(order("encode"), 0.1, lambda: True)
    assert caught.value.reason == "wall"
    assert gone(worker.pid)


def test_worker_ends_when_the_server_is_killed() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    assert is_running(pid)
    server.kill()
    server.wait()
    assert gone(pid)
    for stream in (server.stdin, server.stdout):
        assert stream is not None
        stream.close()


def order(task: str) -> Frame:
    fields = {"task": task, "folder": "/nowhere", "record": {}}
    return Frame(fields | {"cpu_s": 60, "wall_s": 60, "load_factor": 1})
