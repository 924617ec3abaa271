"""What every route needs, hung on the application once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request

from server.api.gate import Gate
from server.engine.types import EngineClient
from server.metrics.series import Metrics
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Api:
    """The application's parts."""

    engine: EngineClient
    settings: Settings
    metrics: Metrics
    gate: Gate


def api_of(request: Request) -> Api:
    """Return the parts of the application that serves this request."""
    return cast(Api, request.app.state.api)


def log_fields(request: Request) -> dict[str, Any]:
    """Return the dict whose items end up in this request's log line. Never put prompts there."""
    return cast("dict[str, Any]", request.scope.setdefault("impart.log", {}))


def request_id(request: Request) -> str:
    """Return the id that names this request in the log and in `x-request-id`."""
    return cast(str, request.scope["impart.request_id"])
