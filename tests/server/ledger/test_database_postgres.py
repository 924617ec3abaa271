"""The ledger on a real PostgreSQL, started here; skipped where its programs are not installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server.errors import ConfigError
from server.ledger.database import open_database
from server.ledger.ledger import Ledger
from server.ledger.records import DAY_S, AuditRow, Group, UsageQuery
from server.ledger.tables import metadata
from tests.server.ledger.rows import NOON, request_row
from tests.server.ledger.test_ledger import share
from tests.unprivileged import open_folder

GROUPS: tuple[Group, ...] = ("tenant", "model", "key", "day")


def program(name: str) -> str:
    """The path of one of PostgreSQL's programs, of the newest version."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders[::-1]), os.defpath]))
    return found or shutil.which(name) or pytest.skip(f"PostgreSQL's {name} is not installed")


@dataclass
class Postgres:
    """A server of its own on a socket in a folder of its own."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://tester@/postgres?host={self.folder}"

    def start(self) -> None:
        command = [program("postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        options = ["-c", "listen_addresses=", "-c", "fsync=off"]
        self.process = subprocess.Popen([*command, *options], **quiet(), **unprivileged())
        ready = [program("pg_isready"), "-q", "-h", str(self.folder)]
        until(lambda: subprocess.run(ready).returncode == 0)

    def stop(self) -> None:
        """At once, as if it crashed."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(20)
            self.process = None


def unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root, or as nobody whom the system knows by name."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def quiet() -> dict[str, Any]:
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg")
    initdb = program("initdb")
    with open_folder() as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        made = [initdb, "-D", str(folder / "data"), "-U", "tester", "-A", "trust", "--no-sync"]
        subprocess.run(made, check=True, timeout=60, **quiet(), **unprivileged())
        server = Postgres(folder)
        server.start()
        yield server
        server.stop()


def test_postgres_sums_as_sqlite_does_and_an_outage_loses_nothing(
    postgres: Postgres, tmp_path: Path
) -> None:
    rows = [
        request_row(
            ended_s=NOON + 7200 * n,
            tenant=f"t{n % 3}",
            model=f"m{n % 2}",
            key_id="k" * (n % 2),
            output_tokens=n,
            queue_s=None,
        )
        for n in range(30)
    ]
    rows.append(request_row(ended_s=NOON, prompt_tokens=2**31 - 1, tenant="t\0\ud800"))
    refused = request_row(prompt_tokens=2**40)
    audit = AuditRow("admin", "rescan", "deltas", "ok", "r1", time_s=1.0)
    with Ledger(open_database(tmp_path, None)) as sqlite:
        for row in rows:
            sqlite.add(row)
    database = open_database(None, postgres.url)
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []

    with Ledger(database) as ledger:
        ledger.audit(audit)
        for row in rows[:9]:
            ledger.add(row)
        ledger.add(refused)
        until(lambda: ledger.stats().n_pending == 0)
        assert (ledger.stats().n_written, ledger.stats().n_dropped) == (10, 1)
        postgres.stop()
        for row in rows[9:]:
            ledger.add(row)
        until(lambda: ledger.stats().n_failures >= 1)
        assert ledger.stats().n_pending == len(rows) - 9
        postgres.start()
        until(lambda: ledger.stats().n_pending == 0)
        assert ledger.stats().n_dropped == 1

        expected = Ledger(open_database(tmp_path, None))
        for n in range(len(GROUPS) + 1):
            for by in combinations(GROUPS, n):
                for tenant in (None, "t1"):
                    query = UsageQuery(NOON, NOON + 2 * DAY_S, by, tenant)
                    found, wanted = ledger.usage(query), expected.usage(query)
                    assert sorted(map(repr, found)) == sorted(map(repr, wanted))
        since = datetime.fromtimestamp(NOON + DAY_S, UTC)
        assert ledger.used_tokens("t1", since) == expected.used_tokens("t1", since) > 0
        assert ledger.audited(0, 2, limit=9) == [audit]


def test_servers_that_share_a_postgres_lose_no_row_of_the_same_sums(postgres: Postgres) -> None:
    database = open_database(None, postgres.url)
    with database.begin() as connection:
        connection.exec_driver_sql("TRUNCATE requests, usage_days")
    database.dispose()
    share(lambda: open_database(None, postgres.url))


def test_postgres_of_a_newer_version_or_without_the_database_is_refused(postgres: Postgres) -> None:
    database = open_database(None, postgres.url)
    for version in ("9999", "0001"):
        with database.begin() as connection:
            connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{version}'")
        if version == "9999":
            with pytest.raises(ConfigError, match="newer version"):
                open_database(None, postgres.url)
    database.dispose()
    with pytest.raises(ConfigError, match='database "nosuch" does not exist'):
        open_database(None, postgres.url.replace("/postgres?", "/nosuch?"))
