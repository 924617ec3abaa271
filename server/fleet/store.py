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
import sqlite3
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ConfigError, StateUnwritable

FILE_NAME = "variants.db"
VERSION = 1
MAX_HISTORY = 100  # of one document
IN_MEMORY = ":memory:"
TABLES = """
CREATE TABLE IF NOT EXISTS documents (
    kind VARCHAR(16) NOT NULL, name VARCHAR(255) NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (kind, name)
);
CREATE TABLE IF NOT EXISTS changes (
    id INTEGER NOT NULL PRIMARY KEY, time DOUBLE NOT NULL, actor VARCHAR(16) NOT NULL,
    kind VARCHAR(16) NOT NULL, name VARCHAR(255) NOT NULL, before TEXT, after TEXT
);
CREATE INDEX IF NOT EXISTS ix_changes_kind ON changes (kind);
CREATE INDEX IF NOT EXISTS ix_changes_name ON changes (name);
"""

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a document: None before it was made, None after it was deleted."""

    time_s: float  # unix
    actor: str
    before: Body | None
    after: Body | None


class FleetStore:
    """Any thread may ask; one at a time does. Python's own sqlite3, because every server has a
    store, and SQLAlchemy's import alone takes a fifth of a second of its start.
    """

    def __init__(self, state_dir: Path | None) -> None:
        """Open the file. Raises ConfigError."""
        self.is_persistent = state_dir is not None
        self._lock = threading.Lock()
        self._connection = _connected(IN_MEMORY) if state_dir is None else _opened(state_dir)

    def close(self) -> None:
        self._connection.close()

    def get(self, kind: str, name: str) -> Body | None:
        """Return a document."""
        with self._lock:
            return self._get(kind, name)

    def all(self, kind: str) -> dict[str, Body]:
        """Return the documents of a kind by name."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT name, body FROM documents WHERE kind = ?", (kind,)
            ).fetchall()
        return {name: json.loads(body) for name, body in rows}

    def put(self, kind: str, name: str, body: Mapping[str, Any], actor: str = "admin") -> None:
        """Make or replace a document. Raises StateUnwritable."""
        self._change(kind, name, dict(body), actor)

    def delete(self, kind: str, name: str, actor: str = "admin") -> None:
        """Remove a document, if it is there. Raises StateUnwritable."""
        self._change(kind, name, None, actor)

    def history(self, kind: str, name: str) -> list[Change]:
        """Return the last changes of a document, newest first."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT time, actor, before, after FROM changes WHERE kind = ? AND name = ? "
                "ORDER BY id DESC LIMIT ?",
                (kind, name, MAX_HISTORY),
            ).fetchall()
        return [Change(at, actor, _parsed(old), _parsed(new)) for at, actor, old, new in rows]

    def _get(self, kind: str, name: str) -> Body | None:
        row = self._connection.execute(
            "SELECT body FROM documents WHERE kind = ? AND name = ?", (kind, name)
        ).fetchone()
        return None if row is None else _parsed(row[0])

    def _change(self, kind: str, name: str, body: Body | None, actor: str) -> None:
        try:
            with self._lock, self._connection as connection:  # a transaction
                before = self._get(kind, name)
                if before == body:
                    return
                after = None if body is None else json.dumps(body)
                if after is None:
                    connection.execute(
                        "DELETE FROM documents WHERE kind = ? AND name = ?", (kind, name)
                    )
                else:
                    connection.execute(
                        "INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", (kind, name, after)
                    )
                old = None if before is None else json.dumps(before)
                connection.execute(
                    "INSERT INTO changes (time, actor, kind, name, before, after) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (time.time(), actor, kind, name, old, after),
                )
                connection.execute(
                    "DELETE FROM changes WHERE kind = ? AND name = ? AND id NOT IN (SELECT id "
                    "FROM changes WHERE kind = ? AND name = ? ORDER BY id DESC LIMIT ?)",
                    (kind, name, kind, name, MAX_HISTORY),
                )
        except sqlite3.Error as error:
            raise StateUnwritable(
                f"The change could not be kept ({_reason(error)}), so it was not made. An operator "
                "must make room for --state-dir, or make it writable.",
                retry_after_s=30,
            ) from None


def _opened(state_dir: Path) -> sqlite3.Connection:
    path = state_dir / FILE_NAME
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(path)) as looking:
            found = looking.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise ConfigError(
                f"{path} was written by a newer version of this server; use that version, or "
                "another --state-dir"
            )
        return _connected(str(path))
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"{path} cannot be used ({_reason(error)}); give --state-dir a folder on a disk with "
            "space that this user may write to"
        ) from None


def _connected(database: str) -> sqlite3.Connection:
    connection = sqlite3.connect(database, check_same_thread=False)  # `FleetStore` has a lock
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what was said outlives a power cut
        connection.executescript(TABLES)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _parsed(body: str | None) -> Body | None:
    if body is None:
        return None
    parsed: Body = json.loads(body)
    return parsed


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    return str(getattr(error, "strerror", None) or error).splitlines()[0][:200]
