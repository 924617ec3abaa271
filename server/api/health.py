"""Probes and other things that machines ask: live, ready, load, version, metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from server.api.access import require_admin
from server.api.context import api_of
from server.metrics.series import CONTENT_TYPE

router = APIRouter()


@router.get("/health")
@router.get("/health/live")
@router.api_route("/ping", methods=["GET", "POST"])
async def live(request: Request) -> JSONResponse:
    """200 while the engine's loop has a recent heartbeat; restart the process when it is not."""
    alive = api_of(request).engine.is_alive()
    return JSONResponse({"status": "alive" if alive else "dead"}, 200 if alive else 503)


@router.get("/health/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while requests are welcome; a variant that fails to load does not change it."""
    is_ready = api_of(request).engine.is_ready()
    return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)


@router.get("/load", dependencies=[Depends(require_admin)])
async def load(request: Request) -> JSONResponse:
    """Requests being answered now (vLLM's shape)."""
    return JSONResponse({"server_load": len(api_of(request).open_requests)})


@router.get("/is_sleeping")
async def is_sleeping() -> JSONResponse:
    """Whether the weights were put aside (vLLM's question): this server never does that."""
    return JSONResponse({"is_sleeping": False})


@router.get("/version")
async def show_version() -> JSONResponse:
    """The version of this server."""
    return JSONResponse({"version": package_version()})


@router.get("/metrics", dependencies=[Depends(require_admin)])
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(await api_of(request).metrics_page.text(), media_type=CONTENT_TYPE)


def package_version() -> str:
    """Return the installed version; a source tree on the path without installation has none."""
    try:
        return version("impart-serve")
    except PackageNotFoundError:
        return "unknown"
