"""What Alembic runs to migrate; it works when imported, as Alembic wants it.

The connection comes from `server.ledger.database`, in a transaction of its own.
"""

from __future__ import annotations

from alembic import context

from server.ledger.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
