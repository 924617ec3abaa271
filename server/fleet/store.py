"""What operators have said of variants: documents by kind and name, and every change of them.

    variants.db in the state folder (SQLite), or memory where there is no such folder

A document is a small JSON object: where a variant comes from and whether it is pinned, what an
alias points to, what a composition is made of. It is replaced as a whole, and what it was before
stays in the history, so that a change can be taken back. Whoever reads a document checks it as it
would a request's: the file may have been written by another version.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Double,
    Engine,
    Integer,
    MetaData,
    StaticPool,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    insert,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from server.errors import ConfigError, StateUnwritable

FILE_NAME = "variants.db"
VERSION = 1
MAX_HISTORY = 100  # of one document

Body = dict[str, Any]

_metadata = MetaData()
_documents = Table(
    "documents",
    _metadata,
    Column("kind", String(16), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("body", Text, nullable=False),
)
_changes = Table(
    "changes",
    _metadata,
    Column("id", Integer, primary_key=True),
    Column("time", Double, nullable=False),
    Column("actor", String(16), nullable=False),
    Column("kind", String(16), nullable=False, index=True),
    Column("name", String(255), nullable=False, index=True),
    Column("before", Text),
    Column("after", Text),
)


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a document: None before it was made, None after it was deleted."""

    time_s: float  # unix
    actor: str
    before: Body | None
    after: Body | None


class FleetStore:
    """Any thread may ask; one at a time changes something."""

    def __init__(self, state_dir: Path | None) -> None:
        """Open the file. Raises ConfigError."""
        self.is_persistent = state_dir is not None
        self._lock = threading.Lock()
        self._engine = _opened(state_dir)

    def close(self) -> None:
        self._engine.dispose()

    def get(self, kind: str, name: str) -> Body | None:
        """Return a document."""
        with self._lock, self._engine.connect() as connection:
            return _get(connection, kind, name)

    def all(self, kind: str) -> dict[str, Body]:
        """Return the documents of a kind by name."""
        query = select(_documents.c.name, _documents.c.body).where(_documents.c.kind == kind)
        with self._lock, self._engine.connect() as connection:
            return {name: json.loads(body) for name, body in connection.execute(query)}

    def put(self, kind: str, name: str, body: Mapping[str, Any], actor: str = "admin") -> None:
        """Make or replace a document. Raises StateUnwritable."""
        self._change(kind, name, dict(body), actor)

    def delete(self, kind: str, name: str, actor: str = "admin") -> None:
        """Remove a document, if it is there. Raises StateUnwritable."""
        self._change(kind, name, None, actor)

    def history(self, kind: str, name: str) -> list[Change]:
        """Return the last changes of a document, newest first."""
        columns = _changes.c
        query = (
            select(columns.time, columns.actor, columns.before, columns.after)
            .where(columns.kind == kind, columns.name == name)
            .order_by(columns.id.desc())
            .limit(MAX_HISTORY)
        )
        with self._lock, self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [Change(at, actor, _parsed(old), _parsed(new)) for at, actor, old, new in rows]

    def _change(self, kind: str, name: str, body: Body | None, actor: str) -> None:
        try:
            with self._lock, self._engine.begin() as connection:
                before = _get(connection, kind, name)
                if before == body:
                    return
                connection.execute(delete(_documents).where(_is(kind, name)))
                if body is not None:
                    row = {"kind": kind, "name": name, "body": json.dumps(body)}
                    connection.execute(insert(_documents).values(row))
                change = {
                    "time": time.time(),
                    "actor": actor,
                    "kind": kind,
                    "name": name,
                    "before": None if before is None else json.dumps(before),
                    "after": None if body is None else json.dumps(body),
                }
                connection.execute(insert(_changes).values(change))
                _forget_old(connection, kind, name)
        except SQLAlchemyError as error:
            raise StateUnwritable(
                f"The change could not be kept ({_reason(error)}), so it was not made. An operator "
                "must make room for --state-dir, or make it writable.",
                retry_after_s=30,
            ) from None


def _opened(state_dir: Path | None) -> Engine:
    if state_dir is None:
        alone = {"check_same_thread": False}  # `FleetStore` lets one thread in at a time
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args=alone)
        _metadata.create_all(engine)
        return engine
    path = state_dir / FILE_NAME
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)
        event.listen(engine, "connect", _prepare)
        with engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found > VERSION:
                raise ConfigError(
                    f"{path} was written by a newer version of this server; use that version, or "
                    "another --state-dir"
                )
            _metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
    except (OSError, SQLAlchemyError) as error:
        raise ConfigError(
            f"{path} cannot be used ({_reason(error)}); give --state-dir a folder on a disk with "
            "space that this user may write to"
        ) from None
    return engine


def _prepare(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # what was said outlives a power cut
    cursor.close()


def _get(connection: Connection, kind: str, name: str) -> Body | None:
    found = connection.execute(select(_documents.c.body).where(_is(kind, name))).scalar()
    return _parsed(found)


def _is(kind: str, name: str) -> Any:
    return (_documents.c.kind == kind) & (_documents.c.name == name)


def _forget_old(connection: Connection, kind: str, name: str) -> None:
    of_it = (_changes.c.kind == kind) & (_changes.c.name == name)
    kept = select(_changes.c.id).where(of_it).order_by(_changes.c.id.desc()).limit(MAX_HISTORY)
    connection.execute(delete(_changes).where(of_it, _changes.c.id.not_in(kept)))


def _parsed(body: str | None) -> Body | None:
    if body is None:
        return None
    parsed: Body = json.loads(body)
    return parsed


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    cause = getattr(error, "orig", None) or error
    return str(getattr(cause, "strerror", None) or cause).splitlines()[0][:200]
