"""`parbake versions`: what is registered, and what the aliases point at."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from parbake.cli.options import Command, json_option, progress_option, registry_options, state_settings
from parbake.cli.output import emit_json, emit_table, say, stages

if TYPE_CHECKING:
    from parbake.release.registry import Version

_DIGEST = len("sha256:") + 12


@click.command(cls=Command, short_help="Show the registered versions of a model.")
@click.argument("name", required=False, default="")
@registry_options
@progress_option
@json_option
def command(name: str, show_progress: bool, as_json: bool, config: Path | None, **values: Any) -> None:
    """Show the versions of the model NAME, oldest first, or of all models.

    A version without a digest was registered by another tool: parbake pack makes a bundle of it.
    """
    from parbake.app.registry import registry_to_ask, registry_url

    settings = state_settings(config, values)
    with stages("asking the registry", wanted=show_progress) as stage:
        stage(name or "all models")
        registry = registry_to_ask(registry_url(settings))
        found = [v for each in ([name] if name else registry.names()) for v in registry.versions(each)]
    if as_json:
        emit_json(found)
    elif found:
        emit_table(
            [_row(version) for version in found],
            ("model", "version", "aliases", "digest", "registered (UTC)", "by", "owner", "purpose"),
            ("version",),
        )
    else:
        say("nothing is registered" if not name else f"{name} has no versions")


def _row(version: Version) -> tuple[str, ...]:
    when = datetime.fromtimestamp(version.created, UTC).strftime("%Y-%m-%d %H:%M") if version.created else "-"
    return (
        version.name,
        version.version,
        ", ".join(version.aliases) or "-",
        version.digest[:_DIGEST] or "-",
        when,
        version.by or "-",
        version.owner or "-",
        version.purpose or (f"({version.forced})" if version.forced else "-"),
    )
