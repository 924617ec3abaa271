"""A client of the bare ASGI callable whose network a test controls, and an engine that waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from server.api.app import create_app
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine


class Call:
    """One request through an ASGI application; the test plays the network."""

    def __init__(
        self,
        app: Any,
        path: str,
        body: dict[str, Any],
        key: str | None = None,
        method: str = "POST",
    ) -> None:
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.messages: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.accept = asyncio.Event()  # cleared: the network takes nothing
        self.accept.set()
        self.read = False  # whether the application has asked for the body
        self._body = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [
                (b"host", b"test"),
                (b"content-type", b"application/json"),
                *([] if key is None else [(b"authorization", f"Bearer {key}".encode())]),
            ],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self.read:
            self.read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.accept.wait()
        self.messages.append(message)
        await self.sent.put(message)

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            return await self.sent.get()

    async def finish(self) -> None:
        async with asyncio.timeout(5):
            await self.task

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.messages).decode()

    def events(self) -> list[Any]:
        frames = [f for f in self.text.split("\n\n") if f.startswith("data: ")]
        return [json.loads(f[6:]) if f != "data: [DONE]" else "DONE" for f in frames]


def body(stream: bool, **fields: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "Hi", "max_tokens": 100, "stream": stream, **fields}


@asynccontextmanager
async def held() -> AsyncIterator[tuple[FakeEngine, Any]]:
    """An engine that gives three tokens and then waits for `engine.hold`."""
    engine = FakeEngine(max_open=16)
    engine.hold = asyncio.Event()
    engine.hold_after = 3
    yield engine, create_app(engine, make_settings())


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)
