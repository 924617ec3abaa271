"""The ledger of a real process: what is there after SIGTERM, SIGKILL and a disk that was full."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.ledger.database import open_database
from server.ledger.ledger import Ledger
from server.ledger.records import UsageQuery, UsageRow
from tests.server.api.fake import BASE

PROGRAM = """
import os, socket, sys
from pathlib import Path
from server.ledger.ledger import open_ledger
from server.metrics.series import Metrics
from server.process import logs
from server.process.listeners import Listeners
from server.process.run import run, run_in_loop
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine

class Engine(FakeEngine):
    async def encode(self, variant, text, **options):
        self.delay_s = 0.05 if text == "stuck" else 0.0  # of each token
        return await super().encode(variant, text, **options)

engine = Engine()
settings = make_settings(drain_timeout_s=0.2, state_dir=Path(sys.argv[2]))
logs.configure("warning", "plain")
with open_ledger(settings) as ledger:
    metrics = Metrics()
    metrics.watch_ledger(ledger)
    listener = socket.socket(fileno=int(sys.argv[1]))
    code = run_in_loop(run(engine, settings, metrics, Listeners([listener], []), None, ledger))
os._exit(code)
"""


class Server:
    """A process that keeps its ledger in `folder`."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(listener.fileno()), str(folder)],
                pass_fds=[listener.fileno()],
                stderr=subprocess.PIPE,
                text=True,
            )
        until(self.is_ready)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=20).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, n: int) -> None:
        body = {"model": BASE, "prompt": "Hi", "max_tokens": 3}
        with httpx.Client(timeout=20) as client:
            for _ in range(n):
                assert client.post(f"{self.url}/v1/completions", json=body).status_code == 200

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics", timeout=20).text
        (line,) = (line for line in page.splitlines() if line.startswith(f"{name} "))
        return float(line.split()[1])

    def end(self, number: int | None) -> tuple[int, str]:
        """Send a signal, unless it was sent, and wait for the end."""
        if number is not None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    started = Server(folder)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def total(folder: Path) -> UsageRow:
    (row,) = Ledger(open_database(folder, None)).usage(UsageQuery(0, time.time() + 1))
    return row


def test_sigterm_loses_no_row_not_even_of_a_stream_that_it_ends(tmp_path: Path) -> None:
    with server(tmp_path) as one:
        one.ask(5)
        one.process.send_signal(signal.SIGHUP)
        body = {"model": BASE, "prompt": "stuck", "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{one.url}/v1/completions", json=body, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            one.process.send_signal(signal.SIGTERM)
            assert any("error" in line for line in lines)
        code, said = one.end(None)
    assert code == 0, said
    assert total(tmp_path).n_requests == 6
    done = Ledger(open_database(tmp_path, None)).audited(0, time.time() + 1, limit=9)
    assert {(one.actor, one.action) for one in done} == {("signal", "rescan"), ("signal", "reload")}


def test_sigkill_leaves_a_whole_ledger_with_all_that_was_written(tmp_path: Path) -> None:
    with server(tmp_path) as one:
        one.ask(5)
        until(lambda: total(tmp_path).n_requests == 5)
        one.ask(1)
        assert one.end(signal.SIGKILL)[0] == -signal.SIGKILL
    row = total(tmp_path)
    assert 5 <= row.n_requests <= 6
    assert row.output_tokens == 3 * row.n_requests
    with open_database(tmp_path, None).connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits other processes")
def test_full_disk_never_stops_serving_is_counted_and_loses_nothing(tmp_path: Path) -> None:
    """The kernel lets the process write no byte to any file for a while."""
    with server(tmp_path) as one:
        one.ask(1)
        until(lambda: total(tmp_path).n_requests == 1)
        pid, (_, most) = one.process.pid, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
        one.ask(20)
        until(lambda: one.metric("impart_ledger_write_failures_total") >= 1)
        one.ask(1)
        until(lambda: one.metric("impart_ledger_pending_rows") == 21)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
        until(lambda: total(tmp_path).n_requests == 22)
        code, said = one.end(signal.SIGTERM)
    assert code == 0
    assert "the ledger cannot be written" in said
    assert total(tmp_path).n_requests == 22
