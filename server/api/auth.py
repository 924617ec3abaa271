"""Who may in: every request shows a key before anything else of it is looked at.

Denied unless allowed: only the probes of `OPEN_PATHS` need none. A key comes in one Authorization
header and nowhere else; a query string ends up in logs. What is found goes with the request:

    scope["impart.tenant"], scope["impart.principal"]    see `server.api.context`
    scope["impart.admin"]                                whether it may change the server
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import response_of
from server.errors import Forbidden, ServeError, Unauthenticated
from server.tenants.directory import Caller, Directory
from server.tenants.keys import hash_of
from server.tenants.tenant import EVERYBODY

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
SEVERAL = "The request has several Authorization headers; send one."
_BEARER = re.compile(r"bearer +([\x21-\x7e]{1,512})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rights:
    """What a request was found to be allowed."""

    caller: Caller
    is_admin: bool


Identify = Callable[[Headers], Rights]  # raises Unauthenticated, Forbidden


class Authentication:
    """Asks `identify` of every request but the probes'."""

    def __init__(self, app: ASGIApp, identify: Identify) -> None:
        self._app = app
        self._identify = identify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            rights = self._identify(Headers(scope=scope))
        except ServeError as error:
            await response_of(error)(scope, receive, send)
            return
        caller = rights.caller
        scope["impart.tenant"] = caller.tenant
        scope["impart.principal"] = caller.principal
        scope["impart.admin"] = rights.is_admin
        if caller.key_id:
            scope["impart.log"].update(tenant=caller.tenant.name, key_id=caller.key_id)
        await self._app(scope, receive, send)


def by_tenant(directory: Directory, tenant_header: str | None, *, shares_admin: bool) -> Identify:
    """Identify callers by their tenants' keys, or a trusted proxy's word.

    shares_admin  whether who needs no key may also change the server: nobody else is there
    """

    def identify(headers: Headers) -> Rights:
        if not directory.has_keys:
            return Rights(Caller(EVERYBODY), is_admin=shares_admin)
        named = None if tenant_header is None else headers.getlist(tenant_header)
        if named is not None and len(named) > 1:
            raise Unauthenticated(f"The request has several {tenant_header} headers; send one.")
        caller = directory.caller(bearer_key(headers), named[0] if named else None)
        return Rights(caller, is_admin=False)

    return identify


def by_admin_key(admin_key: str, directory: Directory) -> Identify:
    """Identify who may change the server."""
    admin_hash = hash_of(admin_key)

    def identify(headers: Headers) -> Rights:
        key = bearer_key(headers)
        if key is not None and hmac.compare_digest(hash_of(key), admin_hash):
            return Rights(Caller(EVERYBODY), is_admin=True)
        if directory.has_keys:
            directory.caller(key)  # raises Unauthenticated
            raise Forbidden("A tenant's key may not do this; the admin key may.")
        raise Unauthenticated("Incorrect API key provided.")

    return identify


def bearer_key(headers: Headers) -> str | None:
    """Return the key of an Authorization header, None without one. Raises Unauthenticated."""
    given = headers.getlist("authorization")
    if not given:
        return None
    if len(given) > 1:
        raise Unauthenticated(SEVERAL)
    match = _BEARER.fullmatch(given[0])
    if match is None:
        raise Unauthenticated("Incorrect API key provided: expected Authorization: Bearer KEY.")
    return match[1]
