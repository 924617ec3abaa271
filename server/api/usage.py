"""``GET /v1/usage``: what was used, in the shape and the names of OpenAI's usage API; and
``GET /v1/audit``.

A tenant is shown its own usage, an administrator everybody's and the audit log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.api.access import is_admin, require_admin
from server.api.context import api_of, tenant
from server.api.errors import http_error
from server.api.query import parse_query
from server.errors import InvalidRequest
from server.ledger.csv_table import csv_text
from server.ledger.records import DAY_S, AuditRow, Group, UsageQuery, UsageRow

if TYPE_CHECKING:  # SQLAlchemy is imported where there is a ledger only
    from server.ledger.ledger import Ledger

DEFAULT_DAYS = 30
MAX_DAYS = 366
MAX_LIMIT = 10_000
MAX_UNIX_S = 253_402_300_800  # the year 10000
GROUPS: dict[str, Group] = {"tenant": "tenant", "model": "model", "api_key_id": "key", "day": "day"}
USAGE_COLUMNS = (
    "start_time",
    "day",
    "tenant",
    "model",
    "api_key_id",
    "num_model_requests",
    "input_tokens",
    "input_cached_tokens",
    "output_tokens",
)
AUDIT_COLUMNS = ("time", "actor", "action", "target", "outcome", "request_id")
NO_LEDGER = (
    "This server keeps no ledger of what is used. An operator can start it with --state-dir "
    "or --ledger-url."
)

router = APIRouter()
T = TypeVar("T")


def _names(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


class Period(BaseModel):
    """A time range of unix seconds, the end not in it, and a page of what is found there."""

    model_config = ConfigDict(extra="forbid")

    start_time: int | None = Field(default=None, ge=0, lt=MAX_UNIX_S)
    end_time: int | None = Field(default=None, ge=0, lt=MAX_UNIX_S)
    limit: int = Field(default=1000, ge=1, le=MAX_LIMIT)
    page: int = Field(default=0, ge=0, le=1_000_000)
    format: Literal["json", "csv"] = "json"

    def range_s(self) -> tuple[int, int]:
        """Return start and end. Raises InvalidRequest."""
        midnight_s = (int(time.time()) // DAY_S + 1) * DAY_S  # days are summed ahead
        end_s = midnight_s if self.end_time is None else self.end_time
        default_s = max(0, end_s - DEFAULT_DAYS * DAY_S)
        start_s = default_s if self.start_time is None else self.start_time
        if not 0 < end_s - start_s <= MAX_DAYS * DAY_S:
            raise InvalidRequest(
                f"end_time must be later than start_time, by {MAX_DAYS} days at most.",
                param="end_time",
            )
        return start_s, end_s


class OwnUsage(Period):
    """What a tenant may ask of its usage."""

    group_by: Annotated[list[Literal["model", "api_key_id", "day"]], BeforeValidator(_names)] = (
        Field(default_factory=list, max_length=len(GROUPS))
    )


class AllUsage(Period):
    """What an administrator may ask of everybody's usage."""

    group_by: Annotated[
        list[Literal["tenant", "model", "api_key_id", "day"]], BeforeValidator(_names)
    ] = Field(default_factory=list, max_length=len(GROUPS))
    tenant: str | None = Field(default=None, max_length=255)


@router.get("/v1/usage")
async def usage(request: Request) -> Response:
    """Return the sums of the caller's own tenant; to an administrator those of all, or of one."""
    ledger = api_of(request).ledger
    if ledger is None:
        return http_error(404, NO_LEDGER)
    if is_admin(request):
        all_asked = parse_query(request, AllUsage)
        return await _usage(ledger, all_asked, all_asked.group_by, all_asked.tenant)
    asked = parse_query(request, OwnUsage)
    return await _usage(ledger, asked, asked.group_by, tenant(request).name)


@router.get("/v1/audit", dependencies=[Depends(require_admin)])
async def audit_log(request: Request) -> Response:
    """Return what administrators did, the newest first."""
    ledger = api_of(request).ledger
    if ledger is None:
        return http_error(404, NO_LEDGER)
    asked = parse_query(request, Period)
    start_s, end_s = asked.range_s()
    limit, offset = asked.limit + 1, asked.page * asked.limit
    rows = await _read(ledger, lambda: ledger.audited(start_s, end_s, limit, offset))
    actions = [_action(row) for row in rows[: asked.limit]]
    if asked.format == "csv":
        return _csv(AUDIT_COLUMNS, actions, _next(asked, rows))
    return _page(actions, _next(asked, rows))


async def _usage(ledger: Ledger, asked: Period, by: list[Any], tenant: str | None) -> Response:
    start_s, end_s = asked.range_s()
    query = UsageQuery(
        start_s,
        end_s,
        by=tuple(GROUPS[name] for name in by),
        tenant=tenant,
        limit=asked.limit + 1,  # one more tells whether there is another page
        offset=asked.page * asked.limit,
    )
    rows = await _read(ledger, lambda: ledger.usage(query))
    shown, next_page = rows[: asked.limit], _next(asked, rows)
    if asked.format == "csv":
        lines = [
            {"start_time": _bounds(row.day, start_s, end_s)[0], "day": row.day, **_result(row)}
            for row in shown
        ]
        return _csv(USAGE_COLUMNS, lines, next_page)
    buckets = [
        _bucket(*_bounds(day, start_s, end_s), list(of_day))
        for day, of_day in groupby(shown, key=lambda row: row.day)
    ]
    return _page(buckets, next_page)


async def _read(ledger: Ledger, read: Callable[[], T]) -> T:
    return await asyncio.wrap_future(ledger.submit(read))


def _csv(
    columns: Sequence[str], lines: Iterable[Mapping[str, Any]], next_page: int | None
) -> Response:
    """Return the answer as CSV; `x-next-page` names the page after this one, if there is one."""
    headers = {} if next_page is None else {"x-next-page": str(next_page)}
    text = csv_text(columns, lines)
    return Response(text, media_type="text/csv; charset=utf-8", headers=headers)


def _page(data: list[dict[str, Any]], next_page: int | None) -> Response:
    page = None if next_page is None else str(next_page)
    body = {"object": "page", "data": data, "has_more": page is not None, "next_page": page}
    return JSONResponse(body)


def _next(asked: Period, rows: list[Any]) -> int | None:
    return asked.page + 1 if len(rows) > asked.limit else None


def _bounds(day: str | None, start_s: int, end_s: int) -> tuple[int, int]:
    """Return the part of the range that a day (of UTC) is; the whole range without one."""
    if day is None:
        return start_s, end_s
    midnight_s = int(datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())
    return max(start_s, midnight_s), min(end_s, midnight_s + DAY_S)


def _bucket(start_s: int, end_s: int, rows: list[UsageRow]) -> dict[str, Any]:
    results = [_result(row) for row in rows]
    return {"object": "bucket", "start_time": start_s, "end_time": end_s, "results": results}


def _result(row: UsageRow) -> dict[str, Any]:
    return {
        "object": "usage.result",
        "input_tokens": row.prompt_tokens,
        "input_cached_tokens": row.cached_tokens,
        "output_tokens": row.output_tokens,
        "num_model_requests": row.n_requests,
        "tenant": row.tenant,
        "model": row.model,
        "api_key_id": row.key,
    }


def _action(row: AuditRow) -> dict[str, Any]:
    return {
        "object": "audit.entry",
        "time": row.time_s,
        "actor": row.actor,
        "action": row.action,
        "target": row.target,
        "outcome": row.outcome,
        "request_id": row.request_id,
    }
