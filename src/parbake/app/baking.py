"""Carry a bake out: what is left of an earlier one, the scoring, the merge, the table in its place."""

from __future__ import annotations

import os
import time
from contextlib import closing
from datetime import UTC, datetime

from parbake.app.bake import BakeOrder, BakeReport
from parbake.batch.crew import Crew
from parbake.batch.inputs import Input, digest_of, word_of
from parbake.batch.model import Scored
from parbake.batch.ports import Source
from parbake.batch.scorer import ScoringJob
from parbake.batch.segments import Merge, Segment
from parbake.batch.service import score
from parbake.batch.workspace import BakeState, Workspace, computing_libraries
from parbake.contract.bundle import StoredBundle, read_bundle
from parbake.errors import InputFileError, TableError
from parbake.tables.lmdb import is_table, read_lineage
from parbake.tables.model import Lineage, layout_of
from parbake.tables.service import Built, build, check_place, exists, publish


def carry_out(order: BakeOrder, crew: Crew, started: float) -> BakeReport:
    """Bake. ``started`` is when it was asked for, on the clock of `time.perf_counter`. Raises as `bake` does."""
    check_place(order.out, replace=True)
    stored = read_bundle(order.bundle)
    with Input(order.input, kind=order.format) as rows:
        if is_table(order.out) and not order.replace:
            return _already(order, stored, rows, started)
        with Workspace(order.out) as space:
            resumed = _resume(order, space, stored, rows)
            done = [piece for segment in resumed for piece in segment.header.pieces]
            with closing(rows.source(stored.contract, done, order.workers)) as source:
                job = ScoringJob(
                    str(order.bundle),
                    source.layout,
                    str(space.segments),
                    # No earlier run may have had the name.
                    f"{time.time_ns():020d}-{os.getpid()}",
                    threads=order.threads,
                    allow_pickle=order.allow_pickle,
                    allow_mismatch=order.allow_mismatch,
                    on_bad=order.on_bad,
                    segment_s=order.segment_s,
                )
                scored, segments = score(source, job, crew, resumed=resumed, progress=order.progress)
                lineage, built = _publish(order, space, stored, source, scored, segments)
            space.remove()
    seconds = time.perf_counter() - started
    new = scored.tally.scored + scored.tally.skipped - scored.resumed
    return BakeReport(
        table=str(order.out),
        contract=stored.contract.name,
        bundle_digest=stored.digest,
        input_digest=lineage.input_digest,
        rows=lineage.rows,
        keys=lineage.keys,
        duplicates=lineage.duplicates,
        skipped=lineage.skipped,
        skipped_rows=scored.tally.examples,
        ignored_columns=source.layout.extra,
        resumed_rows=scored.resumed,
        seconds=seconds,
        rows_per_s=new / seconds,
        bytes=built.data_bytes,
        workers=scored.workers,
    )


def _resume(order: BakeOrder, space: Workspace, stored: StoredBundle, rows: Input) -> list[Segment]:
    """The segments of an interrupted run of the same bake."""
    interrupted = space.interrupted
    identity = rows.identity
    if rows.path is None and (rows.format == "parquet" or interrupted):
        # Parquet is read from its end; and what an earlier run did must be held against all of the input.
        digest = rows.keep(space.spool)
        identity = digest if rows.format == "parquet" else ""
    state = BakeState(stored.digest, rows.format, identity, computing_libraries())
    known = rows.pieces(stored.contract) if interrupted and rows.format != "parquet" else None
    return space.resume(state, order.on_bad, known)


def _publish(
    order: BakeOrder,
    space: Workspace,
    stored: StoredBundle,
    source: Source,
    scored: Scored,
    segments: list[Segment],
) -> tuple[Lineage, Built]:
    """Merge the segments into a table and publish it."""
    if not scored.tally.scored:
        raise InputFileError(
            f"has no rows to bake, {scored.tally.skipped} were skipped", path=source.layout.name
        )
    layout = layout_of(stored.contract)
    merge = Merge(segments, source.layout.name, word_of(source.layout))
    built = build(
        space.table, layout, merge.entries(), most_keys=merge.most_keys, most_bytes=merge.most_bytes
    )
    digest, size = source.finish()
    duplicates = scored.tally.duplicates + merge.duplicates
    if built.keys + duplicates != scored.tally.scored:
        raise TableError(
            f"{scored.tally.scored} rows made {built.keys} keys and {duplicates} duplicates",
            hint=f"a bug, or a damaged disk: remove {space.folder} and bake again",
        )
    lineage = Lineage(
        bundle_digest=stored.digest,
        contract=stored.contract.name,
        input=order.input,
        input_format=source.layout.format,
        input_digest=digest,
        input_bytes=size,
        rows=scored.tally.scored,
        keys=built.keys,
        duplicates=duplicates,
        skipped=scored.tally.skipped,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        record=layout,
        data_bytes=built.data_bytes,
        data_digest=built.data_digest,
    )
    publish(space.table, order.out, lineage, replace=order.replace)
    return lineage, built


def _already(order: BakeOrder, stored: StoredBundle, rows: Input, started: float) -> BakeReport:
    """The report where the very table is there already. Raises `TableError` where it is another."""
    try:
        lineage: Lineage | None = read_lineage(order.out)
    except TableError:
        lineage = None
    if (
        lineage is None
        or lineage.bundle_digest != stored.digest
        or (lineage.skipped and order.on_bad == "error")
        or rows.path is None
        or digest_of(rows.path) != lineage.input_digest
    ):
        raise exists(order.out)
    return BakeReport(
        table=str(order.out),
        contract=lineage.contract,
        bundle_digest=lineage.bundle_digest,
        input_digest=lineage.input_digest,
        rows=lineage.rows,
        keys=lineage.keys,
        duplicates=lineage.duplicates,
        skipped=lineage.skipped,
        skipped_rows=(),
        ignored_columns=(),
        resumed_rows=0,
        seconds=time.perf_counter() - started,
        rows_per_s=0.0,
        bytes=lineage.data_bytes,
        workers=0,
        already=True,
    )
