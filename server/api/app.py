"""The applications: pure factories, so that tests and the process build the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from server.api import (
    aliases,
    chat,
    completions,
    delta_events,
    delta_life,
    deltas,
    errors,
    health,
    lora,
    models,
    registration,
    tenants,
    tokens,
    trust,
    usage,
)
from server.api.account import LedgerRecorder
from server.api.auth import Authentication, Identify, by_admin_key, by_tenant
from server.api.context import Api
from server.api.middleware import EarlyRefusal, HeadAsGet, RequestCap, RequestContext
from server.api.names import find_model
from server.api.open_requests import OpenRequests
from server.api.quota import CountedRequests
from server.api.spans import SpanRecorder, Tracer
from server.engine.types import EngineClient
from server.fleet.aliases import Aliases
from server.fleet.registrar import registrar_of
from server.fleet.store import FleetStore
from server.metrics.page import MetricsPage
from server.metrics.series import Metrics
from server.settings import Settings
from server.tenants.directory import Directory
from server.tenants.limits import limiter_of

TENANT_ROUTERS = (completions.router, chat.router, tokens.router)
SHARED_ROUTERS = (
    models.router,
    delta_events.router,  # before the delta of any name
    deltas.router,
    delta_life.router,
    trust.router,
    registration.router,
    aliases.router,
    lora.router,
    health.router,
    tenants.router,
    usage.router,
)

if TYPE_CHECKING:  # SQLAlchemy is imported where there is a ledger only
    from server.ledger.ledger import Ledger


def create_app(
    engine: EngineClient,
    settings: Settings,
    metrics: Metrics | None = None,
    directory: Directory | None = None,
    ledger: Ledger | None = None,
    tracer: Tracer | None = None,
    fleet: FleetStore | None = None,
) -> FastAPI:
    """Return the ASGI application over a started (or starting) engine.

    metrics    the engine's observer; the engine's own gauges are added by whoever made both
               (`Metrics.watch`)
    directory  who the tenants are; None: there are no keys
    ledger     where generation requests and what administrators do are noted; None: nowhere
    tracer     takes a span for each request; None: there are no traces
    fleet      what operators have said of variants; None: it is kept in memory

    The parts are at ``app.state.api``. Without keys whoever is here may also change the server,
    unless there is an admin listener for that.
    """
    metrics = metrics or Metrics()
    fleet = fleet or FleetStore(None)
    known = Aliases(fleet, lambda model: find_model(engine, model) is not None)
    api = Api(
        engine,
        settings,
        metrics,
        OpenRequests(),
        MetricsPage(metrics.registry),
        directory or Directory(),
        limiter_of(settings, ledger, metrics.limits_unreachable.inc),
        fleet,
        registrar_of(settings, engine.names, fleet, lambda name: known.get(name) is not None),
        known,
        ledger,
    )
    identify = by_tenant(
        api.directory, settings.tenant_header, shares_admin=settings.admin_key is None
    )
    return _wrapped(api, (*TENANT_ROUTERS, *SHARED_ROUTERS), identify, ledger, tracer)


def create_admin_app(api: Api, admin_key: str) -> FastAPI:
    """Return the ASGI application of the admin listener, over the parts of the other one.

    It has an address and a key of its own, so that nothing a tenant can reach leads there.
    """
    return _wrapped(api, SHARED_ROUTERS, by_admin_key(admin_key, api.directory))


def _wrapped(
    api: Api,
    routers: Sequence[APIRouter],
    identify: Identify,
    ledger: Ledger | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    # No generated documentation pages: they load scripts from elsewhere.
    app = FastAPI(
        title="impart-serve",
        version=health.package_version(),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.api = api
    errors.install(app)
    for router in routers:
        app.include_router(router)
    app.add_middleware(HeadAsGet)
    # The last added is the outermost.
    app.add_middleware(RequestCap, max_bytes=api.settings.max_body_bytes)
    app.add_middleware(CountedRequests, limiter=api.limiter)
    app.add_middleware(EarlyRefusal, check=api.check_open)
    if ledger is not None:
        app.add_middleware(LedgerRecorder, ledger=ledger)
    if tracer is not None:
        app.add_middleware(SpanRecorder, tracer=tracer)
    app.add_middleware(Authentication, identify=identify)
    app.add_middleware(RequestContext, metrics=api.metrics)
    return app
