"""The questions to the ledger. Nothing a caller sends becomes text of SQL.

Whole days of UTC are read from the sums by day, the rest of a time range from the requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    Subquery,
    Table,
    func,
    literal,
    select,
    union_all,
)

from server.ledger.records import DAY_S, AuditRow, Group, UsageQuery, UsageRow, utc_day
from server.ledger.tables import audit, requests, usage_days

GROUPS: tuple[Group, ...] = ("day", "tenant", "model", "key")  # in the order of the answer


def read_usage(connection: Connection, query: UsageQuery) -> list[UsageRow]:
    """Return one row for each group, in the order of the groups; one row of totals without any."""
    names = [name for name in GROUPS if name in query.by]
    source = _source(query.start_s, query.end_s, query.tenant)
    groups = [source.c[name] for name in names]
    sums = (
        func.coalesce(func.sum(source.c[name]), 0)
        for name in ("n_requests", "prompt_tokens", "cached_tokens", "output_tokens")
    )
    statement = select(*sums, *groups)
    if groups:
        statement = statement.group_by(*groups).order_by(*groups)
    found = connection.execute(statement.limit(query.limit).offset(query.offset))
    return [_usage_row(row, names) for row in found]


def read_used_tokens(connection: Connection, tenant: str, since_s: float) -> int:
    """Return the tokens, of prompts and outputs, of a tenant's requests that ended since then."""
    source = _source(since_s, math.inf, tenant).c
    total = func.coalesce(func.sum(source.prompt_tokens + source.output_tokens), 0)
    return int(connection.execute(select(total)).scalar_one())


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


def _source(start_s: float, end_s: float, tenant: str | None) -> Subquery:
    """All that counts in [start_s, end_s), as sums of days and single requests."""
    parts = list(_parts(start_s, end_s))
    if tenant is not None:
        parts = [(table, [*where, table.c.tenant == tenant]) for table, where in parts]
    return union_all(*(_selected(table).where(*where) for table, where in parts)).subquery()


def _parts(start_s: float, end_s: float) -> Iterator[tuple[Table, list[ColumnElement[bool]]]]:
    """The tables to read for a time range, and where in them."""
    first_s = math.ceil(start_s / DAY_S) * DAY_S
    last_s = end_s if math.isinf(end_s) else math.floor(end_s / DAY_S) * DAY_S
    time, day = requests.c.ended_at, usage_days.c.day
    if first_s >= last_s:
        yield requests, [time >= start_s, time < end_s]
        return
    days = [usage_days.c.n_requests > 0, day >= utc_day(first_s)]  # 0: made, but never added to
    if not math.isinf(last_s):
        days.append(day < utc_day(last_s))
    yield usage_days, days
    if start_s < first_s:
        yield requests, [time >= start_s, time < first_s]
    if last_s < end_s:
        yield requests, [time >= last_s, time < end_s]


def _selected(table: Table) -> Select[Any]:
    columns = table.c
    return select(
        columns.day,
        columns.tenant,
        columns.model,
        columns.key_id.label("key"),
        (literal(1) if table is requests else columns.n_requests).label("n_requests"),
        columns.prompt_tokens,
        columns.cached_tokens,
        columns.output_tokens,
    )


def _usage_row(row: Row[Any], names: Sequence[Group]) -> UsageRow:
    n_requests, prompt_tokens, cached_tokens, output_tokens, *values = tuple(row)
    return UsageRow(
        int(n_requests),
        int(prompt_tokens),
        int(cached_tokens),
        int(output_tokens),
        **dict(zip(names, values, strict=True)),
    )
