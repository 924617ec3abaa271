"""``/v1/usage`` and ``/v1/audit`` over a real ledger, and what a server without one says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.ledger.database import open_database
from server.ledger.ledger import Ledger
from server.ledger.records import DAY_S, AuditRow, UsageQuery, UsageRow
from server.metrics.series import Metrics
from tests.server.api.tenancy import TENANTS, Tenancy, bearer, completion
from tests.server.ledger.rows import NOON, request_row

MIDNIGHT = NOON - DAY_S // 2
RANGE = f"start_time={MIDNIGHT:.0f}&end_time={MIDNIGHT + 2 * DAY_S:.0f}"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(open_database(tmp_path, None)) as made:
        for n in range(4):
            made.add(request_row(ended_s=NOON + n // 2 * DAY_S, model=f"m{n % 2}"))
        made.add(request_row(tenant="=other", model="m0"))
        made.audit(AuditRow("admin", "rescan", "deltas", "ok", "r1", time_s=NOON))
    with Ledger(open_database(tmp_path, None)) as again:
        yield again


@pytest.fixture
def tenancy(tmp_path: Path, ledger: Ledger) -> Tenancy:
    return Tenancy(tmp_path, ledger=ledger)


async def own(tenancy: Tenancy, query: str, tenant: str = "acme") -> httpx.Response:
    return await tenancy.call("GET", f"/v1/usage?{query}", headers=bearer(tenant))


async def everybodys(tenancy: Tenancy, query: str, path: str = "/v1/usage") -> httpx.Response:
    return await tenancy.call_admin("GET", f"{path}?{query}", headers=bearer("admin"))


def result(n: int, **names: str) -> dict[str, Any]:
    return {
        "object": "usage.result",
        "input_tokens": 5 * n,
        "input_cached_tokens": 2 * n,
        "output_tokens": 7 * n,
        "num_model_requests": n,
        "tenant": None,
        "model": None,
        "api_key_id": None,
    } | names


async def test_tenant_sees_its_own_totals_and_nobody_elses(tenancy: Tenancy) -> None:
    found = (await own(tenancy, RANGE)).json()
    (bucket,) = found.pop("data")
    assert found == {"object": "page", "has_more": False, "next_page": None}
    assert (bucket["start_time"], bucket["end_time"]) == (MIDNIGHT, MIDNIGHT + 2 * DAY_S)
    assert bucket["results"] == [result(4)]
    others = (await own(tenancy, RANGE, "globex")).json()
    assert others["data"][0]["results"] == [result(0)]


async def test_groups_by_day_are_buckets_as_openais(tenancy: Tenancy) -> None:
    for groups in ("group_by=model,day", "group_by=day&group_by=model", "group_by[]=model,day"):
        found = (await own(tenancy, f"{RANGE}&{groups}")).json()
        starts = [(bucket["object"], bucket["start_time"]) for bucket in found["data"]]
        assert starts == [("bucket", MIDNIGHT), ("bucket", MIDNIGHT + DAY_S)]
        for bucket in found["data"]:
            assert bucket["results"] == [result(1, model="m0"), result(1, model="m1")]


async def test_pages_end_where_there_is_no_more(tenancy: Tenancy) -> None:
    query, models = f"{RANGE}&group_by=model&limit=1", []
    page: str | None = "0"
    while page is not None:
        found = (await own(tenancy, f"{query}&page={page}")).json()
        models += [one["model"] for bucket in found["data"] for one in bucket["results"]]
        assert found["has_more"] == (found["next_page"] is not None)
        page = found["next_page"]
    assert models == ["m0", "m1"]


async def test_admin_sees_all_tenants_or_one(tenancy: Tenancy) -> None:
    found = (await everybodys(tenancy, f"{RANGE}&group_by=tenant")).json()
    expected = [result(1, tenant="=other"), result(4, tenant="acme")]
    assert found["data"][0]["results"] == expected
    one = (await everybodys(tenancy, f"{RANGE}&tenant=acme")).json()
    assert one["data"][0]["results"] == [result(4)]


async def test_csv_has_a_header_and_no_formula(tenancy: Tenancy) -> None:
    answer = await everybodys(tenancy, f"{RANGE}&group_by=tenant,day&format=csv&limit=1")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["x-next-page"] == "1"
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert (row["tenant"], row["day"], row["num_model_requests"]) == ("'=other", "2026-11-01", "1")


async def test_audit_log_is_shown_to_the_admin_alone(tenancy: Tenancy) -> None:
    answer = await everybodys(tenancy, RANGE, "/v1/audit")
    entry = {"object": "audit.entry", "time": NOON, "actor": "admin", "action": "rescan"}
    entry |= {"target": "deltas", "outcome": "ok", "request_id": "r1"}
    assert answer.json()["data"] == [entry]
    text = (await everybodys(tenancy, f"{RANGE}&format=csv", "/v1/audit")).text
    assert text.splitlines()[0] == "time,actor,action,target,outcome,request_id"
    for who in ("acme", "globex"):
        refused = await tenancy.call("GET", "/v1/audit", headers=bearer(who))
        assert refused.status_code == 403


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=tenant", "group_by"),
        ("group_by=model;DROP TABLE requests", "group_by"),
        ("tenant=other", "tenant"),
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("page=-1", "page"),
        ("start_time=1e9", "start_time"),
        ("start_time=99999999999999999999", "start_time"),
        ("start_time=100&end_time=100", "end_time"),
        ("start_time=0&end_time=31708800", "end_time"),
        ("format=xml", "format"),
        ("nosuch=1", "nosuch"),
    ],
)
async def test_query_out_of_bounds_is_a_400_that_names_the_field(
    tenancy: Tenancy, query: str, param: str
) -> None:
    answer = await own(tenancy, query)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


async def test_server_without_a_ledger_says_how_to_have_one(tmp_path: Path) -> None:
    tenancy = Tenancy(tmp_path)
    answers = [await own(tenancy, "")]
    answers += [await everybodys(tenancy, "", path) for path in ("/v1/usage", "/v1/audit")]
    for answer in answers:
        assert answer.status_code == 404
        assert "--state-dir" in answer.json()["error"]["message"]


async def test_what_a_tenant_uses_and_an_admin_does_is_in_the_ledger(
    tmp_path: Path,
) -> None:
    """Who has no key has no row; who is over its limits has one without tokens."""
    with Ledger(open_database(tmp_path, None)) as ledger:
        tenancy = Tenancy(tmp_path, ledger=ledger)
        limited = TENANTS.replace("weight = 2", "requests_per_minute = 1")
        tenancy.path.write_text(limited)
        tenancy.app.state.api.directory.reload()
        for headers in (bearer("acme"), {}, bearer("acme")):
            json = completion("alpha", prompt="Hello")
            await tenancy.call("POST", "/v1/completions", headers=headers, json=json)
        for path in ("/v1/deltas/rescan", "/v1/tenants/reload"):
            await tenancy.call_admin("POST", path, headers=bearer("admin"))
        tenancy.path.write_text("nonsense")
        await tenancy.call_admin("POST", "/v1/tenants/reload", headers=bearer("admin"))
    with Ledger(open_database(tmp_path, None)) as ledger:
        used = ledger.usage(UsageQuery(0, 2**33, ("tenant", "model", "key")))
        done = ledger.audited(0, 2**33, limit=9)
    assert used == [
        UsageRow(1, 0, 0, 0, tenant="acme", model="", key="one"),
        UsageRow(1, 5, 0, 3, tenant="acme", model="alpha", key="one"),
    ]
    assert [(one.actor, one.action, one.target, one.outcome) for one in reversed(done)] == [
        ("admin", "rescan", "deltas", "ok"),
        ("admin", "reload", "tenants", "ok"),
        ("admin", "reload", "tenants", "ConfigError"),
    ]
    assert all(one.request_id for one in done)


def test_metrics_tell_how_the_writing_goes(ledger: Ledger) -> None:
    metrics = Metrics()
    metrics.watch_ledger(ledger)
    families = text_string_to_metric_families(metrics.render().decode())
    found = {s.name: s.value for f in families for s in f.samples if "ledger" in s.name}
    assert found == {
        "impart_ledger_rows_total": 0,
        "impart_ledger_write_failures_total": 0,
        "impart_ledger_rows_dropped_total": 0,
        "impart_ledger_pending_rows": 0,
    }
