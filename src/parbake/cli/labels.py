"""`parbake labels`: send what turned out to be true, from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from parbake.cli.options import Command, json_option, server_options
from parbake.cli.output import emit_json, say
from parbake.errors import InputFileError, NotFound

if TYPE_CHECKING:
    from parbake.transports.http.labels import GivenLabel

_OWN: Final = ("id", "row", "key", "label", "at")


@click.command(cls=Command, short_help="Send what turned out to be true, for versions that are compared.")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@server_options
@json_option
def command(name: str, file: Path, port: int | None, admin_url: str, token: str, as_json: bool) -> None:
    """Send labels for predictions of the deployment NAME, from a CSV, Parquet or JSON-lines file.

    The column label says what was true. A row is about the request of its column id (and row, of several rows), about
    the key in its column key (hexadecimal), or about the key that its other columns make. Labels without a prediction
    are counted: it is too long ago, or no route of NAME expects labels for it.
    """
    from parbake.transports import client

    labels = list(read(file))
    accepted, unknown = client.label(name, labels, port=port, admin_url=admin_url, token=token)
    if as_json:
        emit_json({"accepted": accepted, "unknown": unknown})
    else:
        say(f"{accepted} of {len(labels)} labels found their prediction")


def read(file: Path) -> Iterator[GivenLabel]:
    """The labels in a file. Raises `NotFound`, `InputFileError`."""
    from parbake.transports.http.labels import GivenLabel

    for number, row in enumerate(_rows(file), 1):
        if row.get("label") is None:
            raise InputFileError(f"row {number} of {file} has no label", hint="its column is named label")
        given = {name: row[name] for name in _OWN if row.get(name) not in (None, "")}
        if "id" in given:
            given["id"] = str(given["id"])
        elif "key" not in given:
            given["key"] = {name: value for name, value in row.items() if name not in _OWN}
        try:
            yield GivenLabel(**{**given, "row": int(given.get("row", 0))})
        except (TypeError, ValueError) as error:
            raise InputFileError(f"row {number} of {file}: {error}") from error


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    try:
        with file.open("rb") as stream:
            if stream.read(4) == b"PAR1":
                table = pyarrow.parquet.read_table(file)
            elif file.suffix in (".jsonl", ".ndjson", ".json"):
                table = pyarrow.json.read_json(file)
            else:
                table = pyarrow.csv.read_csv(file)
    except FileNotFoundError as error:
        raise NotFound(f"no file {file}") from error
    except (OSError, pa.ArrowException) as error:
        raise InputFileError(f"{file} cannot be read: {error}", hint="CSV, Parquet or JSON lines") from error
    for batch in table.to_batches():
        yield from batch.to_pylist()
