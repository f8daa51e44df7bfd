"""`parbake alias`: let a name such as champion point at a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from parbake.cli.options import (
    Command,
    alias_options,
    json_option,
    progress_option,
    state_settings,
    who_option,
)
from parbake.cli.output import emit_json, emit_table, say, stages


@click.command(cls=Command, short_help="Let an alias point at a version, or show where aliases point.")
@click.argument("name")
@click.argument("alias", required=False, default="")
@click.argument("version", required=False, default="")
@click.option("--why", default="", metavar="TEXT", help="Why, for the history.")
@who_option("Who lets it point there.")
@alias_options
@progress_option
@json_option
def command(
    name: str,
    alias: str,
    version: str,
    why: str,
    who: str,
    show_progress: bool,
    as_json: bool,
    config: Path | None,
    **values: Any,
) -> None:
    """Let ALIAS of the model NAME point at VERSION; without them, show where its aliases point.

    Servers that follow the alias (parbake serve models:/NAME@ALIAS) take the version in when they ask next, or at once
    with parbake reload. Who moved it, and why, stands in the history; where that is away the alias moves all the same.
    """
    if alias and not version:
        raise click.UsageError(f"which version? parbake alias {name} {alias} 3")
    from parbake.app.registry import move_alias, open_registry, registry_url

    settings, untold = state_settings(config, values), ""
    with stages("asking the registry", wanted=show_progress) as stage:
        stage(name)
        registry = open_registry(registry_url(settings))
        if alias:
            untold = move_alias(settings, registry, name, alias, version, by=who, why=why)
        aliases = registry.aliases(name)
    if untold:
        say(untold)
    if as_json:
        emit_json(aliases)
    elif alias:
        say(f"{alias} of {name} points at version {version}")
    elif aliases:
        emit_table(sorted(aliases.items()), ("alias", "version"))
    else:
        say(f"{name} has no aliases")
