"""`parbake bake`: the predictions of many rows into a prediction table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from parbake.cli.options import BUNDLE, Command, json_option, pickle_option, progress_option
from parbake.cli.output import emit_json, progress, say, size
from parbake.errors import NotFound

if TYPE_CHECKING:
    from parbake.app.bake import BakeReport

# Those of parbake.batch, which would take long to import for --help.
FORMATS: Final = ("parquet", "csv", "arrow", "jsonl")


@click.command(cls=Command, short_help="Compute the predictions of many rows into a prediction table.")
@click.argument("bundle", type=BUNDLE)
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE",
    help="Rows by column name; - reads the standard input.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="TABLE",
    help="Where to publish the table.",
)
@click.option("--format", type=click.Choice(FORMATS), help="Format of the rows.  [default: as they look]")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Processes that score; 0 takes as many as there are CPUs.  [default: 0]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Threads of each process.  [default: 1]",
)
@click.option(
    "--on-bad",
    type=click.Choice(["error", "skip"]),
    default="error",
    help="What to do with a row that does not fit the contract.  [default: error]",
)
@click.option("--replace", is_flag=True, help="Replace the table that is there.")
@click.option(
    "--allow-mismatch",
    is_flag=True,
    help="Bake with a bundle whose required libraries have other versions here.",
)
@pickle_option
@progress_option
@json_option
def command(bundle: Path, source: str, out: Path, show_progress: bool, as_json: bool, **options: Any) -> None:
    """Compute the predictions of many rows into a prediction table.

    The rows are Parquet, CSV, Arrow IPC or JSON lines. The table appears in one step, when it is
    complete. After an interruption of any kind the same command goes on where it was.
    """
    if source != "-" and not Path(source).exists():
        raise NotFound(f"no file at {source}")

    from parbake.app.bake import bake

    try:
        with progress(f"baking {bundle.name}", "rows", wanted=show_progress) as report:
            done = bake(bundle, source, out, progress=report, **options)
    except KeyboardInterrupt:
        say("not finished; the same command goes on where it was")
        raise
    if as_json:
        emit_json(done)
    else:
        show(done, out)


def show(report: BakeReport, table: Path) -> None:
    """Say what was baked."""
    if report.already:
        say(f"{table} was baked from these rows by this bundle before: nothing to do")
    else:
        say(f"baked {report.rows:,} rows in {report.seconds:.1f} s ({report.rows_per_s:,.0f} rows/s)")
    if report.resumed_rows:
        say(f"{report.resumed_rows:,} of them had been scored before an interruption")
    if report.ignored_columns:
        say(f"not needed by the model: {', '.join(report.ignored_columns)}")
    for bad in report.skipped_rows[:5]:
        say(f"left out: {bad.where}: {bad.reason}")
    if report.skipped:
        say(f"{report.skipped:,} rows were left out because they do not fit the contract")
    duplicates = f", {report.duplicates:,} rows were duplicates" if report.duplicates else ""
    say(f"{table}: {report.keys:,} keys{duplicates}, {size(report.bytes)}")
