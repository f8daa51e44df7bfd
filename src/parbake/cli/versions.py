"""`parbake versions`: what is registered, and what the aliases point at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from parbake.cli.options import Command, given, json_option, progress_option, settings_options
from parbake.cli.output import emit_json, emit_table, say, stages
from parbake.errors import NotFound
from parbake.settings import CONFIG_FILE, ReleaseSettings, ServerSettings, Settings, override, read_settings

if TYPE_CHECKING:
    from parbake.release.registry import Version

F = TypeVar("F", bound=Callable[..., Any])

_WANTED = ("registry", "bundle_store")
_DIGEST = len("sha256:") + 12


def registry_options(function: F) -> F:
    """The options that say where registry and bundle store are."""
    function = click.option(
        "--state-dir",
        envvar="PARBAKE_STATE_DIR",
        metavar="DIR",
        help="Folder of what parbake keeps by itself.  [default: .parbake]",
    )(function)
    function = settings_options(ReleaseSettings, only=_WANTED)(function)
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="PARBAKE_CONFIG",
        help=f"Settings as TOML  [default: {CONFIG_FILE}, if there]",
    )(function)


def release_settings(config: Path | None, values: Mapping[str, Any]) -> Settings:
    """The settings that `registry_options` and the file give. Raises `NotFound`, `SettingsError`."""
    if config is not None and not config.is_file():
        raise NotFound(f"no settings file at {config}")
    default = Path(CONFIG_FILE)
    file = config or (default if default.is_file() else None)
    base = Settings() if file is None else read_settings(file)
    return Settings(
        server=override(base.server, given(ServerSettings, values)),
        deployments=base.deployments,
        release=override(base.release, given(ReleaseSettings, values)),
    )


@click.command(cls=Command, short_help="Show the registered versions of a model.")
@click.argument("name", required=False, default="")
@registry_options
@progress_option
@json_option
def command(name: str, show_progress: bool, as_json: bool, config: Path | None, **values: Any) -> None:
    """Show the versions of the model NAME, oldest first, or of all models.

    A version without a digest was registered by another tool: parbake pack makes a bundle of it.
    """
    from parbake.app.registry import open_registry, registry_url

    settings = release_settings(config, values)
    with stages("asking the registry", wanted=show_progress) as stage:
        stage(name or "all models")
        registry = open_registry(registry_url(settings))
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
