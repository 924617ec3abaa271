"""The address: taken once, shared with nobody, given back at once."""

from __future__ import annotations

import socket

import pytest

from server.errors import ConfigError
from server.process.listen import bind, close, listen, urls


def port_of(sockets: list[socket.socket]) -> int:
    port: int = sockets[0].getsockname()[1]
    return port


def test_bind_port_0_takes_a_free_port_which_refuses_until_it_listens() -> None:
    sockets = bind("127.0.0.1", 0)
    try:
        port = port_of(sockets)
        assert port > 0
        assert urls(sockets) == [f"http://127.0.0.1:{port}"]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        listen(sockets)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    finally:
        close(sockets)


@pytest.mark.parametrize("listens", [False, True])
def test_bind_address_of_a_server_that_loads_or_serves_is_refused(listens: bool) -> None:
    sockets = bind("127.0.0.1", 0)
    try:
        if listens:
            listen(sockets)
        with pytest.raises(ConfigError, match=r"another process uses it; .* another --port"):
            bind("127.0.0.1", port_of(sockets))
    finally:
        close(sockets)


def test_bind_port_whose_server_has_just_ended_is_taken_again() -> None:
    """Its connections linger for a minute: the server was the one that closed them."""
    sockets = bind("127.0.0.1", 0)
    port = port_of(sockets)
    listen(sockets)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        accepted, _ = sockets[0].accept()
        accepted.close()
        assert client.recv(1) == b""
    close(sockets)
    again = bind("127.0.0.1", port)
    try:
        listen(again)
    finally:
        close(again)


def test_listen_where_somebody_listens_by_now_is_refused() -> None:
    sockets = bind("127.0.0.1", 0)
    other = socket.socket()
    try:
        for one in (sockets[0], other):  # as after a crash: both may bind, one may listen
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port_of(sockets)))
        other.listen()
        with pytest.raises(ConfigError, match="another process uses it"):
            listen(sockets)
    finally:
        other.close()
        close(sockets)


def test_bind_name_with_several_addresses_takes_one_port_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", 0)) for n in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sockets = bind("both", 0)
    try:
        assert [one.getsockname()[0] for one in sockets] == ["127.0.0.1", "127.0.0.2"]
        assert len({one.getsockname()[1] for one in sockets}) == 1
    finally:
        close(sockets)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("no such host", "has no address"),
        ("192.0.2.1", "this machine has no such address"),  # of the block for documentation
    ],
)
def test_bind_wrong_host_is_refused_with_the_remedy(host: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        bind(host, 0)


class Version6(socket.socket):
    """Not every machine has IPv6."""

    def getsockname(self) -> tuple[str, int, int, int]:
        return "::1", 8000, 0, 0


def test_urls_of_ipv6_have_brackets() -> None:
    with Version6() as one:
        assert urls([one]) == ["http://[::1]:8000"]
