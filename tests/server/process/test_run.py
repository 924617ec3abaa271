"""The process: signals and exit codes. The engine is the fake one."""

from __future__ import annotations

import json
import os
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

from tests.server.api.conftest import make_settings, serve
from tests.server.api.fake import BASE, FakeEngine

PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
from server.fleet.store import FleetStore
from server.metrics.series import Metrics
from server.process import logs
from server.process.listeners import Listeners
from server.process.run import run, run_in_loop
from tests.server.api.conftest import make_settings
from tests.server.api.fake import FakeEngine

class Engine(FakeEngine):
    def rescan(self):
        super().rescan()
        print("rescanned", flush=True)

engine = Engine()
engine.hold = asyncio.Event()
engine.hold_after = 2
listener = __import__("socket").socket(fileno=int(sys.argv[1]))
deltas = Path(sys.argv[3]) if sys.argv[3:] else None
settings = make_settings(drain_timeout_s=float(sys.argv[2]), deltas=deltas)
fleet = FleetStore(None)
fleet.put("fetch", "begun", {"source": "file:///gone", "revision": None, "replace": False})
logs.configure("info", "json")

async def main():
    def release(*_): engine.hold.set()
    def die(*_): engine.alive = False
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, release)
    loop.add_signal_handler(signal.SIGUSR2, die)
    return await run(engine, settings, Metrics(), Listeners([listener], []), fleet=fleet)

sys.exit(run_in_loop(main()))
"""


class Process:
    def __init__(self, drain_s: float, *more: str) -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(listener.fileno()), str(drain_s), *more],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        listener.close()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@contextmanager
def process(drain_s: float, *more: str) -> Iterator[Process]:
    started = Process(drain_s, *more)
    try:
        assert httpx.get(f"{started.url}/health/ready", timeout=20).status_code == 200
        yield started
    finally:
        started.process.kill()
        started.process.wait()


@contextmanager
def stream(url: str, secret: str = "Hi") -> Iterator[Iterator[str]]:
    body = {"model": BASE, "prompt": secret, "max_tokens": 6, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "choices" in next(lines)
        yield lines


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_unready(url: str) -> bool:
    return httpx.get(f"{url}/health/ready").status_code == 503


def test_sigterm_lets_running_requests_finish_and_exits_0():
    with process(30) as server, stream(server.url, "a secret prompt") as lines:
        server.signal(signal.SIGTERM)
        wait_for(lambda: is_unready(server.url))
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": BASE, "prompt": "x"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.signal(signal.SIGUSR1)
        assert list(lines)[-1] == "data: [DONE]"
        code, _, log = server.end()

    assert code == 0
    records = [json.loads(line) for line in log.splitlines()]
    access = [r for r in records if r["logger"] == "server.access" and r.get("model")]
    assert access[0]["completion_tokens"] == 6
    assert access[0]["request_id"]
    assert "secret prompt" not in log


def test_drain_timeout_sends_a_final_error_event_and_exits_0():
    with process(0.2) as server, stream(server.url) as lines:
        server.signal(signal.SIGTERM)
        last = list(lines)[-1]
        code, _, _ = server.end()

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert code == 0


def test_second_signal_ends_running_requests_at_once():
    with process(600) as server, stream(server.url) as lines:
        server.signal(signal.SIGTERM)
        wait_for(lambda: is_unready(server.url))
        server.signal(signal.SIGTERM)
        assert "error" in list(lines)[-1]
        assert server.end()[0] == 0


def test_dead_engine_ends_the_process_with_a_failure():
    with process(600) as server, stream(server.url) as lines:
        server.signal(signal.SIGUSR2)
        assert "error" in list(lines)[-1]
        assert server.end()[0] == 1


def test_sighup_rescans_and_serving_goes_on():
    with process(30) as server:
        server.signal(signal.SIGHUP)
        assert server.process.stdout.readline() == "rescanned\n"
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.signal(signal.SIGINT)
        assert server.end()[0] == 0


def raw_exchange(url: str, data: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_deltas_are_read_again_when_they_change_and_a_fetch_that_was_begun_goes_on(
    tmp_path: Path,
) -> None:
    with process(30, str(tmp_path)) as server:
        time.sleep(0.5)  # the kernel is told what to watch
        (tmp_path / "new").mkdir()
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == "rescanned\n"
        server.signal(signal.SIGTERM)
        code, _, err = server.end()
    assert code == 0
    assert "the fetch of begun cannot go on" in err  # its place is allowed no more


def test_slow_or_giant_headers_are_cut_and_others_are_served(monkeypatch):
    monkeypatch.setattr("server.process.protocol.BoundedProtocol.header_timeout_s", 0.1)
    with serve(FakeEngine(), make_settings()) as url:
        assert raw_exchange(url, b"") == b""
        assert raw_exchange(url, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow:") == b""
        giant = b"GET /health HTTP/1.1\r\nX-Big: " + b"a" * 40_000 + b"\r\n\r\n"
        assert raw_exchange(url, giant).startswith(b"HTTP/1.1 431")
        many = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 100) for i in range(300))
        too_many = b"GET /health HTTP/1.1\r\nHost: x\r\n" + many + b"\r\n"
        assert raw_exchange(url, too_many).startswith(b"HTTP/1.1 431")
        evil = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a\rb\r\n\r\n"
        assert raw_exchange(url, evil).startswith(b"HTTP/1.1 400")
        assert httpx.get(f"{url}/health").status_code == 200


def test_client_that_hangs_up_frees_its_request():
    engine = FakeEngine()
    engine.delay_s = 0.005
    with serve(engine, make_settings()) as url:
        with stream(url):
            pass
        body = {"model": BASE, "prompt": "x", "max_tokens": 400}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.05)
        wait_for(lambda: engine.n_active == 0)

    assert len(engine.aborted) >= 1


def half_closed(url: str, data: bytes, *, close: bool = False) -> bytes:
    """What a client reads that sends no more, or nothing at all any more."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        if close:
            return b""
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def request_of(version: str = "1.1", **fields: object) -> bytes:
    body = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 6, **fields}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("streams", [False, True])
def test_client_that_sends_no_more_gets_its_whole_answer(version: str, streams: bool):
    engine = FakeEngine()
    engine.delay_s = 0.2
    with serve(engine, make_settings()) as url:
        answer = half_closed(url, request_of(version, stream=streams))
    interim, _, rest = answer.rpartition(b"HTTP/1.1 200 OK\r\n")
    n_interim = interim.count(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert len(interim) == n_interim * len(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert (n_interim > 0) == (version == "1.1")
    assert (b"data: [DONE]" in rest) if streams else (b'"012340"' in rest)
    assert b"connection: close" in rest
    assert len(engine.finished) == 1


def test_client_that_closes_its_end_frees_a_request_that_has_not_answered_yet():
    engine = FakeEngine()
    engine.delay_s = 3600.0
    with serve(engine, make_settings()) as url:
        half_closed(url, request_of(), close=True)
        wait_for(lambda: len(engine.aborted) == 1)


def test_client_that_sends_half_a_request_and_no_more_is_hung_up_on():
    engine = FakeEngine()
    with serve(engine, make_settings()) as url:
        assert half_closed(url, request_of()[:-5]) == b""
        assert half_closed(url, b"") == b""
        assert httpx.get(f"{url}/health").status_code == 200
    assert engine.prompts == []
