"""Who may have the folder read again, and requests that name no host or two."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import httpx
import pytest

from server.api.app import create_app
from tests.server.api.conftest import Live, live, make_settings
from tests.server.api.fake import FakeEngine

__all__ = ["live"]  # a fixture
PATH = "/v1/deltas/rescan"


async def rescan(headers: Mapping[str, str]) -> tuple[int, int]:
    engine = FakeEngine()
    transport = httpx.ASGITransport(create_app(engine, make_settings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.post(PATH, headers=headers)
    return answer.status_code, engine.rescans


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, a program, a sidecar
        {"host": "impart.models.svc:8000"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
        {"host": "localhost:8000", "origin": "http://localhost:8000"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000", "sec-fetch-site": "same-origin"},
        {"host": "127.0.0.1", "sec-fetch-site": "none"},
    ],
)
async def test_rescan_by_a_program_or_a_page_of_its_own_is_done(headers: dict[str, str]) -> None:
    assert await rescan(headers) == (200, 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "127.0.0.1:8000", "origin": "http://evil.example"},
        {"host": "127.0.0.1:8000", "origin": "null"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"},
        {"host": "127.0.0.1:8000", "origin": "http://[::1"},
        {"host": "127.0.0.1:8000", "sec-fetch-site": "cross-site"},
        {"host": "127.0.0.1:8000", "sec-fetch-site": "same-site"},
        # a name that was made to resolve to this machine
        {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
        {
            "host": "evil.example:8000",
            "origin": "http://evil.example:8000",
            "sec-fetch-site": "same-origin",
        },
        {"host": "localhost.evil.example", "origin": "http://localhost.evil.example"},
    ],
)
async def test_rescan_by_a_page_of_another_site_is_refused(headers: dict[str, str]) -> None:
    assert await rescan(headers) == (403, 0)


def raw(url: str, request: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(request)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: a\r\nConnection: close\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /v1/deltas/rescan HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", 200),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_host_is_named_once(live: Live, request_: bytes, status: int) -> None:
    assert raw(live.url, request_).startswith(b"HTTP/1.1 %d" % status)
