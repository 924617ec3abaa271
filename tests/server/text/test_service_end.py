"""A server as a process of its own: its text workers end with it, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

PATIENCE_S = 180  # for a busy machine and a cold kernel cache


def workers_of(pid: int) -> set[int]:
    """Processes that run a text worker and whose parent this one is."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"server.text.workers.child" in command:
            found.add(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--base", str(tiny_llama), "--port", str(port), "--kernels", "torch"]
    flags += ["--device", "cpu", "--kv-cache-bytes", "16MiB", "--drain-timeout-s", "1"]
    process = subprocess.Popen([sys.executable, "-m", "server", *flags], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def is_ready(http: httpx.Client) -> bool:
        assert process.poll() is None, "the server did not start"
        try:
            return http.get(f"{url}/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        with httpx.Client(timeout=5) as http:
            until(lambda: is_ready(http))
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_text_workers_end_with_the_server(
    server: tuple[subprocess.Popen[bytes], str], number: int
) -> None:
    process, url = server
    body = {"model": "llama", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, number)
    code = process.wait(PATIENCE_S)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not any(map(is_running, workers)))
