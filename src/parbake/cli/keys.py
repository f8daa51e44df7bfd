"""`parbake keys`: make, list and remove API keys."""

from __future__ import annotations

from pathlib import Path

import click

from parbake.cli.options import Command, Group, json_option
from parbake.cli.output import emit, emit_json, emit_table, say

file_option = click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("keys.toml"),
    envvar="PARBAKE_API_KEYS",
    metavar="FILE",
    help="File of the keys.  [default: keys.toml]",
)


@click.group(cls=Group, short_help="Make, list and remove the API keys of a server's clients.")
def command() -> None:
    """Make, list and remove the API keys of a server's clients.

    parbake serve --api-keys FILE asks every client for one of the keys in FILE, which holds hashes only. A running
    server reads the file again with parbake reload.
    """


@command.command(cls=Command, short_help="Make a key, and print it this once.")
@click.argument("name")
@click.option(
    "--deployments",
    default="",
    metavar="NAME,NAME",
    help="What the key is good for.  [default: everything]",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    metavar="PER_S",
    help="Most requests a second, over all fronts.  [default: no limit of its own]",
)
@file_option
@json_option
def add(name: str, deployments: str, rate: float | None, file: Path, as_json: bool) -> None:
    """Make a key for the client NAME, and print it on stdout: it is not kept, and nobody can show it again.

    The file is made if need be, readable for its owner only.
    """
    from parbake.app.keys import add_key

    names = [part.strip() for part in deployments.split(",") if part.strip()]
    key = add_key(file, name, names, rate)
    if as_json:
        emit_json({"name": name, "key": key, "deployments": names, "rate_per_s": rate})
        return
    emit(key)
    say(
        f"{name} may ask for {', '.join(names) or 'everything'}; {file} has the hash of this key, and nothing has more"
    )


@command.command("list", cls=Command, short_help="Show which clients have a key, and for what.")
@file_option
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show which clients have a key, what it is good for, and since when they have it."""
    from parbake.app.keys import read_keys

    keys = read_keys(file)
    if as_json:
        emit_json(keys)
        return
    if not keys:
        say(f"{file} has no keys")
        return
    emit_table(
        [
            (
                key.name,
                ", ".join(key.deployments) or "everything",
                "no limit" if key.rate_per_s is None else f"{key.rate_per_s:g} per s",
                key.created,
            )
            for key in keys
        ],
        ("client", "deployments", "rate", "since"),
    )


@command.command(cls=Command, short_help="Remove a client's key.")
@click.argument("name")
@file_option
def remove(name: str, file: Path) -> None:
    """Remove the key of the client NAME. A running server lets it in until it reads the file again."""
    from parbake.app.keys import remove_key

    remove_key(file, name)
    say(f"{name} has no key any more; parbake reload tells a running server")
