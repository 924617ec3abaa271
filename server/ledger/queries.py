"""The statements of the ledger. Nothing a caller sends becomes text of SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Column, Connection, Row, func, insert, select

from server.ledger.records import AuditRow, Group, RequestRow, UsageQuery, UsageRow, utc_day
from server.ledger.tables import NAME, audit, requests

COLUMNS: Mapping[Group, Column[Any]] = MappingProxyType(
    {
        "day": requests.c.day,
        "tenant": requests.c.tenant,
        "model": requests.c.model,
        "key": requests.c.key_id,
    }
)


def write_rows(connection: Connection, rows: Sequence[RequestRow | AuditRow]) -> None:
    """Insert them, those of each table at once."""
    values = [_request(row) for row in rows if isinstance(row, RequestRow)]
    if values:
        connection.execute(insert(requests), values)
    values = [_audit(row) for row in rows if isinstance(row, AuditRow)]
    if values:
        connection.execute(insert(audit), values)


def read_usage(connection: Connection, query: UsageQuery) -> list[UsageRow]:
    """Return one row for each group, in the order of the groups; one row of totals without any."""
    groups = [COLUMNS[name] for name in COLUMNS if name in query.by]
    table = requests.c
    statement = select(
        func.count(),
        func.coalesce(func.sum(table.prompt_tokens), 0),
        func.coalesce(func.sum(table.cached_tokens), 0),
        func.coalesce(func.sum(table.output_tokens), 0),
        *groups,
    ).where(table.ended_at >= query.start_s, table.ended_at < query.end_s)
    if query.tenant is not None:
        statement = statement.where(table.tenant == query.tenant)
    if groups:
        statement = statement.group_by(*groups).order_by(*groups)
    names = [name for name in COLUMNS if name in query.by]
    found = connection.execute(statement.limit(query.limit).offset(query.offset))
    return [_usage_row(row, names) for row in found]


def read_used_tokens(connection: Connection, tenant: str, since_s: float) -> int:
    """Return the tokens, of prompts and outputs, of a tenant's requests that ended since then."""
    table = requests.c
    total = func.coalesce(func.sum(table.prompt_tokens + table.output_tokens), 0)
    statement = select(total).where(table.tenant == tenant, table.ended_at >= since_s)
    return int(connection.execute(statement).scalar_one())


def read_audit(
    connection: Connection, start_s: float, end_s: float, limit: int, offset: int
) -> list[AuditRow]:
    """Return what was done in [start_s, end_s), the newest first."""
    table = audit.c
    statement = (
        select(
            table.actor,
            table.action,
            table.target,
            table.outcome,
            table.request_id,
            table.time,
            table.id,
        )
        .where(table.time >= start_s, table.time < end_s)
        .order_by(table.time.desc(), table.id.desc())
        .limit(limit)
        .offset(offset)
    )
    return [AuditRow(*row) for row in connection.execute(statement)]


def _usage_row(row: Row[Any], names: Sequence[Group]) -> UsageRow:
    n_requests, prompt_tokens, cached_tokens, output_tokens, *values = tuple(row)
    return UsageRow(
        int(n_requests),
        int(prompt_tokens),
        int(cached_tokens),
        int(output_tokens),
        **dict(zip(names, values, strict=True)),
    )


def _request(row: RequestRow) -> dict[str, Any]:
    return {
        "id": row.row_id,
        "ended_at": row.ended_s,
        "day": utc_day(row.ended_s),
        "request_id": _name(row.request_id),
        "tenant": _name(row.tenant),
        "key_id": _name(row.key_id),
        "model": _name(row.model),
        "digest": _name(row.digest),
        "prompt_tokens": row.prompt_tokens,
        "cached_tokens": row.cached_tokens,
        "output_tokens": row.output_tokens,
        "queue_s": row.queue_s,
        "first_token_s": row.first_token_s,
        "total_s": row.total_s,
        "finish_reason": row.finish_reason,
        "status": row.status,
    }


def _audit(row: AuditRow) -> dict[str, Any]:
    return {
        "id": row.row_id,
        "time": row.time_s,
        "actor": row.actor,
        "action": _name(row.action),
        "target": _name(row.target),
        "outcome": _name(row.outcome),
        "request_id": _name(row.request_id),
    }


def _name(value: str) -> str:
    """What any database takes: UTF-8 without NUL, and no more than the column's length."""
    return value.encode("utf-8", "replace").decode().replace("\0", "")[: NAME.length]
