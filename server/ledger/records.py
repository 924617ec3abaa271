"""What the ledger holds and what is asked of it, as plain data. Imports no database library."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

Group = Literal["tenant", "model", "key", "day"]
Actor = Literal["admin", "signal", "cli"]

DAY_S = 86_400


def new_row_id() -> str:
    """Return an id that is never given twice, later ones after earlier ones (as UUIDv7 does it):
    what was written and is written again, because nobody saw its commit, is recognised by it.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def utc_day(unix_s: float) -> str:
    """Return the day of a time as 2026-11-30."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One finished, failed, cancelled or refused generation request. None of its text.

    ended_s        unix time at which its answer ended
    model          the variant's name as served; "" where the request was refused before
    digest         sha256 of the delta that answered; "" for the base
    prompt_tokens  those whose keys and values were computed or found in the cache; each prompt
                   counts once, however many choices it has
    output_tokens  those that the engine gave, also where the client had left
    queue_s        in the engine's queue, until its first choice began; None: none began
    first_token_s  from its arrival to its first token; None: there was none
    finish_reason  stop, length, abort (the client left), error or refused
    status         of HTTP; 499 where the client left before there was one
    """

    ended_s: float
    request_id: str
    tenant: str
    key_id: str
    model: str
    digest: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_s: float | None
    first_token_s: float | None
    total_s: float
    finish_reason: str
    status: int
    row_id: str = field(default_factory=new_row_id)


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One action of an administrator.

    actor    who asked: the admin routes, a signal, or the command line
    outcome  "ok", or what went wrong in a few words
    """

    actor: Actor
    action: str
    target: str
    outcome: str
    request_id: str = ""
    time_s: float = field(default_factory=time.time)
    row_id: str = field(default_factory=new_row_id)


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Sums over the requests that ended in [start_s, end_s), by each of `by`.

    tenant  whose; None: all tenants'
    """

    start_s: float
    end_s: float
    by: tuple[Group, ...] = ()
    tenant: str | None = None
    limit: int = 1000
    offset: int = 0


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group; what was not grouped by is None."""

    n_requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    tenant: str | None = None
    model: str | None = None
    key: str | None = None
    day: str | None = None


@dataclass(frozen=True, slots=True)
class LedgerStats:
    """How the writing goes; rows since the start, but for those that wait now."""

    n_written: int
    n_failures: int
    n_dropped: int
    n_pending: int
