"""The ledger over SQLite: sums, quotas, the audit log, rows that a database refuses, full disks."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event, literal, select

from server.errors import QueueFull, Unavailable
from server.ledger import writes
from server.ledger.database import open_database
from server.ledger.ledger import MAX_READS, Ledger
from server.ledger.records import DAY_S, AuditRow, Group, RequestRow, UsageQuery, UsageRow, utc_day
from tests.server.ledger.rows import NOON, request_row

SUMMED = ("n_requests", "prompt_tokens", "cached_tokens", "output_tokens")
GROUPS: tuple[Group, ...] = ("tenant", "model", "key", "day")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def written(folder: Path, rows: Sequence[RequestRow | AuditRow]) -> Iterator[Ledger]:
    """A ledger in which these are."""
    with Ledger(open_database(folder, None)) as ledger:
        for row in rows:
            ledger.audit(row) if isinstance(row, AuditRow) else ledger.add(row)
    yield ledger


few = st.sampled_from
rows_drawn = st.lists(
    st.builds(
        request_row,
        tenant=few(["a", "b", "A"]),
        model=few(["", "base", "intent"]),
        key_id=few(["", "k1", "k2"]),
        ended_s=st.integers(-40, 40).map(lambda hours: NOON + 3600 * hours + 0.5),
        prompt_tokens=st.integers(0, 2**31 - 1),
        cached_tokens=st.integers(0, 99),
        output_tokens=st.integers(0, 99),
    ),
    max_size=30,
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=rows_drawn,
    by=st.lists(few(GROUPS), unique=True),
    tenant=few([None, "a", "nobody"]),
    hours=st.tuples(st.integers(-40, 40), st.sampled_from([1, 7, 24, 30, 60, math.inf])),
)
def test_sums_by_any_grouping_are_those_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[RequestRow],
    by: list[Group],
    tenant: str | None,
    hours: tuple[int, float],
) -> None:
    start_s = NOON + 3600 * hours[0]
    end_s = start_s + 3600 * hours[1]
    expected: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    if not by:
        expected[()] = [0, 0, 0, 0]
    for row in rows:
        if start_s <= row.ended_s < end_s and tenant in (None, row.tenant):
            names = {"tenant": row.tenant, "model": row.model, "key": row.key_id}
            names["day"] = utc_day(row.ended_s)
            sums = expected[tuple(names[name] for name in GROUPS if name in by)]
            used = (1, row.prompt_tokens, row.cached_tokens, row.output_tokens)
            for place, number in enumerate(used):
                sums[place] += number
    with written(tmp_path_factory.mktemp("ledger"), rows) as ledger:
        found = ledger.usage(UsageQuery(start_s, end_s, tuple(by), tenant))
        used = ledger.used_tokens("a", datetime.fromtimestamp(start_s, UTC))
    assert used == sum(
        row.prompt_tokens + row.output_tokens
        for row in rows
        if row.tenant == "a" and row.ended_s >= start_s
    )
    named = [tuple(getattr(row, name) for name in GROUPS if name in by) for row in found]
    assert [sums_of(row) for row in found] == [expected[names] for names in named]
    assert set(named) == set(expected)
    assert len(named) == len(set(named))


def sums_of(row: UsageRow) -> list[int]:
    return [getattr(row, name) for name in SUMMED]


def test_used_tokens_are_prompts_and_outputs_of_that_tenant_since_then(tmp_path: Path) -> None:
    rows = [
        request_row(ended_s=NOON - DAY_S),
        request_row(ended_s=NOON),
        request_row(ended_s=NOON + 1, finish_reason="abort", output_tokens=1),
        request_row(ended_s=NOON + 1, tenant="other"),
    ]
    with written(tmp_path, rows) as ledger:
        assert ledger.used_tokens("acme", datetime.fromtimestamp(NOON, UTC)) == 12 + 6
        assert ledger.used_tokens("acme", datetime.fromtimestamp(NOON - DAY_S, UTC)) == 12 + 12 + 6
        assert ledger.used_tokens("nobody", datetime.fromtimestamp(0, UTC)) == 0


def execute(ledger: Ledger, statement: str) -> None:
    with ledger._database.begin() as connection:
        connection.exec_driver_sql(statement)


def test_whole_days_are_summed_without_their_rows(tmp_path: Path) -> None:
    with written(tmp_path, [request_row(ended_s=NOON + n) for n in range(5)]) as ledger:
        execute(ledger, "DELETE FROM requests")
        first = datetime(2026, 11, 1, tzinfo=UTC)
        assert ledger.used_tokens("acme", first) == 5 * 12
        assert ledger.used_tokens("acme", first.replace(hour=1)) == 0


def test_sums_that_were_deleted_while_the_server_runs_begin_anew(tmp_path: Path) -> None:
    with Ledger(open_database(tmp_path, None)) as ledger:
        ledger.add(request_row())
        until(lambda: ledger.stats().n_written == 1)
        execute(ledger, "DELETE FROM usage_days")
        ledger.add(request_row())
        until(lambda: ledger.stats().n_written == 2)
        assert ledger.usage(UsageQuery(0, math.inf))[0].n_requests == 1


def test_servers_that_share_a_database_lose_no_row_of_the_same_sums(tmp_path: Path) -> None:
    share(lambda: open_database(tmp_path, None))


def share(opened: Callable[[], Engine]) -> None:
    """Two servers write rows of the same sums, in opposite orders, at once."""
    names = [f"m{n}" for n in range(20)]
    with Ledger(opened()) as one, Ledger(opened()) as other:
        for n in range(300):
            one.add(request_row(model=names[n % 20]))
            other.add(request_row(model=names[-n % 20]))
            if n % 50 == 0:
                time.sleep(0.02)
        until(lambda: one.stats().n_pending == other.stats().n_pending == 0)
        assert one.stats().n_dropped == other.stats().n_dropped == 0
        found = one.usage(UsageQuery(0, math.inf, ("model",)))
        assert [(row.model, row.n_requests) for row in found] == [(n, 30) for n in sorted(names)]
        (total,) = one.usage(UsageQuery(NOON, NOON + 1))
        assert total.n_requests == 600


def test_sums_that_another_server_makes_at_the_same_time_are_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with written(tmp_path, [request_row(), request_row(model="b")]):
        pass
    monkeypatch.setattr(writes, "_has_sums", lambda key: select(literal(0)))  # it looked before
    rows = [request_row(model=model) for model in ("b", "intent", "new")]
    with written(tmp_path, rows) as ledger:
        found = ledger.usage(UsageQuery(0, math.inf, ("model",)))
    assert [(row.model, row.n_requests) for row in found] == [("b", 2), ("intent", 2), ("new", 1)]


def test_pages_of_usage_follow_each_other_without_gap_or_overlap(tmp_path: Path) -> None:
    rows = [request_row(model=f"m{n:02}") for n in range(7)]
    query = UsageQuery(0, NOON + 1, ("model",), limit=3)
    with written(tmp_path, rows) as ledger:
        pages = [ledger.usage(replace(query, offset=offset)) for offset in (0, 3, 6)]
    assert [row.model for page in pages for row in page] == [f"m{n:02}" for n in range(7)]


def test_audit_log_is_told_newest_first_within_its_time(tmp_path: Path) -> None:
    rows = [
        AuditRow("admin", "rescan", "deltas", "ok", "r1", time_s=10.0),
        AuditRow("signal", "rescan", "deltas", "OSError", time_s=20.0),
        AuditRow("cli", "keys create", "acme", "ok", time_s=30.0),
    ]
    with written(tmp_path, rows) as ledger:
        assert ledger.audited(0, 30, limit=9) == [rows[1], rows[0]]
        assert ledger.audited(0, 31, limit=1, offset=1) == [rows[1]]


def test_long_names_and_nul_are_cut_to_what_any_database_takes(tmp_path: Path) -> None:
    with written(tmp_path, [request_row(tenant="x" * 999, model="a\0b\ud800")]) as ledger:
        (row,) = ledger.usage(UsageQuery(0, NOON + 1, ("tenant", "model")))
    assert (row.tenant, row.model) == ("x" * 190, "ab?")


def test_row_that_the_database_refuses_is_dropped_alone_and_one_already_there_is_written(
    tmp_path: Path,
) -> None:
    """The first is no number of the database's; the second came in a commit that nobody saw."""
    bad, good, again = request_row(prompt_tokens=2**70), request_row(), request_row()
    with Ledger(open_database(tmp_path, None)) as ledger:
        ledger.add(again)
        until(lambda: ledger.stats().n_written == 1)
        for row in (good, bad, again):
            ledger.add(row)
        until(lambda: ledger.stats().n_pending == 0)
        assert (ledger.stats().n_written, ledger.stats().n_dropped) == (3, 1)
        (total,) = ledger.usage(UsageQuery(0, NOON + 1))
    assert total.n_requests == 2


def limit_pages(database: Engine, n_pages: Callable[[], int]) -> None:
    """SQLite has a full disk beyond so many pages."""

    @event.listens_for(database, "begin")
    def limit(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {n_pages()}")


def test_full_disk_keeps_rows_and_counts_failures_until_there_is_space(tmp_path: Path) -> None:
    database = open_database(tmp_path, None)
    limit_pages(database, lambda: most)
    most = 16  # the tables and little more
    with Ledger(database) as ledger:
        for n in range(400):
            ledger.add(request_row(request_id="r" * 200, ended_s=NOON + n))
        until(lambda: ledger.stats().n_failures >= 2)
        assert ledger.stats().n_pending == 400
        assert ledger.usage(UsageQuery(0, math.inf, ("model",))) == []
        most = 1_000_000
        until(lambda: ledger.stats().n_pending == 0)
        assert ledger.usage(UsageQuery(0, NOON + DAY_S))[0].n_requests == 400
        assert ledger.stats().n_dropped == 0


def test_locked_database_is_waited_for(tmp_path: Path) -> None:
    database = open_database(tmp_path, None)
    with Ledger(database) as ledger:
        with database.connect() as other:
            other.exec_driver_sql("COMMIT")  # of the one that SQLAlchemy began
            other.exec_driver_sql("BEGIN IMMEDIATE")
            ledger.add(request_row())
            until(lambda: ledger.stats().n_failures >= 1)
            other.exec_driver_sql("COMMIT")
            other.exec_driver_sql("BEGIN")
        until(lambda: ledger.stats().n_written == 1)


def test_readers_beyond_the_bound_are_refused_until_others_are_done(tmp_path: Path) -> None:
    go = threading.Event()
    with Ledger(open_database(tmp_path, None)) as ledger:
        waiting = [ledger.submit(go.wait) for _ in range(MAX_READS)]
        with pytest.raises(QueueFull):
            ledger.submit(go.wait)
        go.set()
        assert all(one.result(20) for one in waiting)
        until(lambda: ledger._free_reads._value == MAX_READS)  # type: ignore[attr-defined]
        assert ledger.submit(go.wait).result(20)


def test_unreadable_database_is_unavailable_and_says_nothing_of_it(tmp_path: Path) -> None:
    ledger = Ledger(open_database(tmp_path, None))
    (tmp_path / "ledger.db").rename(tmp_path / "gone")
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    ledger._database.dispose()
    with pytest.raises(Unavailable) as refused:
        ledger.used_tokens("acme", datetime.fromtimestamp(0, UTC))
    assert str(tmp_path) not in refused.value.message
