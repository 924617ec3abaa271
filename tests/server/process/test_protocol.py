"""The HTTP parser's bounds, and writes to the transport, with a transport that the test plays."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from server.api.app import create_app
from server.api.middleware import MAX_HEADER_BYTES
from server.process.protocol import BoundedProtocol
from server.process.run import uvicorn_config
from tests.server.api.conftest import make_settings
from tests.server.api.fake import BASE, FakeEngine

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    @property
    def text(self) -> bytes:
        return b"".join(self.writes)


class Connection:
    def __init__(self, engine: FakeEngine | None = None) -> None:
        settings = make_settings()
        config = uvicorn_config(create_app(engine or FakeEngine(), settings), settings)
        config.load()
        self.transport = Transport()
        self.protocol = BoundedProtocol(config, ServerState(), {})
        self.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        if not self.transport.closed:  # a real one would not read any more
            self.protocol.data_received(data)

    async def answered(self) -> bytes:
        async with asyncio.timeout(5):
            while not (self.protocol.cycle and self.protocol.cycle.response_complete):
                await asyncio.sleep(0)
        return self.transport.text


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    one = Connection()
    yield one
    one.protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_uvicorn_has_what_the_protocol_relies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where uvicorn has changed; then `server.process.protocol` must be looked at."""
    seen: list[str] = []
    for name in ("on_body", "on_message_complete"):
        original = getattr(HttpToolsProtocol, name)

        def noted(self: object, *args: Any, name: str = name, call: Any = original) -> None:
            seen.append(name)
            call(self, *args)

        monkeypatch.setattr(HttpToolsProtocol, name, noted)
    connection = Connection()
    protocol = connection.protocol
    assert protocol.transport is connection.transport
    assert protocol.loop is asyncio.get_running_loop()
    assert protocol.cycle is None
    connection.send(POST + b"Content-Length: 2\r\n\r\n{")
    assert seen == ["on_body"]
    assert protocol.cycle.response_started is False
    assert protocol.cycle.response_complete is False
    connection.send(b"}")
    assert seen == ["on_body", "on_body", "on_message_complete"]
    assert protocol.cycle.more_body is False
    assert protocol.cycle.scope["http_version"] == "1.1"
    assert protocol.cycle.keep_alive is True
    await connection.answered()
    assert protocol.cycle.response_started is True
    assert protocol.cycle.response_complete is True
    protocol.connection_lost(None)


def test_uvicorn_serves_within_the_signal_handling_that_is_replaced() -> None:
    assert "with self.capture_signals()" in inspect.getsource(uvicorn.Server.serve)


async def test_header_within_the_bound_in_small_reads_is_answered(connection: Connection) -> None:
    request = GET + b"X-Long: " + b"a" * (MAX_HEADER_BYTES - 500) + b"\r\n\r\n"
    for at in range(0, len(request), 100):
        connection.send(request[at : at + 100])
    assert (await connection.answered()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("read", [100, 4096, 1 << 20])
@pytest.mark.parametrize("ends", [b"", b"\r\n\r\n"])
async def test_header_beyond_the_bound_is_refused_whatever_the_reads(
    connection: Connection, read: int, ends: bytes
) -> None:
    request = GET + b"X-Long: " + b"a" * (2 * MAX_HEADER_BYTES) + ends
    for at in range(0, len(request), read):
        connection.send(request[at : at + read])
    if not connection.transport.closed:  # all in one read: the application refuses it
        await connection.answered()
    assert connection.transport.text.startswith(b"HTTP/1.1 431")
    assert connection.transport.closed


async def test_endless_trailers_are_cut(connection: Connection) -> None:
    connection.send(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-T: ")
    for _ in range(200):
        connection.send(b"a" * 1000)
    assert connection.transport.closed
    assert connection.transport.text.startswith(b"HTTP/1.1 431")


async def test_endless_chunk_extension_is_cut(connection: Connection) -> None:
    connection.send(POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=")
    for _ in range(200):
        connection.send(b"a" * 1000)
    assert connection.transport.closed


async def test_body_in_tiny_chunks_is_read(connection: Connection) -> None:
    body = b'{"model": "tiny-base", "prompt": "' + b"x" * 20_000 + b'"}'
    connection.send(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    for byte in body:
        connection.send(b"1\r\n%c\r\n" % byte)
    connection.send(b"0\r\n\r\n")
    answer = await connection.answered()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"maximum context length" in answer  # it was understood


async def test_requests_one_after_the_other_on_one_connection_are_answered(
    connection: Connection,
) -> None:
    for n in range(1, 400):  # each adds to what a counter that is never reset would hold
        connection.send(GET + b"\r\n")
        await connection.answered()
        assert connection.transport.text.count(b"HTTP/1.1 200") == n


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 0x5\r\n\r\nhello",
        POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        GET + b"X-Id: a\rb\r\n\r\n",
        GET + b"X-Id: a\x00b\r\n\r\n",
        GET + b" folded: x\r\n\r\n"[:-2] + b"X Y: z\r\n\r\n",
        b"GET /health HTTP/9.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS to a plain port
    ],
)
async def test_malformed_request_is_refused_and_hung_up_on(
    connection: Connection, request_bytes: bytes
) -> None:
    connection.send(request_bytes)
    assert connection.transport.text.startswith(b"HTTP/1.1 400")
    assert connection.transport.closed


async def test_stream_writes_once_for_each_step() -> None:
    engine = FakeEngine()
    connection = Connection(engine)
    body = b'{"model": "%s", "prompt": "x", "max_tokens": 5, "stream": true, "n": 3}'
    body %= BASE.encode()
    connection.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    answer = await connection.answered()
    _headers, *steps = connection.transport.writes
    assert [write.count(b"data: ") for write in steps] == [3, 3, 3, 3, 4]
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_full_transport_holds_the_stream_back_and_then_gets_it_at_once() -> None:
    engine = FakeEngine()
    connection = Connection(engine)
    body: Any = b'{"model": "%s", "prompt": "x", "max_tokens": 300, "stream": true}'
    body %= BASE.encode()
    connection.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    while not connection.transport.writes:
        await asyncio.sleep(0)
    connection.protocol.pause_writing()
    async with asyncio.timeout(5):
        while engine.n_active:
            await asyncio.sleep(0)
    n_writes = len(connection.transport.writes)
    assert n_writes < 10
    connection.protocol.resume_writing()
    answer = await connection.answered()
    assert answer.count(b"data: ") == 301
    assert len(connection.transport.writes) <= n_writes + 3
