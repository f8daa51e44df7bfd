"""`parbake register`: a bundle becomes a numbered version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from parbake.cli.options import (
    BUNDLE,
    Command,
    alias_options,
    json_option,
    progress_option,
    state_settings,
)
from parbake.cli.output import emit_json, say, stages


@click.command(cls=Command, short_help="Register a bundle as the next version of its model.")
@click.argument("bundle", type=BUNDLE)
@click.option("--name", default="", metavar="NAME", help="Name of the model.  [default: the contract's]")
@click.option("--alias", default="", metavar="ALIAS", help="Let this alias point at it.")
@click.option("--by", default="", metavar="WHO", help="Who registers it.  [default: the user]")
@click.option("--force", is_flag=True, help="Register it without purpose or owner; that is recorded.")
@alias_options
@progress_option
@json_option
def command(
    bundle: Path,
    name: str,
    alias: str,
    by: str,
    force: bool,
    show_progress: bool,
    as_json: bool,
    config: Path | None,
    **values: Any,
) -> None:
    """Register a bundle: it is kept in the bundle store, and becomes the next version of its model.

    The same bundle is the same version, however often it is registered. A bundle that does not say what it is for, or
    who answers for it, is refused.
    """
    from parbake.app.registry import register
    from parbake.release.registry import check_alias, check_name

    if alias:
        check_alias(alias)
    if name:
        check_name(name)
    settings = state_settings(config, values)
    with stages("registering", wanted=show_progress) as stage:
        stage(str(bundle))
        version, untold = register(settings, bundle, name=name, alias=alias, by=by, force=force)
    if untold:
        say(untold)
    if as_json:
        emit_json(version)
        return
    pointed = f", which {alias} points at now" if alias else ""
    say(f"registered {version.name}@{version.version}, {version.digest[:19]}...{pointed}")
    if version.forced:
        say(f"recorded: {version.forced}")
