"""What every route needs, hung on the application once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from fastapi import Request
from starlette.types import Scope

from server.api.open_requests import OpenRequests
from server.engine.types import EngineClient, Ticket
from server.errors import QueueFull
from server.fleet.aliases import Aliases
from server.fleet.registrar import Registrar
from server.fleet.store import FleetStore
from server.metrics.page import MetricsPage
from server.metrics.series import Metrics
from server.settings import Settings
from server.tenants.directory import Directory
from server.tenants.limits import Limiter
from server.tenants.principal import ANYBODY, Principal
from server.tenants.tenant import EVERYBODY, Tenant

if TYPE_CHECKING:  # SQLAlchemy is imported where there is a ledger only
    from server.ledger.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Api:
    """The application's parts.

    fleet         what operators have said of variants
    aliases       names that operators point to variants
    registrar     adds and removes variants
    ledger        None: what was used is not kept
    changing      held while what operators have said is changed
    tasks         that nobody waits for
    body_parsers  one thread: several large bodies at once would only take the interpreter from the
                  event loop more often
    """

    engine: EngineClient
    settings: Settings
    metrics: Metrics
    open_requests: OpenRequests
    metrics_page: MetricsPage
    directory: Directory
    limiter: Limiter
    fleet: FleetStore
    registrar: Registrar
    aliases: Aliases
    ledger: Ledger | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    body_parsers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="body-parser")
    )

    def check_open(self, scope: Scope) -> None:
        """Refuse what no request of this tenant can change; see `EngineClient.check_open`."""
        with self._counting_refusals():
            self.engine.check_open(_principal_in(scope))

    def admit(self, n_sequences: int, principal: Principal) -> Ticket:
        """Take permits for a request; see `EngineClient.admit`."""
        with self._counting_refusals():
            return self.engine.admit(n_sequences, principal)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except QueueFull:
            self.metrics.rejected()
            raise


def api_of(request: Request) -> Api:
    """Return the parts of the application that serves this request."""
    return cast(Api, request.app.state.api)


def log_fields(request: Request) -> dict[str, Any]:
    """Return the dict whose items end up in this request's log line. Never put prompts there."""
    return cast("dict[str, Any]", request.scope.setdefault("impart.log", {}))


def request_id(request: Request) -> str:
    """Return the id that names this request in the log and in `x-request-id`."""
    return cast(str, request.scope["impart.request_id"])


def arrival(request: Request) -> float:
    """Return when this request's headers had come, by `time.monotonic`."""
    return cast(float, request.scope["impart.arrived"])


def principal(request: Request) -> Principal:
    """Return who this request is from."""
    return _principal_in(request.scope)


def _principal_in(scope: Scope) -> Principal:
    return cast(Principal, scope.get("impart.principal", ANYBODY))


def tenant(request: Request) -> Tenant:
    """Return the tenant of this request, as it was described when the request came."""
    return cast(Tenant, request.scope.get("impart.tenant", EVERYBODY))
