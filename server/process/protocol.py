"""uvicorn's httptools protocol with limits on how long and how large a request's headers may be.

uvicorn times idle connections after a response, but not one that sends its first request a byte
at a time; a few hundred of those would hold every file descriptor. And llhttp takes headers and
trailers of any length, where h11 had a bound.

uvicorn documents no protocol to build on, so this is all that we rely on of 0.54's, and
tests/server/process/test_protocol.py fails where a later one differs:

    transport, loop                   of the connection
    cycle                             None before the first request, then the present one's:
                                      response_started, response_complete, more_body (of the
                                      request), keep_alive (may be set), scope
    connection_made, data_received,   called by asyncio, once for each event
    eof_received, connection_lost
    on_body, on_message_complete      called by the parser, from within data_received

`server.process.run` relies on `uvicorn.Server.capture_signals`, which it replaces, and on
`startup`, which it extends, and `on_tick`, which uvicorn calls ten times a second:
`server.process.unsent` looks at connections.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.middleware import MAX_HEADER_BYTES

HEADER_TIMEOUT_S = 20.0
PROBE_DELAYS_S = (0.0, 0.5, 1.0)
MAX_FRAMING_PER_BYTE = 16  # what chunked encoding may add to one byte of a body

PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's headers are not complete in time, or too long."""

    header_timeout_s = HEADER_TIMEOUT_S
    _header_timer: asyncio.TimerHandle | None = None
    _probe_timer: asyncio.TimerHandle | None = None
    _is_half_closed = False
    _n_framing = 0  # bytes of the present message that are no body
    _n_body = 0
    _completed = False  # a message ended in what was just received

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        before = self._n_body
        self._completed = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._completed:  # what follows a message in one read is no longer than a read
            self._n_framing = self._n_body = 0
        else:
            self._n_framing += len(data) - (self._n_body - before)
            if self._n_framing > MAX_HEADER_BYTES + MAX_FRAMING_PER_BYTE * self._n_body:
                self._refuse()
                return
        self._watch_headers()

    def on_body(self, body: bytes) -> None:
        self._n_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._completed = True
        super().on_message_complete()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. One whose request is whole still gets its answer, and then the
        connection is closed.

        It may as well have closed its end altogether, which looks the same until something is
        written: its system then answers that nobody listens, and the write after that fails. So a
        few interim answers, which every client of HTTP/1.1 has to pass over, find out whether
        somebody waits; an answer that has begun finds out by itself.
        """
        if self._between_requests() or self.cycle.more_body:
            return False
        if not self._is_half_closed:
            self._is_half_closed = True
            self.cycle.keep_alive = False
            if self.cycle.scope["http_version"] == "1.1":
                self._probe(PROBE_DELAYS_S)
        return True  # keeps the connection open

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()

    def _probe(self, delays_s: tuple[float, ...]) -> None:
        """Write an interim answer after each delay, as long as the answer has not begun."""
        self._probe_timer = None
        if delays_s:
            self._probe_timer = self.loop.call_later(delays_s[0], self._send_probe, delays_s[1:])

    def _send_probe(self, delays_s: tuple[float, ...]) -> None:
        if not (self.cycle.response_started or self.transport.is_closing()):
            self.transport.write(PROBE)
            self._probe(delays_s)

    def _refuse(self) -> None:
        """Hang up; say why unless an answer is on its way."""
        if self._between_requests() or not self.cycle.response_started:
            self.transport.write(TOO_LARGE)
        self.transport.close()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_headers(self) -> None:
        if not self._between_requests():
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _too_slow(self) -> None:
        self._header_timer = None
        if self._between_requests() and not self.transport.is_closing():
            self.transport.close()
