"""The tables of the state store, as the newest migration leaves them."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

VERSION: Final = "0003"
"""The migration that this version of parbake works with."""

METADATA: Final = sa.MetaData()

DEPLOYMENTS: Final = sa.Table(
    "deployments",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
)

_NUMBER: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

RELEASES: Final = sa.Table(
    "releases",
    METADATA,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("deployment", sa.Text, sa.ForeignKey("deployments.name"), nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("proposal", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("judge_state", sa.LargeBinary, nullable=False),
    # The event by which it went live last; orders what a rollback may go back to.
    sa.Column("went_live", sa.BigInteger, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("changed", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.CheckConstraint(
        "state IN ('pending', 'running', 'live', 'rolled_back', 'superseded', 'refused', 'aborted')",
        name="releases_state",
    ),
    sa.Index("releases_of_version", "deployment", "version"),
    sa.Index(
        "releases_one_under_way",
        "deployment",
        unique=True,
        sqlite_where=sa.text("state IN ('pending', 'running')"),
        postgresql_where=sa.text("state IN ('pending', 'running')"),
    ),
    sa.Index(
        "releases_one_live",
        "deployment",
        unique=True,
        sqlite_where=sa.text("state = 'live'"),
        postgresql_where=sa.text("state = 'live'"),
    ),
    sqlite_autoincrement=True,
)

VERDICTS: Final = sa.Table(
    "verdicts",
    METADATA,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("release", sa.BigInteger, sa.ForeignKey("releases.id"), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("evidence", sa.Text, nullable=False),
    sa.Index("verdicts_of_release", "release"),
    sqlite_autoincrement=True,
)

WAIVERS: Final = sa.Table(
    "waivers",
    METADATA,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("deployment", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("check", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("evidence", sa.Text, nullable=False),
    sa.Index("waivers_of_version", "deployment", "version"),
    sqlite_autoincrement=True,
)

PARAMETERS: Final = sa.Table(
    "parameters",
    METADATA,
    sa.Column("deployment", sa.Text, sa.ForeignKey("deployments.name"), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("values", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
)

HISTORY: Final = sa.Table(
    "history",
    METADATA,
    sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("what", sa.Text, nullable=False),
    sa.Column("deployment", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("release", sa.BigInteger, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("details", sa.Text, nullable=False),
    sa.Index("history_of_deployment", "deployment", "id"),
    sqlite_autoincrement=True,
)

IMAGES: Final = sa.Table(
    "images",
    METADATA,
    sa.Column("tag", sa.Text, primary_key=True),
    sa.Column("image_id", sa.Text, nullable=False),
    sa.Column("bundle_digest", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Index("images_of_bundle", "bundle_digest", "at"),
)

REWARDS: Final = sa.Table(
    "rewards",
    METADATA,
    sa.Column("release", sa.BigInteger, primary_key=True, autoincrement=False),
    # The server that was told so by labels.
    sa.Column("holder", sa.Text, primary_key=True),
    sa.Column("version", sa.Text, primary_key=True),
    sa.Column("earned", sa.Double, nullable=False),
    sa.Column("missed", sa.Double, nullable=False),
)

LEASES: Final = sa.Table(
    "leases",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    # A clock that is before this has jumped, and the lease counts as over.
    sa.Column("since", sa.Double, nullable=False),
    sa.Column("until", sa.Double, nullable=False),
)
