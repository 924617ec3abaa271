"""`serve(engine)`: a real uvicorn on a loopback port, in a thread; for any EngineClient."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.api.app import create_app
from server.metrics.series import Metrics
from server.process.run import Server, run_in_loop, uvicorn_config
from server.settings import Settings
from server.tenants.directory import Directory
from tests.server.api.fake import BASE, FakeEngine


def make_settings(**changes: Any) -> Settings:
    return Settings(**{"base": Path("unused"), **changes})


@dataclass(frozen=True)
class Live:
    """A running server and the names a test may use."""

    url: str
    engine: Any
    base: str
    variant: str


@contextmanager
def serve(
    engine: Any,
    settings: Settings | None = None,
    *,
    metrics: Metrics | None = None,
    directory: Directory | None = None,
) -> Iterator[str]:
    """Yield the server's root URL. `engine.start()` runs inside the server's event loop."""
    settings = settings or make_settings()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = Server(uvicorn_config(create_app(engine, settings, metrics, directory), settings))

    async def main() -> None:
        engine.start()
        try:
            await server.serve([listener])
        finally:
            await engine.shutdown(0.0)

    thread = threading.Thread(target=lambda: run_in_loop(main()), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """Override this fixture to run the client tests against another engine."""
    engine = FakeEngine()
    metrics = Metrics()
    metrics.watch(engine, 8)
    with serve(engine, metrics=metrics) as url:
        yield Live(url, engine, BASE, "alpha")
