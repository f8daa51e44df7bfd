"""Rewards: what the versions of a bandit have earned, as each server knows it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """From servers of which each learned by itself."""
    op.create_table(
        "rewards",
        sa.Column("release", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("holder", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
        sa.Column("earned", sa.Double, nullable=False),
        sa.Column("missed", sa.Double, nullable=False),
    )
