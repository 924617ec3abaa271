"""Pure ASGI middleware: request id and log line, early refusal, and caps on headers and body.

No BaseHTTPMiddleware: it hides the client's disconnect from everything below.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.disconnect import answer_while_connected
from server.api.errors import (
    answered_error,
    http_error,
    internal_error_body,
    note_error,
    response_of,
)
from server.api.sse import Stalled
from server.errors import (
    BodyTooLarge,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    ServeError,
    TooManyAtOnce,
)
from server.metrics.series import Metrics
from server.tenants.principal import Principal

MAX_HEADERS = 128
MAX_HEADER_BYTES = 16 << 10  # names and values; the protocol bounds them before they are parsed
BODY_TIMEOUT_S = 30.0  # from the first byte after the headers to the last
STATUS = "impart.status"  # in the scope, once an answer has begun
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics"})
GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
BODY_PATHS = GENERATION_PATHS | {"/tokenize", "/detokenize"}
MAX_HELD_BYTES = 256 << 20  # of the bodies of all requests
MAX_SMALL_BODY_BYTES = 64 << 10  # where no route reads a body
# The first that fits counts.
REFUSALS = {  # the first that an error is
    QuotaExceeded: "quota",
    TooManyAtOnce: "concurrency",
    RateLimited: "rate",
    QueueFull: "queue",
}
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})

_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
log = logging.getLogger("server.access")


class RequestContext:
    """Outermost: names the request and notes when it came, logs one line for it, turns surprises
    into a constant 500. What was answered is in the scope, for whoever else notes it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope["impart.request_id"] = request_id
        scope["impart.arrived"] = started
        fields: dict[str, Any] = scope.setdefault("impart.log", {})

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[STATUS] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if generates(scope):
                    taken_ms = (time.monotonic() - started) * 1000
                    headers["openai-processing-ms"] = str(round(taken_ms))
            await send(message)

        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, receive, send_named)
        except Stalled:
            fields["ended"] = "stalled"  # the server closes an unfinished response
        except Exception:
            log.exception("an unforeseen error ended a request", extra={"request_id": request_id})
            if STATUS not in scope:
                response = JSONResponse(internal_error_body(request_id), 500)
                await response(scope, receive, send_named)
            else:
                fields["ended"] = "failed"
        finally:
            self._metrics.http_in_flight.dec()
            self._finish(
                scope, request_id, scope.get(STATUS, 0), time.monotonic() - started, fields
            )

    def _finish(
        self, scope: Scope, request_id: str, status: int, seconds: float, fields: dict[str, Any]
    ) -> None:
        unrouted: str = scope["path"] if generates(scope) else "other"  # refused early
        route = getattr(scope.get("route"), "path", unrouted)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.http_request(route, method, status)
        principal: Principal | None = scope.get("impart.principal")
        if principal is not None and route in BODY_PATHS:
            refusal = refusal_of(answered_error(scope))
            self._metrics.tenants.answered(principal.tenant, status, refusal)
        level = logging.DEBUG if route in QUIET_PATHS else logging.INFO
        log.log(
            level,
            "%s %s %d",
            method,
            route,
            status,
            extra={"request_id": request_id, "duration_s": round(seconds, 4), **fields},
        )


class EarlyRefusal:
    """Answers a generation request that nobody can take now before its body is read.

    check  raises the ServeError to answer with, for the request of a scope
    """

    def __init__(self, app: ASGIApp, check: Callable[[Scope], None]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and generates(scope):
            try:
                self._check(scope)
            except ServeError as error:
                note_error(scope, error)
                await response_of(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class HeldBytes:
    """Bytes of the bodies of all requests that are being answered. For one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0

    @contextmanager
    def counted(self) -> Iterator[Callable[[int], None]]:
        """Yield what takes bytes for the duration, which raises QueueFull where it is too many."""
        n_taken = 0

        def take(n_bytes: int) -> None:
            nonlocal n_taken
            n_taken += n_bytes
            self._n_bytes += n_bytes
            if self._n_bytes > self._max_bytes:
                raise QueueFull(
                    "The bodies of running requests take too much memory; try again later.",
                    retry_after_s=5,
                )

        try:
            yield take
        finally:
            self._n_bytes -= n_taken


class RequestCap:
    """Bounds headers, and reads the body before the application runs: bounded in bytes and in time,
    and all of them together. The application is cancelled when the client leaves.

    With a Content-Length beyond the cap nothing is read at all. The body is kept as one buffer,
    because a list of one-byte chunks would take a hundred times its size. Where no route reads a
    body (`BODY_PATHS`) the cap is a small one, whatever `max_bytes` is. An administrator's upload
    is not read here: its route takes it piece by piece, and has a bound of its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_s: float = BODY_TIMEOUT_S,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._held = HeldBytes(max(max_bytes, max_held_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _refusal_of_headers(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if uploads(scope):
            await self._app(scope, _bounded_in_time(receive, self._timeout_s), send)
            return
        with self._held.counted() as take:
            try:
                body = await self._read_body(scope, receive, take)
            except ServeError as error:
                note_error(scope, error)
                await response_of(error)(scope, receive, send)
                return
            except TimeoutError:
                message = f"The body did not arrive within {self._timeout_s:g} seconds."
                response = http_error(408, message, {"connection": "close"})
                await response(scope, receive, send)
                return
            is_whole = body is not None and await answer_while_connected(
                self._app, scope, body, receive, send
            )
        if not is_whole:
            scope["impart.log"]["ended"] = "disconnected"

    async def _read_body(
        self, scope: Scope, receive: Receive, take: Callable[[int], None]
    ) -> bytes | None:
        """Return the body; None if the client left meanwhile.

        Raises BodyTooLarge, QueueFull, TimeoutError.
        """
        max_bytes = self._max_bytes
        if scope["path"] not in BODY_PATHS:
            max_bytes = min(max_bytes, MAX_SMALL_BODY_BYTES)
        _check_declared(Headers(scope=scope), max_bytes)
        async with asyncio.timeout(self._timeout_s):
            return await _read(receive, max_bytes, take)


def refusal_of(error: ServeError | None) -> str | None:
    """The reason under which an error counts as a refusal of its tenant; None if it is none."""
    return next((reason for kind, reason in REFUSALS.items() if isinstance(error, kind)), None)


def uploads(scope: Scope) -> bool:
    """Whether a request brings an artifact, from somebody who may."""
    if not scope.get("impart.admin", False):
        return False
    path: str = scope["path"]
    return scope["method"] == "PUT" and path.startswith("/v1/deltas/")


def _bounded_in_time(receive: Receive, timeout_s: float) -> Receive:
    """Return a `receive` that waits for each piece of the body so long, then says the client left:
    it may as well have.
    """
    is_whole = False

    async def receive_soon() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout(timeout_s):
                message = await receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        is_whole = not message.get("more_body", False)
        return message

    return receive_soon


def _refusal_of_headers(scope: Scope) -> JSONResponse | None:
    """The answer to headers that are too many or too long, or name no host or several."""
    raw_headers = scope["headers"]
    n_header_bytes = sum(len(name) + len(value) for name, value in raw_headers)
    if len(raw_headers) > MAX_HEADERS or n_header_bytes > MAX_HEADER_BYTES:
        return http_error(431, "Too many or too long headers.", {"connection": "close"})
    if _misses_its_host(scope):
        message = "A request of HTTP/1.1 names its host once, in a Host header."
        return http_error(400, message, {"connection": "close"})
    return None


def _misses_its_host(scope: Scope) -> bool:
    """Whether no or several hosts are named, which proxies before this server may read otherwise;
    HTTP/1.0 has no such header.
    """
    n_hosts = sum(1 for name, _ in scope["headers"] if name == b"host")
    return n_hosts > 1 or (n_hosts == 0 and scope["http_version"] != "1.0")


def _check_declared(headers: Headers, max_bytes: int) -> None:
    declared = headers.get("content-length", "")
    # llhttp refuses a length that is no number; another server may not
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)


async def _read(receive: Receive, max_bytes: int, take: Callable[[int], None]) -> bytes | None:
    """Return the whole body, None if the client left meanwhile. Raises BodyTooLarge, QueueFull."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        take(len(part))
        body += part
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body exceeds {max_bytes} bytes. Send less at once.")


class HeadAsGet:
    """Answers HEAD as GET, wherever GET is; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        route = dict(scope, method="GET")
        try:
            await self._app(route, receive, _without_body(send))
        finally:
            scope["route"] = route.get("route")  # for the log and the metrics


def _without_body(send: Send) -> Send:
    """Return a `send` that leaves out the bytes of a body and keeps its declared length."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def generates(scope: Scope) -> bool:
    """Whether a request asks for generated text."""
    return scope["method"] == "POST" and scope["path"] in GENERATION_PATHS
