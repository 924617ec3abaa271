"""The database at start-up: made for its owner, migrated once, or refused in a sentence."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from server.errors import ConfigError
from server.ledger.database import open_database
from server.ledger.tables import metadata
from tests.unprivileged import open_folder, run_unprivileged

ROOT = Path(__file__).resolve().parents[3]
SECRET = "hunter2-secret"


def test_folder_and_file_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    open_database(folder, None).dispose()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "ledger.db").stat().st_mode) == 0o600


def test_migrations_make_the_tables_that_the_code_has(tmp_path: Path) -> None:
    database = open_database(tmp_path, None)
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.dispose()


def test_servers_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.ledger.database import open_database;"
        "open_database(Path(sys.argv[1]), None)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: subprocess.run(command, cwd=ROOT, timeout=60), range(2)))
    assert [one.returncode for one in done] == [0, 0]


def test_database_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    open_database(tmp_path, None).dispose()
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigError) as refused:
        open_database(tmp_path, None)
    assert "ledger.db was written by a newer version" in refused.value.message
    assert "9999" in refused.value.message


def test_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"something else" * 1000)
    with pytest.raises(ConfigError, match="file is not a database"):
        open_database(tmp_path, None)
    assert (tmp_path / "ledger.db").read_bytes() == b"something else" * 1000


def test_reading_makes_no_ledger_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*ledger\.db"):
        open_database(tmp_path / "none", None, create=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"no url {SECRET}", "ledger_url is no URL"),
        (f"nosuch://u:{SECRET}@host/db", "nosuch has no driver here"),
        (f"postgresql+nosuch://u:{SECRET}@host/db", "brings psycopg"),
        (f"postgresql+asyncpg://u:{SECRET}@host/db", "driver"),
        ("sqlite://", "names no file"),
        ("sqlite:////nowhere/x.db", "/nowhere/x.db cannot be used"),
        (
            f"postgresql+psycopg://u:{SECRET}@127.0.0.1:1/db?password={SECRET}",
            r"postgresql\+psycopg://127.0.0.1/db cannot be used",
        ),
    ],
)
def test_url_that_leads_nowhere_is_refused_without_its_password(url: str, says: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(ConfigError, match=says) as refused:
        open_database(None, url)
    assert SECRET not in refused.value.message
    assert refused.value.__cause__ is None, "a traceback would show it"


def test_folder_that_may_not_be_written_is_refused_with_the_remedy() -> None:
    with open_folder() as folder:
        done = run_unprivileged(
            "import sys; from pathlib import Path; from server.errors import ConfigError\n"
            "from server.ledger import database",
            "try: database.open_database(Path(sys.argv[1]) / 'state', None)\n"
            "except ConfigError as error: print(error.message)",
            [str(folder)],
        )
    assert "Permission denied" in done.stdout, done.stderr
    assert "give --state-dir a folder that this user may write to" in done.stdout
