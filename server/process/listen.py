"""The address to listen on, taken before anything is loaded: a port in use is said at once.

Connections are refused until the server listens, so that nobody takes a server that still loads for
one that serves. Two that load must not share a port meanwhile, as Linux lets sockets do that have
SO_REUSEADDR and do not listen yet. So a socket gets it only when it listens: the connections that
it accepts then do not keep the next server from the port for a minute after they ended. Where that
has happened (they were another program's), it is needed to bind at all.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Iterable
from typing import Any

from server.errors import ConfigError

BACKLOG = 2048  # connections that wait to be accepted
LAST_PRIVILEGED_PORT = 1023


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind every address that `host` names, all to one port; port 0: to any free one.

    Raises ConfigError, saying what can be done.
    """
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in _addresses(host, port):
        number = bound[0].getsockname()[1] if bound else port
        try:
            bound.append(_bound(family, kind, protocol, (address[0], number, *address[2:])))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # maybe no IPv6 here
                missing = error
                continue
            close(bound)
            raise _refusal(host, number, error) from error
    if not bound:
        assert missing is not None, "a name has an address"
        raise _refusal(host, port, missing) from missing
    return bound


def listen(sockets: Iterable[socket.socket]) -> None:
    """Let clients connect. Raises ConfigError if another process listens there by now."""
    for one in sockets:
        _reuse(one)
        try:
            one.listen(BACKLOG)
        except OSError as error:
            host, port = one.getsockname()[:2]
            raise _refusal(host, port, error) from error


def is_exposed(sockets: Iterable[socket.socket]) -> bool:
    """Whether another machine could reach one of these addresses."""
    return not all(_is_loopback(one.getsockname()[0]) for one in sockets)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def close(sockets: Iterable[socket.socket]) -> None:
    """Give the addresses back; closing twice is no mistake."""
    for one in sockets:
        one.close()


def urls(sockets: Iterable[socket.socket]) -> list[str]:
    """Where clients of this machine reach listening sockets."""
    found = []
    for one in sockets:
        host, port = one.getsockname()[:2]
        found.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    return found


def _addresses(host: str, port: int) -> list[Any]:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"host {host!r} has no address ({reason}); 127.0.0.1 is this machine alone, 0.0.0.0 "
            "all its interfaces"
        ) from error
    return list(dict.fromkeys(found))


def _bound(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        if family == socket.AF_INET6:  # IPv4 has a socket of its own
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            made.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _reuse(made)
            made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _reuse(one: socket.socket) -> None:
    if sys.platform != "win32":  # there it would share the port with another server
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _refusal(host: str, port: int, error: OSError) -> ConfigError:
    match error.errno:
        case errno.EADDRINUSE:
            remedy = "another process uses it; stop that one or choose another --port"
        case errno.EACCES if port <= LAST_PRIVILEGED_PORT:
            remedy = f"this user may not use ports below {LAST_PRIVILEGED_PORT + 1}; choose another"
        case errno.EADDRNOTAVAIL:
            remedy = "this machine has no such address; --host 0.0.0.0 takes all it has"
        case _:
            remedy = f"{error.strerror}; choose another --host or --port"
    return ConfigError(f"the server cannot listen on {host} port {port}: {remedy}")
