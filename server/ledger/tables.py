"""The tables as the newest migration leaves them; a test compares both.

Names of tables and columns are read by others (reports, backups): change them by a migration only.
Times are unix seconds, because no two databases agree on what a timestamp is; `day` is kept beside
them, so that days are grouped alike everywhere.
"""

from __future__ import annotations

from sqlalchemy import Column, Double, Index, Integer, MetaData, String, Table

NAME = String(255)  # with a length, because some databases index no other text
ROW_ID = String(32)

metadata = MetaData()

requests = Table(
    "requests",
    metadata,
    Column("id", ROW_ID, primary_key=True),
    Column("ended_at", Double, nullable=False),
    Column("day", String(10), nullable=False),
    Column("request_id", NAME, nullable=False),
    Column("tenant", NAME, nullable=False),
    Column("key_id", NAME, nullable=False),
    Column("model", NAME, nullable=False),
    Column("digest", NAME, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("output_tokens", Integer, nullable=False),
    Column("queue_s", Double),
    Column("first_token_s", Double),
    Column("total_s", Double, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("status", Integer, nullable=False),
    # What quotas sum is in the index itself: a month of a busy tenant is read without its rows.
    Index("ix_requests_tenant", "tenant", "ended_at", "prompt_tokens", "output_tokens"),
    Index("ix_requests_ended_at", "ended_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", ROW_ID, primary_key=True),
    Column("time", Double, nullable=False),
    Column("actor", String(16), nullable=False),
    Column("action", NAME, nullable=False),
    Column("target", NAME, nullable=False),
    Column("outcome", NAME, nullable=False),
    Column("request_id", NAME, nullable=False),
    Index("ix_audit_time", "time"),
)
