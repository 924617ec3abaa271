"""The statements that write the ledger: rows, and in the same transaction what they add to their
day's sums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, and_, bindparam, exists, insert, select, update
from sqlalchemy.exc import IntegrityError

from server.ledger.database import writing
from server.ledger.records import AuditRow, RequestRow, utc_day
from server.ledger.tables import NAME, audit, requests, usage_days

SUMMED = ("n_requests", "prompt_tokens", "cached_tokens", "output_tokens")
KEY = ("tenant", "day", "model", "key_id")
MAX_KNOWN = 20_000  # rows of sums; then all are looked up again

SumKey = tuple[str, str, str, str]  # the columns of `KEY`


class SumsMissing(Exception):
    """Rows of sums are gone that were there: somebody deleted them meanwhile."""


class LedgerTables:
    """Writes batches of rows. For one thread."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._known: set[SumKey] = set()  # whose row of sums is there

    def write(self, rows: Sequence[RequestRow | AuditRow]) -> None:
        """Write all of them or none.

        Raises IntegrityError if one is there already, and whatever the database does.
        """
        values = [_request(row) for row in rows if isinstance(row, RequestRow)]
        actions = [_audit(row) for row in rows if isinstance(row, AuditRow)]
        sums = _sums(values)
        self._make(sums)
        try:
            with self._database.begin() as connection:
                if actions:
                    connection.execute(insert(audit), actions)
                if values:
                    connection.execute(insert(requests), values)
                    _add(connection, sums)
        except SumsMissing:
            self._known.clear()
            raise

    def _make(self, keys: Iterable[SumKey]) -> None:
        """Make rows of sums that are not there yet, before the batch: another server may make the
        same at the same time, which must not fail it.
        """
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        new = [key for key in keys if key not in self._known]
        if not new:
            return
        try:
            self._make_at_once(new)
        except IntegrityError:
            for key in new:
                with suppress(IntegrityError):  # it is there now
                    self._make_at_once([key])
        self._known.update(new)

    def _make_at_once(self, keys: Iterable[SumKey]) -> None:
        with writing(self._database) as connection:
            zeros = [
                dict(zip(KEY, key, strict=True)) | dict.fromkeys(SUMMED, 0)
                for key in keys
                if not connection.execute(_has_sums(key)).scalar_one()
            ]
            if zeros:
                connection.execute(insert(usage_days), zeros)


def _has_sums(key: SumKey) -> Any:
    same = (usage_days.c[name] == value for name, value in zip(KEY, key, strict=True))
    return select(exists().where(*same))


def _sums(values: Iterable[dict[str, Any]]) -> dict[SumKey, Counter[str]]:
    """What the rows add, by key in order: servers that write at once lock rows in one order."""
    sums: dict[SumKey, Counter[str]] = {}
    for value in values:
        added = sums.setdefault(tuple(value[name] for name in KEY), Counter())
        added["n_requests"] += 1
        for name in SUMMED[1:]:
            added[name] += value[name]
    return dict(sorted(sums.items()))


def _add(connection: Connection, sums: dict[SumKey, Counter[str]]) -> None:
    columns = usage_days.c
    statement = (
        update(usage_days)
        .where(and_(*(columns[name] == bindparam(f"of_{name}") for name in KEY)))
        .values({name: columns[name] + bindparam(f"added_{name}") for name in SUMMED})
    )
    given = [
        {f"of_{name}": value for name, value in zip(KEY, key, strict=True)}
        | {f"added_{name}": added[name] for name in SUMMED}
        for key, added in sums.items()
    ]
    n_changed = connection.execute(statement, given).rowcount
    if 0 <= n_changed < len(given):
        raise SumsMissing("sums of a day were deleted; they are made anew")


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
