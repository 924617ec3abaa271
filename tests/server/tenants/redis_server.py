"""A real Redis on a free port, for the tests of a module."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Redis:
    """One server, and its two addresses."""

    url: str
    unix_url: str
    process: subprocess.Popen[bytes]

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def started(program: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    arguments += ["--unixsocket", str(folder / "socket")]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None, "redis-server did not start"
            assert time.monotonic() < deadline, "redis-server did not start in time"
            time.sleep(0.02)
        else:
            return process


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("there is no redis-server on the path")
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    process = started(program, folder, port)
    try:
        yield Redis(f"redis://127.0.0.1:{port}/0", f"redis+unix://{folder}/socket", process)
    finally:
        process.kill()
        process.wait(10)
