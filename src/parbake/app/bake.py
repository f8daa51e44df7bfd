"""Bake: the predictions of many rows, computed once and published as a prediction table.

A bake that was interrupted, by anything, goes on where it was when the same call is made again: what was
scored is kept in segments beside the table. The table appears in one step, when it is complete and proven.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from parbake.batch.crew import Crew
from parbake.batch.model import FORMATS, BadRow, Format, OnBad, Progress
from parbake.errors import SettingsError, TableError
from parbake.runtime.cpu import quota

__all__ = ["FORMATS", "BadRow", "BakeReport", "Format", "OnBad", "Progress", "bake"]

_EARLY_BYTES: Final = 16 << 20
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class BakeReport:
    """What a bake did."""

    table: str
    contract: str
    bundle_digest: str
    input_digest: str
    rows: int
    """Rows of the input that are in the table."""
    keys: int
    duplicates: int
    """Rows whose key and prediction another row has too."""
    skipped: int
    """Rows left out because they do not fit the contract."""
    skipped_rows: tuple[BadRow, ...]
    """The first of them."""
    ignored_columns: tuple[str, ...]
    """Columns of the input that the contract does not need."""
    resumed_rows: int
    """Rows that an earlier, interrupted run had scored."""
    seconds: float
    rows_per_s: float
    """Rows scored in this run by its whole time."""
    bytes: int
    """Size of the table's data file."""
    workers: int
    already: bool = False
    """Whether the table was there, baked from the same bundle and input, so that nothing was done."""


@dataclass(frozen=True, slots=True)
class BakeOrder:
    """What `bake` was asked for."""

    bundle: Path
    input: str
    out: Path
    format: Format | None
    workers: int
    """Processes, this one included."""
    threads: int
    on_bad: OnBad
    replace: bool
    allow_pickle: bool
    allow_mismatch: bool
    progress: Progress | None
    segment_s: float


def bake(
    bundle: str | Path,
    input: str | Path,  # noqa: A002  the word of the command line
    out: str | Path,
    *,
    format: Format | None = None,  # noqa: A002
    workers: int = 0,
    threads: int = 1,
    on_bad: OnBad = "error",
    replace: bool = False,
    allow_pickle: bool = False,
    allow_mismatch: bool = False,
    progress: Progress | None = None,
    segment_s: float = 3.0,
) -> BakeReport:
    """Bake the rows of a file (Parquet, CSV, Arrow IPC, JSON lines; ``-``: standard input) into a table at ``out``.

    ``workers`` processes (0: as many as there are CPUs) score with ``threads`` threads each; memory does not
    grow with the input. ``segment_s`` is the most work, in seconds, that an interruption loses. A table at
    ``out`` is replaced only with ``replace``; who reads it goes on undisturbed.

    Raises `InputFileError`, `BundleError`, `ModelFailed`, `NotAllowed`, or `TableError`: ``out`` is taken,
    another bake is writing it, or the disk is full. Nothing is published then, and the same call resumes.
    """
    started = time.perf_counter()
    if workers < 0 or threads < 1:
        raise SettingsError(
            f"{workers} workers with {threads} threads cannot bake", hint="workers >= 0, threads >= 1"
        )
    order = BakeOrder(
        bundle=Path(bundle).absolute(),
        input=str(input),
        out=Path(os.path.realpath(out)),
        format=format,
        workers=workers or max(1, quota() // threads),
        threads=threads,
        on_bad=on_bad,
        replace=replace,
        allow_pickle=allow_pickle,
        allow_mismatch=allow_mismatch,
        progress=progress,
        segment_s=segment_s,
    )
    try:
        with Crew(order.workers - 1) as crew:
            if _bytes_of(order.input) > _EARLY_BYTES:
                crew.start()
            # What this imports takes as long here as in the crew, so that comes first.
            from parbake.app.baking import carry_out

            return carry_out(order, crew, started)
    except OSError as error:
        raise _disk_error(error, order.out) from error


def _bytes_of(name: str) -> int:
    try:
        return Path(name).stat().st_size
    except OSError:
        return 0


def _disk_error(error: OSError, out: Path) -> TableError:
    again = "the same command goes on where this one ended"
    if error.errno in _FULL:
        return TableError(f"the disk is full, {out} was not baked", hint=f"free some space; {again}")
    where = error.filename or out
    return TableError(f"{where}: {error.strerror or error}", hint=again)
