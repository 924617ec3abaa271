"""The process: command line, signals and exit codes. The engine is the fake one."""

from __future__ import annotations

import dataclasses
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
import typer
from typer.testing import CliRunner

from server import cli
from server.settings import Settings
from tests.server.api.conftest import make_settings, serve
from tests.server.api.fake import BASE, FakeEngine

PROGRAM = """
import asyncio, os, signal, sys
from server.metrics.series import Metrics
from server.process import logs
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
settings = make_settings(drain_timeout_s=float(sys.argv[2]))
logs.configure("info", "json")

async def main():
    def release(*_): engine.hold.set()
    def die(*_): engine.alive = False
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, release)
    loop.add_signal_handler(signal.SIGUSR2, die)
    return await run(engine, settings, Metrics(), [listener])

sys.exit(run_in_loop(main()))
"""


class Process:
    def __init__(self, drain_s: float) -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(listener.fileno()), str(drain_s)],
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
def process(drain_s: float) -> Iterator[Process]:
    started = Process(drain_s)
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

    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "ServiceUnavailableError"
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


# -- command line ----------------------------------------------------------------------------------


def settings_from(*arguments: str, env: dict[str, str] | None = None) -> Settings:
    seen: list[Settings] = []
    app = typer.Typer(add_completion=False)
    app.command()(cli.command(seen.append))
    result = CliRunner().invoke(app, list(arguments), env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def exit_code(*arguments: str) -> int:
    app = typer.Typer(add_completion=False)
    app.command()(cli.command(lambda _: None))
    return CliRunner().invoke(app, list(arguments)).exit_code


def test_cli_without_options_gives_the_defaults_of_settings():
    assert settings_from("--base", "b") == Settings(base=Path("b"))


def test_cli_every_field_has_help_and_a_flag():
    assert set(cli.HELP) == {field.name for field in dataclasses.fields(Settings)}


def test_cli_reads_flags_of_every_kind():
    found = settings_from(
        *("--base", "b", "--deltas", "d", "--port", "9000", "--device", "cpu"),
        *("--delta-budget-bytes", "500MB", "--kv-cache-bytes", "1.5GiB", "--max-body-bytes", "7"),
        *("--mode-override", "a=reconstruct", "--mode-override", "b=apply"),
        *("--max-model-len", "128", "--drain-timeout-s", "1.5", "--log-format", "json"),
    )

    assert found.delta_budget_bytes == 500_000_000
    assert found.kv_cache_bytes == 3 << 29
    assert found.max_body_bytes == 7
    assert found.mode_overrides == {"a": "reconstruct", "b": "apply"}
    assert (found.deltas, found.port, found.device) == (Path("d"), 9000, "cpu")
    assert (found.max_model_len, found.drain_timeout_s) == (128, 1.5)


def test_cli_switches_off_what_is_on():
    found = settings_from("--base", "b", "--no-prefix-cache", "--no-async-scheduling")
    assert (found.prefix_cache, found.async_scheduling) == (False, False)


def test_cli_reads_the_environment_and_flags_win():
    env = {
        "IMPART_BASE": "b",
        "IMPART_PORT": "9001",
        "IMPART_HOST": "0.0.0.0",
        "IMPART_KV_CACHE_BYTES": "2GiB",
        "IMPART_MODE_OVERRIDES": "a=reconstruct b=apply",
    }
    found = settings_from("--port", "9002", env=env)

    assert (found.base, found.port, found.host) == (Path("b"), 9002, "0.0.0.0")
    assert found.kv_cache_bytes == 2 << 30
    assert found.mode_overrides == {"a": "reconstruct", "b": "apply"}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--base", "b", "--kv-cache-bytes", "lots"),
        ("--base", "b", "--kv-cache-bytes", "-1"),
        ("--base", "b", "--kv-cache-bytes", "0"),
        ("--base", "b", "--device", "tpu"),
        ("--base", "b", "--mode-override", "a=magic"),
        ("--base", "b", "--mode-override", "a"),
        ("--base", "b", "--port", "70000"),
        ("--base", "b", "--unknown", "1"),
    ],
)
def test_cli_wrong_values_exit_with_2(arguments):
    assert exit_code(*arguments) == 2


@pytest.mark.parametrize("size", ["4GiB", "512MiB", "1KiB", "1000"])
def test_size_text_is_read_back_as_written(size):
    assert cli.size_text(cli.parse_size(size)) == size
