"""A real server process with two tenants, and a client that says exactly what it is told to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.tenants.keys import hash_of
from tests.server.conftest import PAIR, build_served

ROOT = Path(__file__).resolve().parents[2]
READY_S = 120.0
KEYS = {name: f"{name}-key-0123456789" for name in ("acme", "globex", "admin", "proxy")}
TENANTS = f"""
[tenants.acme]
variants = ["acme-*", "base"]
[[tenants.acme.keys]]
id = "one"
sha256 = "{hash_of(KEYS["acme"])}"
[tenants.globex]
variants = ["globex-*", "base"]
[[tenants.globex.keys]]
sha256 = "{hash_of(KEYS["globex"])}"
"""


@dataclass
class Running:
    """A server and what a test may do to it."""

    process: subprocess.Popen[str]
    url: str
    admin_url: str
    tenants: Path
    log: Path
    clients: dict[str, httpx.Client] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, who: str | None) -> httpx.Client:
        """A client of the tenants' listener with this one's key."""
        return self._client(who, self.url)

    def admin(self, who: str | None = "admin") -> httpx.Client:
        """A client of the admin listener."""
        return self._client(who, self.admin_url)

    def _client(self, who: str | None, url: str) -> httpx.Client:
        name = f"{who}@{url}"
        if name not in self.clients:
            headers = {} if who is None else {"authorization": f"Bearer {KEYS[who]}"}
            self.clients[name] = httpx.Client(base_url=url, headers=headers, timeout=60)
        return self.clients[name]

    def complete(self, who: str, model: str, prompt: Any = "Hello", **fields: Any) -> Any:
        """The answer to a completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
        return self.client(who).post("/v1/completions", json=body)

    def raw(self, request: bytes) -> bytes:
        """What the server answers to these bytes, up to its end or a second of silence."""
        answer = b""
        with socket.create_connection(self.address, timeout=30) as link:
            link.sendall(request)
            link.settimeout(1.0)
            try:
                while part := link.recv(65536):
                    answer += part
            except TimeoutError:
                pass
        return answer

    def said(self, words: str) -> bool:
        """Whether the log comes to hold these words."""
        deadline = time.monotonic() + 20
        while words not in self.log.read_text():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def hang_up(self) -> None:
        """Read the tenants file and the deltas again."""
        self.process.send_signal(signal.SIGHUP)

    def assert_well(self) -> None:
        """Both tenants are served as before."""
        for who in ("acme", "globex"):
            assert self.complete(who, f"{who}-one").status_code == 200
        assert self.process.poll() is None


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Start a server with these further arguments; all end with the session."""
    pair = build_served(tmp_path_factory.mktemp("pair"), "llama", PAIR)
    running: list[Running] = []

    def start_one(*arguments: str, tenants: str = TENANTS) -> Running:
        folder = tmp_path_factory.mktemp("server")
        deltas = folder / "deltas"
        for name, source in (("acme-one", "blockdiag"), ("globex-one", "impart")):
            shutil.copytree(pair.deltas / source, deltas / name)
        one = _start(folder, pair.base, deltas, tenants, arguments)
        running.append(one)
        return one

    yield start_one
    for one in running:
        for client in one.clients.values():
            client.close()
        one.process.terminate()
    for one in running:
        one.process.wait(60)


def _start(
    folder: Path, base: Path, deltas: Path, tenants: str, arguments: tuple[str, ...]
) -> Running:
    file, log = folder / "tenants.toml", folder / "log"
    file.write_text(tenants)
    given = ["--base", str(base), "--deltas", str(deltas), "--tenants", str(file), "--port", "0"]
    given += ["--device", "cpu", "--kernels", "torch", "--kv-cache-bytes", "16MiB"]
    given += ["--no-self-check", "--served-base-name", "base", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("IMPART_")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *given],
            cwd=ROOT,
            env=environment | {"IMPART_ADMIN_KEY": KEYS["admin"]},
            stdout=stream,
            stderr=stream,
            text=True,
        )
    url = _address(process, log, "the server listens on ")
    return Running(process, url, _address(process, log, "admin listener listens on "), file, log)


def _address(process: subprocess.Popen[str], log: Path, words: str) -> str:
    deadline = time.monotonic() + READY_S
    while words not in (text := log.read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    return text.partition(words)[2].split()[0]


@pytest.fixture(scope="session")
def server(start: Callable[..., Running]) -> Running:
    """The server that most tests attack; it must live through all of them."""
    return start()


@pytest.fixture(autouse=True)
def _well_after(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").assert_well()
