"""What was used and what administrators did: written beside the server, and asked for sums.

`server.ledger.records` says what a row holds. Import this module only where there is a ledger:
SQLAlchemy and Alembic take a third of a second.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    SQLAlchemyError,
    StatementError,
)

from server.errors import QueueFull, Unavailable
from server.ledger import queries
from server.ledger.database import open_database, reason
from server.ledger.records import AuditRow, LedgerStats, RequestRow, UsageQuery, UsageRow
from server.ledger.writer import MAX_PENDING, BatchWriter
from server.ledger.writes import LedgerTables
from server.settings import Settings

CLOSE_TIMEOUT_S = 5.0
MAX_READS = 32  # running and waiting
AUDIT_BEYOND = 1000  # rows of the audit log that find room in a full queue
# The row is to blame, not the database: no try will make it take the row, or a driver send it.
REFUSALS = (DataError, IntegrityError, InterfaceError, ValueError, TypeError, OverflowError)

log = logging.getLogger(__name__)
T = TypeVar("T")


def open_ledger(settings: Settings) -> Ledger:
    """Open the ledger that the settings name. Raises ConfigError."""
    url = settings.ledger_url
    given = None if url is None else url.get_secret_value()
    return Ledger(open_database(settings.state_dir, given))


class Ledger:
    """Use it as a context manager: entering it starts the writer, leaving it writes what waits.

    Adding never waits and never raises; reading does both, so keep it off the event loop
    (`submit`).
    """

    def __init__(self, database: Engine, *, max_pending: int = MAX_PENDING) -> None:
        self._database = database
        self._tables = LedgerTables(database)
        self._writer: BatchWriter[RequestRow | AuditRow] = BatchWriter(
            self._write,
            explain=self._reason,
            max_pending=max_pending,
        )
        # Who asks for sums takes neither all connections nor all cores.
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="ledger-reader")
        self._free_reads = threading.BoundedSemaphore(MAX_READS)

    def __enter__(self) -> Self:
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        n_lost = self._writer.close(CLOSE_TIMEOUT_S)
        if n_lost:
            log.error("the ledger could not be written in time; %d rows are lost", n_lost)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._database.dispose()

    # -- writing ---------------------------------------------------------------------------------

    def add(self, row: RequestRow) -> None:
        """Note a request that has ended; it is in the database within half a second."""
        self._writer.put(row)

    def audit(self, row: AuditRow) -> None:
        """Note what an administrator did."""
        self._writer.put(row, beyond=AUDIT_BEYOND)

    def stats(self) -> LedgerStats:
        return self._writer.stats()

    # -- reading ---------------------------------------------------------------------------------

    def submit(self, read: Callable[[], T]) -> Future[T]:
        """Read on a thread of the ledger's. Raises QueueFull where too many wait for one."""
        if not self._free_reads.acquire(blocking=False):
            raise QueueFull(
                "Too many requests wait for the ledger; try again later.", retry_after_s=5
            )
        future = self._readers.submit(read)
        future.add_done_callback(lambda _: self._free_reads.release())
        return future

    def used_tokens(self, tenant: str, since: datetime) -> int:
        """Return the tokens, of prompts and outputs, of requests that ended since then.

        Raises Unavailable, as all that reads.
        """
        return self._read(lambda c: queries.read_used_tokens(c, tenant, since.timestamp()))

    def usage(self, query: UsageQuery) -> list[UsageRow]:
        """Return sums by group."""
        return self._read(lambda connection: queries.read_usage(connection, query))

    def audited(self, start_s: float, end_s: float, limit: int, offset: int = 0) -> list[AuditRow]:
        """Return what administrators did in [start_s, end_s), the newest first."""
        return self._read(lambda c: queries.read_audit(c, start_s, end_s, limit, offset))

    def _read(self, read: Callable[[Connection], T]) -> T:
        try:
            with self._database.connect() as connection:
                return read(connection)
        except SQLAlchemyError as error:
            log.warning("the ledger cannot be read (%s)", self._reason(error))
            raise Unavailable(
                "The ledger's database cannot be read now; try again later.", retry_after_s=5
            ) from None

    def _reason(self, error: Exception) -> str:
        return reason(error, self._database.url)

    # -- the writer's thread -----------------------------------------------------------------------

    def _write(self, rows: Sequence[RequestRow | AuditRow]) -> int:
        """Write a batch in one transaction; return how many rows the database refuses for good."""
        try:
            self._tables.write(rows)
        except Exception as error:
            if not _is_refusal(error):
                raise
            return sum(not self._write_one(row) for row in rows)
        return 0

    def _write_one(self, row: RequestRow | AuditRow) -> bool:
        """Write a row of a batch that was refused; False if it is this one that cannot be."""
        try:
            self._tables.write([row])
        except IntegrityError:  # its id is there: the batch was written, but nobody saw the commit
            return True
        except Exception as error:
            if not _is_refusal(error):
                raise
            log.error(
                "the ledger's database refuses the row %s (%s)", row.row_id, self._reason(error)
            )
            return False
        return True


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return False
    return isinstance(error, REFUSALS) or type(error) is StatementError
