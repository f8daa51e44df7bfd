"""`parbake alias`: let a name such as champion point at a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from parbake.cli.options import Command, json_option, progress_option, registry_options, state_settings
from parbake.cli.output import emit_json, emit_table, say, stages


@click.command(cls=Command, short_help="Let an alias point at a version, or show where aliases point.")
@click.argument("name")
@click.argument("alias", required=False, default="")
@click.argument("version", required=False, default="")
@registry_options
@progress_option
@json_option
def command(
    name: str,
    alias: str,
    version: str,
    show_progress: bool,
    as_json: bool,
    config: Path | None,
    **values: Any,
) -> None:
    """Let ALIAS of the model NAME point at VERSION; without them, show where its aliases point.

    Servers that follow the alias (parbake serve models:/NAME@ALIAS) take the version in when they ask next, or at once
    with parbake reload.
    """
    if alias and not version:
        raise click.UsageError(f"which version? parbake alias {name} {alias} 3")
    from parbake.app.registry import open_registry, registry_url

    settings = state_settings(config, values)
    with stages("asking the registry", wanted=show_progress) as stage:
        stage(name)
        registry = open_registry(registry_url(settings))
        if alias:
            registry.alias(name, alias, version)
        aliases = registry.aliases(name)
    if as_json:
        emit_json(aliases)
    elif alias:
        say(f"{alias} of {name} points at version {version}")
    elif aliases:
        emit_table(sorted(aliases.items()), ("alias", "version"))
    else:
        say(f"{name} has no aliases")
