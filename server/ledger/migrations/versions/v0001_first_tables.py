"""The tables of the first version: requests, their sums by day, and audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NAME = sa.String(190)


def upgrade() -> None:
    """Make all three."""
    op.create_table(
        "requests",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        *_named("request_id", "tenant", "key_id", "model", "digest"),
        *_counts(sa.Integer(), "prompt_tokens", "cached_tokens", "output_tokens"),
        sa.Column("queue_s", sa.Double()),
        sa.Column("first_token_s", sa.Double()),
        sa.Column("total_s", sa.Double(), nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
    )
    op.create_index("ix_requests_tenant", "requests", ["tenant", "ended_at"])
    op.create_index("ix_requests_ended_at", "requests", ["ended_at"])
    op.create_table(
        "usage_days",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("model", NAME, primary_key=True),
        sa.Column("key_id", NAME, primary_key=True),
        *_counts(sa.BigInteger(), "n_requests", "prompt_tokens", "cached_tokens", "output_tokens"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(16), nullable=False),
        *_named("action", "target", "outcome", "request_id"),
    )
    op.create_index("ix_audit_time", "audit", ["time"])


def downgrade() -> None:
    """Nobody goes back: what the tables hold would be lost."""
    raise NotImplementedError("the ledger has no version before the first")


def _named(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, NAME, nullable=False) for name in names]


def _counts(kind: sa.Integer | sa.BigInteger, *names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, kind, nullable=False) for name in names]
