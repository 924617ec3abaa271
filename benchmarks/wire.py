"""A small HTTP/1.1 client for load: keep-alive connections, httptools, one request at a time each.

A general client spends several times the CPU on a streamed event, which the server under test
misses where both share a machine.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httptools


class WireError(Exception):
    """No connection, a connection lost half way, or an answer that is no HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `body` is empty if it was handed on piece by piece."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The body, whatever its bytes."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body. Raises ValueError if it is no JSON."""
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    """One connection; create with `open`."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[Answer] | None = None
        self._ends_with_connection = False
        self.closed = False
        self.heard = False  # anything of the present answer

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        """Connect. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port)
        return connection

    async def exchange(self, request: bytes, on_body: Callable[[bytes], None] | None) -> Answer:
        """Send a request, return its answer. Raises WireError.

        on_body  takes the body of a 200 as it arrives; a failure in it fails the request
        """
        self._done = asyncio.get_running_loop().create_future()
        self._on_body = on_body
        self._body: list[bytes] = []
        self._is_framed = self._ends_with_connection = False
        self.heard = False
        self._transport.write(request)
        try:
            return await self._done
        except asyncio.CancelledError:
            self.reset()
            raise
        finally:
            self._done = None

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self._transport.close()

    def reset(self) -> None:
        """Hang up so that the server knows at once: a connection that is only closed could be one
        whose client still reads, which a server finds out when it writes.
        """
        connection = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.closed = True
        self._transport.abort()

    # -- called by the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(WireError(f"{type(error).__name__}: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.closed = True
        if error is None and self._ends_with_connection:
            self._finish()
        self._fail(WireError(f"the connection was lost: {error or 'closed by the server'}"))

    def _fail(self, error: WireError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(Answer(self._parser.get_status_code(), b"".join(self._body)))

    # -- called by the parser

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Note whether the answer says where its body ends (RFC 9112, 6.3)."""
        self._is_framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """The body follows; the parser does not report the end of one that the server just ends."""
        self._ends_with_connection = not self._is_framed

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if self._on_body is not None and self._parser.get_status_code() == 200:
            self._on_body(data)
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()


class HttpClient:
    """Requests to one server over as many connections as are needed. An async context manager.

    key  what every request carries as its bearer token
    """

    def __init__(self, url: str, timeout_s: float, key: str | None = None) -> None:
        address = urlsplit(url)
        if address.scheme != "http" or address.hostname is None:
            raise ValueError(f"an http:// address is needed, got {url!r}")
        self._host, self._port = address.hostname, address.port or 80
        self._prefix = address.path.rstrip("/")
        self._timeout_s = timeout_s
        self._authorization = "" if key is None else f"authorization: Bearer {key}\r\n"
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def get(self, path: str) -> Answer:
        """Send a GET. Raises WireError."""
        return await self._send(self._head("GET", path) + b"\r\n", None)

    async def post(
        self, path: str, body: object, on_body: Callable[[bytes], None] | None = None
    ) -> Answer:
        """Send JSON. Raises WireError; see `Connection.exchange`."""
        data = json.dumps(body).encode()
        head = self._head("POST", path)
        head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
        return await self._send(head + data, on_body)

    async def close(self) -> None:
        """Close the connections that are idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _head(self, method: str, path: str) -> bytes:
        host = f"{self._host}:{self._port}"
        line = f"{method} {self._prefix}{path} HTTP/1.1\r\n"
        return f"{line}host: {host}\r\n{self._authorization}".encode()

    async def _send(self, request: bytes, on_body: Callable[[bytes], None] | None) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(request, on_body)
        except TimeoutError:
            raise WireError(f"no whole answer within {self._timeout_s:g} s") from None
        except OSError as error:
            raise WireError(f"{type(error).__name__}: {error}") from error

    async def _exchange(self, request: bytes, on_body: Callable[[bytes], None] | None) -> Answer:
        while connection := self._reusable():
            try:
                return await self._on(connection, request, on_body)
            except WireError:
                if connection.heard:
                    raise
                # An idle connection that the server was just closing: it never saw the request.
        return await self._on(await Connection.open(self._host, self._port), request, on_body)

    async def _on(
        self, connection: Connection, request: bytes, on_body: Callable[[bytes], None] | None
    ) -> Answer:
        answer = await connection.exchange(request, on_body)
        if not connection.closed:
            self._idle.append(connection)
        return answer

    def _reusable(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None


class EventReader:
    """Splits a body into the data of its server-sent events (one data line each)."""

    def __init__(self, on_data: Callable[[bytes], None]) -> None:
        self._on_data = on_data
        self._rest = b""

    def feed(self, body: bytes) -> None:
        """Take a piece of the body, cut anywhere."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_data(line[5:].strip())
