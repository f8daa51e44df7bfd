"""`parbake reload`: put a new bundle or table under a running server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parbake.cli.options import Command, json_option, name_and_directory, server_options
from parbake.cli.output import emit_json, say
from parbake.errors import SettingsError, TableForeign
from parbake.settings import REGISTERED

if TYPE_CHECKING:
    from parbake.app.supervisor import Change

Served = Iterable[tuple[str, str]]
"""Name and bundle digest of what a server serves."""


@click.command(cls=Command, short_help="Put a new bundle or table under a running server.")
@click.argument("targets", nargs=-1, metavar="[NAME|BUNDLE]...")
@click.option(
    "--name",
    default="",
    metavar="DEPLOYMENT",
    help="Deployment whose bundle BUNDLE replaces, where that has a name of its own.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Prediction table for the target, for NAME, or for the deployment whose bundle baked it.  [repeatable]",
)
@server_options
@json_option
def command(
    targets: tuple[str, ...],
    name: str,
    tables: tuple[str, ...],
    port: int | None,
    admin_url: str,
    token: str,
    as_json: bool,
) -> None:
    """Put a new bundle or table under a running server, without a failed request.

    A BUNDLE (a directory, or a version in the registry: models:/NAME@3, models:/NAME@champion) takes the place of the
    one of its name, or joins in on a server that was started --empty; a NAME is read again from where it is, and loaded
    where it was not; without either everything that is loaded is read again. What fails its checks is
    refused, and the old goes on answering.
    """
    from parbake.transports import client

    def served() -> Served:
        status = client.status(port=port, admin_url=admin_url, token=token)
        return [(version.name, version.digest) for version in status.versions]

    changes = changes_of(targets, tables, served, name)
    done = client.reload(changes, port=port, admin_url=admin_url, token=token)
    if as_json:
        emit_json(done)
    else:
        what = ", ".join(done.changed) if done.changed else "nothing had changed"
        say(f"reloaded in {done.seconds:.2f} s: {what}")


def changes_of(
    targets: Sequence[str], tables: Sequence[str], served: Callable[[], Served], name: str = ""
) -> list[Change]:
    """What a server shall change. ``served`` is asked only where a table does not say what it is for.

    ``name`` is the deployment that the one bundle among the targets is for. Raises `SettingsError` where there
    is no such bundle, `TableForeign` where a table fits neither a bundle that is named nor one that is served.
    """
    from parbake.app.supervisor import Change

    if name and not (len(targets) == 1 and _is_bundle(targets[0])):
        raise SettingsError(
            f"--name {name} takes one bundle, got {', '.join(targets) or 'none'}",
            hint=f"parbake reload BUNDLE --name {name}",
        )
    for target in targets:
        if os.sep in target and not _is_bundle(target):
            raise SettingsError(
                f"no bundle at {target}", hint="parbake reload takes a bundle, or a name that is served"
            )
    changes = [
        Change(name, bundle=target) if _is_bundle(target) else Change(name=target) for target in targets
    ]
    named = [name_and_directory(table) for table in tables]
    if len(targets) == 1 and len(tables) == 1 and not named[0][0]:
        only = changes[0]
        return [Change(only.name, only.bundle, named[0][1])]
    for of, directory in named:
        changes.append(Change(of or _baked_for(directory, targets, served), "", directory))
    return changes


def _is_bundle(target: str) -> bool:
    return target.startswith(REGISTERED) or Path(target).is_dir()


def _baked_for(directory: str, targets: Sequence[str], served: Callable[[], Served]) -> str:
    """Name of the deployment whose bundle baked a table."""
    from parbake.contract.bundle import read_bundle
    from parbake.tables.lmdb import read_lineage

    digest = read_lineage(directory).bundle_digest
    for target in targets:
        if Path(target).is_dir() and (bundle := read_bundle(target, verify=False)).digest == digest:
            return bundle.contract.name
    for name, its_digest in served():
        if its_digest == digest:
            return name
    raise TableForeign(
        f"{directory} was baked by bundle {digest[:19]}..., which is neither named nor served",
        hint="reload that bundle with it, or bake the table again from the bundle that is served",
    )
