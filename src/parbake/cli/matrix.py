"""`parbake matrix`: which environments can run which bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from parbake.cli.exits import Exit
from parbake.cli.options import Command, json_option
from parbake.cli.output import emit, emit_json, emit_table, emit_title, plain
from parbake.cli.pack import Pair
from parbake.errors import NotFound

if TYPE_CHECKING:
    from parbake.release.matrix import Cell, Matrix
    from parbake.release.rules import Comparison

_WORDS = {True: "yes", False: "NO", None: "unknown"}
_HERE = "here"


@click.command(cls=Command, short_help="Say which environments can run which bundles.")
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, metavar="[BUNDLE]...")
@click.option(
    "--environment",
    "environments",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another environment: a lock with ==, what pip freeze prints, or an environment.json.  [repeatable]",
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=Pair(),
    metavar="LIBRARY=RULE",
    help="Versions of a library that will do: exact, compatible or any.  [repeatable]",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    envvar="PARBAKE_PORT",
    metavar="PORT",
    help="HTTP port of the server whose bundles are meant, where none is named.",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    paths: tuple[Path, ...],
    environments: tuple[Path, ...],
    rules: tuple[tuple[str, str], ...],
    port: int | None,
    as_json: bool,
) -> None:
    """Say which environments can run which bundles: the one here, and those of the files given.

    BUNDLE may be a folder with bundles in it; without one, those of the running server are meant, and its environment
    is one more. The rules are those of parbake gate. Exits with 1 where a bundle can be run in none of the
    environments.
    """
    from parbake.app.inventory import bundles_below
    from parbake.contract.bundle import read_bundle
    from parbake.contract.environment import capture
    from parbake.release.inventory import environment_of
    from parbake.release.matrix import Place, matrix, read_place
    from parbake.release.rules import read_rules

    places = [Place(_HERE, capture())]
    if paths:
        folders = [bundle for path in paths for bundle in bundles_below(path)]
        if not folders:
            raise NotFound(f"no bundle in {', '.join(map(str, paths))}", hint="parbake pack writes one")
    else:
        from parbake.transports import client

        server = client.inventory(port=port)
        folders = [Path(item.bundle) for item in server.items if item.state in ("running", "unloaded")]
        places.append(Place("server", environment_of(server.machine)))
    stored = [read_bundle(folder, verify=False) for folder in folders]
    places += map(read_place, environments)
    found = matrix(stored, places, read_rules(dict(rules)))
    if as_json:
        emit_json(found)
    else:
        show(found)
    runs = {cell.bundle for cell in found.cells if cell.ok}
    ctx.exit(Exit.DONE if runs == {cell.bundle for cell in found.cells} else Exit.REFUSED)


def show(found: Matrix) -> None:
    """Print one line per bundle and one column per environment, then what stands in the way."""
    rows: dict[str, list[str]] = {}
    for cell in found.cells:
        rows.setdefault(cell.bundle, [cell.name, cell.digest.removeprefix("sha256:")[:12]]).append(
            _WORDS[cell.ok]
        )
    emit_table(list(rows.values()), ("model", "digest", *found.places))
    broken = [(cell, one) for cell in found.cells for one in cell.broken]
    if broken:
        emit()
        emit_title("What stands in the way")
        emit_table(
            [_obstacle(cell, one) for cell, one in broken],
            ("model", "environment", "what", "packed", "there", "rule"),
        )


def _obstacle(cell: Cell, one: Comparison) -> tuple[str, ...]:
    rule = f"{one.rule}: {one.why}" if one.why else one.rule
    return tuple(map(plain, (cell.name, cell.place, one.name, one.packed, one.here, rule)))
