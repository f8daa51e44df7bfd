"""Deployments, releases, verdicts, waivers, parameters, leases, and a history that only grows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEPT = ("history", "verdicts", "waivers", "parameters")
"""Tables whose rows nobody changes or removes."""


def upgrade() -> None:
    """From nothing."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "deployments",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("settings", sa.Text, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
    )
    op.create_table(
        "releases",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("deployment", sa.Text, sa.ForeignKey("deployments.name"), nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("proposal", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("judge_state", sa.LargeBinary, nullable=False),
        sa.Column("went_live", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("changed", sa.Double, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'live', 'rolled_back', 'superseded', 'refused', 'aborted')",
            name="releases_state",
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("releases_of_version", "releases", ["deployment", "version"])
    for name, where in (
        ("releases_one_under_way", "state IN ('pending', 'running')"),
        ("releases_one_live", "state = 'live'"),
    ):
        op.create_index(
            name,
            "releases",
            ["deployment"],
            unique=True,
            sqlite_where=sa.text(where),
            postgresql_where=sa.text(where),
        )
    op.create_table(
        "verdicts",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("release", sa.BigInteger, sa.ForeignKey("releases.id"), nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("verdicts_of_release", "verdicts", ["release"])
    op.create_table(
        "waivers",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("deployment", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("check", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("waivers_of_version", "waivers", ["deployment", "version"])
    op.create_table(
        "parameters",
        sa.Column("deployment", sa.Text, sa.ForeignKey("deployments.name"), primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True),
        sa.Column("values", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
    )
    op.create_table(
        "history",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("deployment", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("release", sa.BigInteger, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("history_of_deployment", "history", ["deployment", "id"])
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("since", sa.Double, nullable=False),
        sa.Column("until", sa.Double, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        _keep_in_postgres()
    else:
        _keep_in_sqlite()


def _keep_in_postgres() -> None:
    op.execute(
        "CREATE FUNCTION parbake_keep() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in _KEPT:
        op.execute(
            f"CREATE TRIGGER {table}_keep BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION parbake_keep()"
        )


def _keep_in_sqlite() -> None:
    for table in _KEPT:
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        # INSERT OR REPLACE removes a row, with no trigger for it unless the connection asks for that.
        same = (
            "deployment = NEW.deployment AND version = NEW.version"
            if table == "parameters"
            else "id = NEW.id"
        )
        there = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608  # names of this module
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {there} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        )
