"""The ledger's database: found, opened and brought to this server's version at start-up.

SQLite (write-ahead log) in the state folder, or whatever SQLAlchemy reaches by a URL. Each message
is for the operator: it names the database and the remedy, and never a password.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from server.errors import ConfigError

FILE_NAME = "ledger.db"
BUSY_TIMEOUT_MS = 1000  # of SQLite, while another process writes
CONNECT_TIMEOUT_S = 3
LOST_AFTER_MS = 10_000  # a PostgreSQL that answers nothing for so long is gone
MIGRATION_LOCK = 0x1EDCE5  # any number: whoever migrates a PostgreSQL holds it
BEGIN_OPTION = "impart_begin"


def open_database(state_dir: Path | None, ledger_url: str | None, *, create: bool = True) -> Engine:
    """Open the database and migrate it.

    create  without it nothing is made or migrated: the database must be there in this version

    Raises ConfigError.
    """
    url = _sqlite_url(state_dir, create=create) if ledger_url is None else _parsed(ledger_url)
    engine = _engine(url)
    try:
        with writing(engine) if create else engine.begin() as connection:
            _bring_up(connection, create=create)
    except (SQLAlchemyError, OSError) as error:
        engine.dispose()
        raise ConfigError(
            f"the ledger: {database_name(url)} cannot be used ({reason(error, url)}); give "
            "--state-dir a folder on a disk with space that this user may write to, or "
            "--ledger-url a database that it may write to"
        ) from None  # whose text may name the password
    except ConfigError:
        engine.dispose()
        raise
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes after it has read. SQLite must know that before: it would fail
    where another process has written between.
    """
    with engine.connect() as connection:
        immediate = connection.execution_options(**{BEGIN_OPTION: "BEGIN IMMEDIATE"})
        with immediate.begin():
            yield immediate


def database_name(url: URL) -> str:
    """Return a database's name for people, without user, password and options."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return f"{url.drivername}://{url.host or ''}/{url.database or ''}"


def reason(error: Exception, url: URL) -> str:
    """Return in one line what a database said, without the statement, its values and passwords."""
    said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(said).strip().splitlines() or [type(said).__name__]
    line = lines[0][:300]
    secrets = [url.password, *(v for k, v in url.query.items() if "pass" in k.lower())]
    for secret in secrets:
        line = line.replace(str(secret), "***") if secret else line
    return line


def _sqlite_url(state_dir: Path | None, *, create: bool) -> URL:
    assert state_dir is not None, "a ledger has a folder or a URL"
    path = state_dir / FILE_NAME
    if not create and not path.exists():
        raise ConfigError(
            f"the ledger: there is no {path}; give the --state-dir of a server that has run"
        )
    try:
        if create:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(
            f"the ledger: {path} cannot be written ({error.strerror}); give --state-dir a folder "
            "that this user may write to"
        ) from None
    return URL.create("sqlite", database=str(path))


def _parsed(ledger_url: str) -> URL:
    try:
        url = make_url(ledger_url)
    except ArgumentError:
        raise ConfigError(
            "the ledger: ledger_url is no URL; write DIALECT+DRIVER://USER:PASSWORD@HOST/DATABASE, "
            "e.g. postgresql+psycopg://..."
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise ConfigError("the ledger: ledger_url names no file; write sqlite:////PATH/ledger.db")
    return url


def _engine(url: URL) -> Engine:
    options = _connect_args(url)
    try:
        # Values of rows have no place in messages of errors.
        engine = create_engine(
            url, pool_pre_ping=True, hide_parameters=True, connect_args=options, max_overflow=2
        )
    except (NoSuchModuleError, ImportError) as error:
        extra = "; pip install 'impart-serve[postgres]' brings psycopg"
        raise ConfigError(
            f"the ledger: {url.drivername} has no driver here ({reason(error, url)})"
            f"{extra if url.get_backend_name() == 'postgresql' else '; install it'}"
        ) from None
    except (ArgumentError, TypeError, ValueError):
        raise ConfigError(
            f"the ledger: {database_name(url)} has an option that its driver lacks"
        ) from None
    if engine.dialect.is_async:
        raise ConfigError(
            f"the ledger: {url.drivername} is a driver for asyncio; use another, as "
            "postgresql+psycopg"
        )
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect_args(url: URL) -> dict[str, Any]:
    """What a driver must be told so that nobody waits for ever; the URL's own options win."""
    wanted: dict[str, Any] = {}
    if url.drivername == "postgresql+psycopg":
        wanted = {"connect_timeout": CONNECT_TIMEOUT_S, "tcp_user_timeout": LOST_AFTER_MS}
    return {name: value for name, value in wanted.items() if name not in url.query}


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # Python's driver would begin transactions of its own
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # what was written outlives a power cut
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(BEGIN_OPTION, "BEGIN"))


def _bring_up(connection: Connection, *, create: bool) -> None:
    """Migrate; several servers that start at once do it one after the other."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
    name = database_name(connection.engine.url)
    config = _alembic()
    script = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_revision()
    head = script.get_current_head()
    if found == head:
        return
    if found is not None and found not in {one.revision for one in script.walk_revisions()}:
        raise ConfigError(
            f"the ledger: {name} was written by a newer version of this server (its version is "
            f"{found}, this server knows {head}); use that version, or another --state-dir or "
            "--ledger-url"
        )
    if not create:
        raise ConfigError(
            f"the ledger: {name} is of an older version; the server migrates it when it starts"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _alembic() -> Config:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    folder = Path(__file__).with_name("migrations")
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
