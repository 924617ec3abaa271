"""Migrations of the ledger, for Alembic: `server.ledger.database` runs them at start-up."""
