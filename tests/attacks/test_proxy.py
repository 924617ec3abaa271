"""The header by which a trusted proxy names tenants: nobody else can use it, however it is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.attacks.conftest import KEYS, Running


@pytest.fixture(scope="module")
def behind_proxy(start: Callable[..., Running]) -> Running:
    return start("--tenant-header", "x-tenant", "--trusted-proxy-key", KEYS["proxy"])


def models(server: Running, lines: str) -> tuple[int, bytes]:
    answer = server.raw(
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{lines}Connection: close\r\n\r\n".encode()
    )
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize(
    ("lines", "status", "sees"),
    [
        ("Authorization: Bearer PROXY\r\nX-Tenant: globex\r\n", 200, "globex"),
        ("Authorization: Bearer ACME\r\nX-Tenant: globex\r\n", 200, "acme"),
        ("X-Tenant: globex\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\nX-Tenant:\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\nX_Tenant: globex\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\nX-Tenant: globex,acme\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\nX-Tenant: acme\r\nX-Tenant: globex\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\nX-Tenant: nobody\r\n", 401, None),
        ("Authorization: Bearer PROXY\r\nX-Tenant: default\r\n", 401, None),
        ("Authorization: Bearer ACME\r\nAuthorization: Bearer PROXY\r\nX-Tenant: a\r\n", 401, None),
        ("Authorization: Bearer ACME\r\nFoo: a\r\n X-Tenant: globex\r\n", 200, "acme"),
        ("Authorization: Bearer ACME\r\nConnection: x-tenant\r\nX-Tenant: globex\r\n", 200, "acme"),
    ],
)
def test_header_is_believed_of_the_proxy_alone(
    behind_proxy: Running, lines: str, status: int, sees: str | None
) -> None:
    for name in ("acme", "proxy"):
        lines = lines.replace(name.upper(), KEYS[name])
    found, answer = models(behind_proxy, lines)
    if found == 400:  # a form of header that is refused before anybody looks at it
        assert "\r\n " in lines
        return
    assert found == status
    assert sees is None or (f"{sees}-one".encode() in answer) is True
    other = {"acme": b"globex-one", "globex": b"acme-one", None: b"-one"}[sees]
    assert other not in answer
