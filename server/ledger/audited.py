"""Notes what administrators do, and how it ended, in the audit log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from server.ledger.records import Actor, AuditRow

if TYPE_CHECKING:  # SQLAlchemy is imported where there is a ledger only
    from server.ledger.ledger import Ledger


@contextmanager
def audited(
    ledger: Ledger | None, actor: Actor, action: str, target: str, request_id: str = ""
) -> Iterator[None]:
    """Note what is done inside, whether it succeeds or raises; nothing without a ledger."""
    outcome = "ok"
    try:
        yield
    except BaseException as error:
        outcome = type(error).__name__  # its message may name what no log should
        raise
    finally:
        if ledger is not None:
            ledger.audit(AuditRow(actor, action, target, outcome, request_id))
