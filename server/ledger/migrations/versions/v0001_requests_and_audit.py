"""The tables of the first version: requests and audit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "requests",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("request_id", sa.String(255), nullable=False),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("key_id", sa.String(255), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(255), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("cached_tokens", sa.Integer(), nullable=False),
        sa.Column("output_tokens", sa.Integer(), nullable=False),
        sa.Column("queue_s", sa.Double()),
        sa.Column("first_token_s", sa.Double()),
        sa.Column("total_s", sa.Double(), nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
    )
    op.create_index(
        "ix_requests_tenant", "requests", ["tenant", "ended_at", "prompt_tokens", "output_tokens"]
    )
    op.create_index("ix_requests_ended_at", "requests", ["ended_at"])
    op.create_table(
        "audit",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("actor", sa.String(16), nullable=False),
        sa.Column("action", sa.String(255), nullable=False),
        sa.Column("target", sa.String(255), nullable=False),
        sa.Column("outcome", sa.String(255), nullable=False),
        sa.Column("request_id", sa.String(255), nullable=False),
    )
    op.create_index("ix_audit_time", "audit", ["time"])


def downgrade() -> None:
    """Nobody goes back: what the tables hold would be lost."""
    raise NotImplementedError("the ledger has no version before the first")
