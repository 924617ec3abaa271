"""The application: a pure factory, so that tests and the process build the same thing."""

from __future__ import annotations

from fastapi import FastAPI

from server.api import chat, completions, deltas, errors, health, models, tokens
from server.api.context import Api
from server.api.middleware import EarlyRefusal, HeadAsGet, RequestCap, RequestContext
from server.api.open_requests import OpenRequests
from server.engine.types import EngineClient
from server.metrics.page import MetricsPage
from server.metrics.series import Metrics
from server.settings import Settings


def create_app(engine: EngineClient, settings: Settings, metrics: Metrics | None = None) -> FastAPI:
    """Return the ASGI application over a started (or starting) engine.

    metrics is the engine's observer; the engine's own gauges are added by whoever made both
    (`Metrics.watch`). The parts are at ``app.state.api``.
    """
    metrics = metrics or Metrics()
    # No generated documentation pages: they load scripts from elsewhere.
    app = FastAPI(
        title="impart-serve",
        version=health.package_version(),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    api = Api(engine, settings, metrics, OpenRequests(), MetricsPage(metrics.registry))
    app.state.api = api
    errors.install(app)
    for module in (completions, chat, models, deltas, tokens, health):
        app.include_router(module.router)
    app.add_middleware(HeadAsGet)
    # The last added is the outermost.
    app.add_middleware(RequestCap, max_bytes=settings.max_body_bytes)
    app.add_middleware(EarlyRefusal, check=api.check_open)
    app.add_middleware(RequestContext, metrics=metrics)
    return app
