"""The one place that names both a port and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from parbake.serving.ports import PredictionTable
from parbake.tables import lmdb


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What tells one published table from another; ``baked_at`` is Unix time."""

    digest: str
    baked_at: float


def open_table(path: Path, *, bundle_digest: str, verify: bool) -> PredictionTable:
    """A published prediction table of that bundle. ``verify`` recomputes the hash of its data.

    Raises `TableTorn`, `TableForeign` or `TableTooNew`.
    """
    return lmdb.open_table(path, bundle_digest=bundle_digest, verify=verify)


def table_facts(path: Path) -> TableFacts:
    """Which table is published at a path, and when it was baked. Raises `TableTorn` or `TableTooNew`."""
    lineage = lmdb.read_lineage(path)
    return TableFacts(lineage.digest, datetime.fromisoformat(lineage.created).timestamp())
