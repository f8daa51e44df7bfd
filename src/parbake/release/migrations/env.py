"""What Alembic runs around migrations: they happen in the transaction that whoever called has begun."""

from __future__ import annotations

from alembic import context


def migrate() -> None:
    """Run the migrations that Alembic has chosen."""
    attributes = context.config.attributes
    context.configure(connection=attributes["connection"], version_table=attributes["version_table"])
    with context.begin_transaction():
        context.run_migrations()


migrate()
