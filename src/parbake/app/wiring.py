"""The one place that names both a port and its adapter."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from parbake.errors import ParbakeError, SettingsError
from parbake.monitoring.model import LogOptions
from parbake.monitoring.service import Monitor
from parbake.runtime.cpu import quota
from parbake.serving.ports import PredictionTable
from parbake.settings import ServerSettings
from parbake.tables import lmdb
from parbake.tables.lease import Lease, take_lease
from parbake.tables.model import DATA

if TYPE_CHECKING:
    from parbake.queue.ports import JobStore
    from parbake.release.gate import Baked


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


def hold_table(path: Path) -> Lease | None:
    """Have the process told, by SIGIO, before somebody changes a published table where it lies; None: not possible."""
    return take_lease(path / DATA)


def table_facts(path: Path) -> TableFacts:
    """Which table is published at a path, and when it was baked. Raises `TableTorn` or `TableTooNew`."""
    lineage = lmdb.read_lineage(path)
    return TableFacts(lineage.digest, datetime.fromisoformat(lineage.created).timestamp())


def baked_table(path: Path) -> Baked:
    """What the gate asks of a published table: whose it is, and that its data are what was baked."""
    from parbake.release.gate import Baked

    try:
        lineage = lmdb.read_lineage(path)
        with closing(open_table(path, bundle_digest=lineage.bundle_digest, verify=True)) as table:
            return Baked(str(path), table.rows, lineage.bundle_digest)
    except ParbakeError as error:
        return Baked(str(path), 0, "", error.message, error.hint)


def monitor_of(settings: ServerSettings, front: int) -> Monitor | None:
    """What a front keeps of its traffic, None where it keeps nothing.

    Raises `SettingsError` where the folder of the prediction log cannot be made.
    """
    prediction_log = None
    if settings.prediction_log:
        # It brings pyarrow along, which takes its time to import.
        from parbake.monitoring.log import PredictionLog

        options = LogOptions(
            rate=settings.log_sample,
            inputs=settings.log_inputs,
            outputs=settings.log_outputs,
            file_bytes=settings.log_file_bytes,
            file_age_s=settings.log_file_s,
            keep_bytes=settings.log_keep_bytes,
            keep_age_s=settings.log_keep_s,
            front=front,
        )
        try:
            prediction_log = PredictionLog(Path(settings.prediction_log), options)
        except OSError as error:
            raise SettingsError(
                f"the prediction log cannot be written to {settings.prediction_log}: {error.strerror or error}",
                hint="--prediction-log names a folder that this user may write to",
            ) from error
    if prediction_log is None and not settings.traffic_profile:
        return None
    return Monitor(prediction_log, profiles=settings.traffic_profile)


def job_store(path: Path) -> JobStore:
    """Where jobs are kept; nothing is made there before there is one."""
    # Most servers never have a job, and need no database.
    from parbake.queue.sqlite import SqliteJobs

    return SqliteJobs(path)


def front_count(settings: ServerSettings) -> int:
    """How many front processes a server has."""
    return settings.workers or max(1, quota() // 2)
