"""Authentication: every route wants a key, in one place and one form, and tells nothing without."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from fastapi import FastAPI

from server.api.auth import OPEN_PATHS
from tests.server.api.fake import BASE
from tests.server.api.tenancy import KEYS, Tenancy, bearer, completion


def paths_of(app: FastAPI) -> Iterator[str]:
    """The paths of all its routes, those of included routers among them."""
    for route in app.routes:
        inner = getattr(route, "original_router", None)
        yield from (r.path for r in inner.routes) if inner is not None else [route.path]


METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


@pytest.fixture
def tenancy(tmp_path):
    return Tenancy(tmp_path)


async def test_every_route_and_method_without_key_is_401_but_probes(tenancy):
    for app, call in ((tenancy.app, tenancy.call), (tenancy.admin, tenancy.call_admin)):
        paths = list(paths_of(app))
        assert len(paths) > 8
        for path in [*paths, "/docs", "/openapi.json", "/nowhere", "//health", "/health/x"]:
            for method in METHODS:
                answer = await call(method, path.replace("{name:path}", "alpha"))
                wants_key = path not in OPEN_PATHS
                assert (answer.status_code == 401) is wants_key, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {KEYS['acme'][:-1]}")],
        [("authorization", f"Bearer {KEYS['acme']}x")],
        [("authorization", f"Bearer {KEYS['acme'].upper()}")],
        [("authorization", f"Bearer {KEYS['acme']} {KEYS['acme']}")],
        [("authorization", f"Bearer \t{KEYS['acme']}")],
        [("authorization", f"Basic {KEYS['acme']}")],
        [("authorization", KEYS["acme"])],
        [("authorization", "Bearer schlüssel".encode("latin-1"))],
        [("authorization", f"Bearer {KEYS['admin']}")],
        [("authorization", f"Bearer {KEYS['acme']}"), ("authorization", "Bearer other")],
        [("authorization", f"Bearer {KEYS['acme']}"), ("authorization", f"Bearer {KEYS['acme']}")],
        [("x-api-key", KEYS["acme"])],
        [("x-tenant", "acme")],
        [("cookie", f"authorization=Bearer {KEYS['acme']}")],
    ],
)
async def test_wrong_or_misplaced_key_is_401_and_reads_no_body(tenancy, headers):
    answer = await tenancy.call(
        "POST",
        f"/v1/completions?api_key={KEYS['acme']}&key={KEYS['acme']}",
        headers=[*headers, ("content-type", "application/json")],
        content=b"{",
    )
    assert answer.status_code == 401
    assert KEYS["acme"] not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_right_key_lets_in_and_goes_to_the_engine(tenancy, scheme):
    answer = await tenancy.call(
        "POST",
        "/v1/completions",
        headers={"authorization": f"{scheme} {KEYS['acme']}"},
        json=completion("alpha"),
    )
    assert answer.status_code == 200
    principal = tenancy.engine.principals[-1]
    assert (principal.tenant, principal.key_id, principal.weight) == ("acme", "one", 2.0)


async def test_key_is_in_no_log_line_and_its_id_is(tenancy, caplog):
    with caplog.at_level(logging.DEBUG):
        await tenancy.call("GET", "/v1/models", headers=bearer("acme"))
        await tenancy.call("GET", f"/v1/models?key={KEYS['acme']}", headers=bearer("globex"))
        await tenancy.call("GET", "/v1/models", headers={"authorization": "Bearer wrong-secret"})
    said = "".join(str(vars(record)) for record in caplog.records if "server" in record.name)
    assert not any(key in said for key in (*KEYS.values(), "wrong-secret"))
    assert "'tenant': 'acme', 'key_id': 'one'" in said.replace('"', "'")


@pytest.mark.parametrize(
    ("headers", "tenant"),
    [
        ({**bearer("proxy"), "x-tenant": "globex"}, "globex"),
        ({**bearer("acme"), "x-tenant": "globex"}, "acme"),  # nobody believes it of a tenant
        ({**bearer("proxy"), "x_tenant": "globex"}, None),
        ({**bearer("proxy"), "x-tenant": "nobody"}, None),
        ({**bearer("proxy"), "x-tenant": "acme, globex"}, None),
        ([*bearer("proxy").items(), ("x-tenant", "acme"), ("x-tenant", "globex")], None),
        (bearer("proxy"), None),
        ({"x-tenant": "globex"}, None),
    ],
)
async def test_only_the_proxy_names_a_tenant(tmp_path, headers, tenant):
    tenancy = Tenancy(tmp_path, tenant_header="x-tenant")
    model = "beta" if tenant == "globex" else "alpha"
    answer = await tenancy.call("POST", "/v1/completions", headers=headers, json=completion(model))
    assert answer.status_code == (401 if tenant is None else 200)
    assert [p.tenant for p in tenancy.engine.principals] == ([] if tenant is None else [tenant])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/deltas/rescan"),
        ("GET", "/metrics"),
        ("GET", "/load"),
        ("GET", "/v1/tenants"),
        ("POST", "/v1/tenants/reload"),
    ],
)
async def test_admin_route_takes_the_admin_key_on_its_listener_only(tenancy, method, path):
    for who, on_main, on_admin in (("acme", 403, 403), ("admin", 401, 200)):
        assert (await tenancy.call(method, path, headers=bearer(who))).status_code == on_main
        answer = await tenancy.call_admin(method, path, headers=bearer(who))
        assert answer.status_code == on_admin
    wrong = {"authorization": "Bearer wrong-key-0123456789"}
    assert (await tenancy.call_admin(method, path, headers=wrong)).status_code == 401


async def test_admin_listener_generates_nothing(tenancy):
    answer = await tenancy.call_admin(
        "POST", "/v1/completions", headers=bearer("admin"), json=completion(BASE)
    )
    assert answer.status_code == 404


async def test_bodies_of_strangers_are_not_counted_or_read(tenancy):
    headers = {"content-length": str(10**12), "authorization": "Bearer no"}
    answer = await tenancy.call("POST", "/v1/completions", headers=headers, content=b"x")
    assert answer.status_code == 401
