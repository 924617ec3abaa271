"""Which addresses the server takes, and that none of them is open to the world by mistake."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from server.errors import ConfigError
from server.process.listen import bind, close, is_exposed
from server.settings import Settings
from server.tenants.directory import key_of

LAST_PORT = 65535

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets.

    admin      those of the admin routes; none without an admin key
    admin_key  who may use them
    """

    main: list[socket.socket]
    admin: list[socket.socket]
    admin_key: str | None = None


@contextmanager
def listeners(settings: Settings, *, has_keys: bool) -> Iterator[Listeners]:
    """Bind what the settings ask for; the addresses go back in the end.

    has_keys  whether a request needs a key

    Raises ConfigError: an address cannot be had, or would serve other machines without a key.
    """
    admin_key = key_of("admin_key", settings.admin_key)
    if has_keys and settings.insecure_no_auth:
        raise ConfigError("insecure_no_auth serves without keys, but keys are given: drop one")
    with ExitStack() as given_back:
        main = bind(settings.host, settings.port)
        given_back.callback(close, main)
        if not has_keys and is_exposed(main):
            _refuse_or_warn(settings)
        admin: list[socket.socket] = []
        if admin_key is not None:
            admin = bind(settings.admin_host, _admin_port(settings))
            given_back.callback(close, admin)
        elif has_keys:
            log.info("there is no admin key: nothing can be changed or scraped over HTTP")
        yield Listeners(main, admin, admin_key)


def _refuse_or_warn(settings: Settings) -> None:
    if not settings.insecure_no_auth:
        raise ConfigError(
            f"host {settings.host} can be reached from other machines, and there is no key: set "
            "IMPART_API_KEY or --tenants FILE, or serve whoever comes with --insecure-no-auth"
        )
    log.warning(
        "the server answers whoever reaches %s port %d, without any key",
        settings.host,
        settings.port,
    )


def _admin_port(settings: Settings) -> int:
    if settings.admin_port is not None:
        return settings.admin_port
    if settings.port == LAST_PORT:
        raise ConfigError("there is no port after 65535 for the admin routes: set admin_port")
    return settings.port + 1 if settings.port else 0
