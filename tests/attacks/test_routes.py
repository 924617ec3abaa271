"""Routes: all of them want a key; what changes the server or shows all of it wants the admin's."""

from __future__ import annotations

import pytest

from tests.attacks.conftest import Running

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE", "PROPFIND")
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/base", "/v1/deltas",
    "/v1/deltas/rescan", "/v1/tenants", "/v1/tenants/reload", "/tokenize", "/detokenize",
    "/metrics", "/load", "/version", "/docs", "/redoc", "/openapi.json", "/", "//v1/models",
    "/v1//models", "/v1/models/", "/%76%31/models", "/health/../metrics", "/health/%2e%2e/metrics",
    "/health/live/", "/ping/metrics", "/v1/usage", "/v1/audit", "/invocations", "/pause",
)  # fmt: skip
ADMIN = (
    ("POST", "/v1/deltas/rescan"), ("GET", "/v1/tenants"), ("POST", "/v1/tenants/reload"),
    ("GET", "/metrics"), ("GET", "/load"), ("HEAD", "/metrics"),
)  # fmt: skip


@pytest.mark.parametrize("listener", ["main", "admin"])
def test_route_without_key_is_401_whatever_the_method(server: Running, listener: str) -> None:
    client = server.client(None) if listener == "main" else server.admin(None)
    answers = {
        (method, path): client.request(method, path).status_code
        for path in PATHS
        for method in METHODS
    }
    assert {asked: status for asked, status in answers.items() if status != 401} == {}
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN)
def test_tenant_key_on_an_admin_route_is_403_everywhere(
    server: Running, method: str, path: str
) -> None:
    assert server.client("acme").request(method, path).status_code == 403
    assert server.admin("acme").request(method, path).status_code == 403
    assert server.client("admin").request(method, path).status_code == 401
    assert server.admin().request(method, path).status_code == 200


def test_admin_key_is_no_tenants(server: Running) -> None:
    assert server.client("admin").get("/v1/models").status_code == 401
    body = {"model": "base", "prompt": "x"}
    assert server.admin().post("/v1/completions", json=body).status_code == 404
