"""The tables as the newest migration leaves them; a test compares both.

Names of tables and columns are read by others (reports, backups): change them by a migration only.
Times are unix seconds, because no two databases agree on what a timestamp is; `day` (UTC's) is kept
beside them, so that days are grouped alike everywhere.

`usage_days` holds the sums of `requests` by day and is written with them in one transaction: what
a tenant used in a month is read from some hundred rows, however many requests it had.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, Integer, MetaData, String, Table

NAME = String(190)  # three of them and a day still fit into an index of any database
ROW_ID = String(32)
DAY = String(10)

metadata = MetaData()

requests = Table(
    "requests",
    metadata,
    Column("id", ROW_ID, primary_key=True),
    Column("ended_at", Double, nullable=False),
    Column("day", DAY, nullable=False),
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
    Index("ix_requests_tenant", "tenant", "ended_at"),
    Index("ix_requests_ended_at", "ended_at"),
)

usage_days = Table(
    "usage_days",
    metadata,
    Column("tenant", NAME, primary_key=True),
    Column("day", DAY, primary_key=True),
    Column("model", NAME, primary_key=True),
    Column("key_id", NAME, primary_key=True),
    Column("n_requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
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
