"""`parbake serve`: settings out of flags, environment and parbake.toml, then the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from parbake.cli.options import REGISTERED_OR_BUNDLE, Command, given, name_and_directory, settings_options
from parbake.errors import NotFound, SettingsError, TableForeign
from parbake.settings import (
    CONFIG_FILE,
    REGISTERED,
    DeploymentSettings,
    QueueSettings,
    ReleaseSettings,
    ServerSettings,
    Settings,
    override,
    read_settings,
)


@click.command(cls=Command, short_help="Serve bundles over HTTP and gRPC.")
@click.argument("bundles", nargs=-1, type=REGISTERED_OR_BUNDLE, metavar="[BUNDLE]...")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="PARBAKE_CONFIG",
    help=f"Settings and deployments as TOML  [default: {CONFIG_FILE}, if no bundle is named]",
)
@settings_options(DeploymentSettings, multiple=["table"])
@settings_options(ServerSettings)
@settings_options(ReleaseSettings)
@settings_options(QueueSettings)
@click.pass_context
def command(ctx: click.Context, /, bundles: tuple[Path, ...], config: Path | None, **values: Any) -> None:
    """Serve bundles over HTTP and gRPC.

    Bundles are named here or in a parbake.toml: directories, or versions in the registry (models:/NAME@3;
    models:/NAME@champion follows the alias). A flag wins over its environment variable, that over
    the file; bundles named here replace the deployments of the file. --table takes DIR (it goes to the
    bundle that baked it) or NAME=DIR.

    Ctrl-C or SIGTERM answers everything that was accepted, then stops; a second one stops at once.
    """
    settings = build(bundles, config, values)

    from parbake.transports.server import run

    ctx.exit(run(settings))


def build(bundles: Sequence[Path], config: Path | None, values: Mapping[str, Any]) -> Settings:
    """The settings of one start. Raises `SettingsError`, or `NotFound` for a file that is not there."""
    file = _config_file(bundles, config)
    base = Settings() if file is None else read_settings(file)
    deployments = base.deployments
    if bundles:
        deployments = tuple(DeploymentSettings(bundle=str(path)) for path in bundles)
    server = override(base.server, given(ServerSettings, values))
    if not deployments and not server.empty:
        raise SettingsError(
            f"{file} has no [[deployments]]" if file else "nothing to serve",
            hint="parbake serve BUNDLE, or a parbake.toml with [[deployments]]",
        )
    flags = given(DeploymentSettings, {**values, "table": None})
    deployments = tuple(override(deployment, flags) for deployment in deployments)
    return Settings(
        server=server,
        deployments=_with_tables(deployments, values.get("table") or ()),
        release=override(base.release, given(ReleaseSettings, values)),
        queue=override(base.queue, given(QueueSettings, values)),
    )


def _config_file(bundles: Sequence[Path], config: Path | None) -> Path | None:
    if config is not None:
        if not config.is_file():
            raise NotFound(f"no settings file at {config}")
        return config
    default = Path(CONFIG_FILE)
    return default if not bundles and default.is_file() else None


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a table may be matched by."""

    name: str
    digest: str


def _with_tables(
    deployments: tuple[DeploymentSettings, ...], tables: Sequence[str]
) -> tuple[DeploymentSettings, ...]:
    """Give each table to its deployment: by name, else to the only one, else by the bundle that baked it."""
    if not tables:
        return deployments
    if len(deployments) == 1 and len(tables) == 1 and not name_and_directory(tables[0])[0]:
        return (override(deployments[0], {"table": tables[0]}),)
    identities = [_identity(deployment) for deployment in deployments]
    found: dict[int, str] = {}
    for table in tables:
        name, directory = name_and_directory(table)
        if name:
            matches = [i for i, identity in enumerate(identities) if identity.name == name]
            if not matches:
                names = ", ".join(identity.name for identity in identities)
                raise SettingsError(
                    f"--table {table}: no bundle is named {name!r}", hint=f"named are: {names}"
                )
        else:
            baked_by = _baked_by(directory)
            matches = [i for i, identity in enumerate(identities) if identity.digest == baked_by]
            if not matches:
                raise TableForeign(
                    f"{table} was baked by {baked_by[:19]}..., which is none of the bundles named",
                    hint="bake it again from the bundle that is served",
                )
        for index in matches:
            if index in found:
                raise SettingsError(
                    f"--table: {found[index]} and {directory} are both for {identities[index].name!r}"
                )
            found[index] = directory
    return tuple(
        override(deployment, {"table": found[i]}) if i in found else deployment
        for i, deployment in enumerate(deployments)
    )


def _identity(deployment: DeploymentSettings) -> _Identity:
    if deployment.bundle.startswith(REGISTERED):
        from parbake.release.registry import parse_reference

        # Its digest is not known before the registry is asked: tables go to it by name.
        return _Identity(deployment.name or parse_reference(deployment.bundle).name, "")
    from parbake.contract.bundle import read_bundle

    bundle = read_bundle(deployment.bundle, verify=False)
    return _Identity(deployment.name or bundle.contract.name, bundle.digest)


def _baked_by(table: str) -> str:
    """Digest of the bundle that baked a table. Raises `TableTorn` or `TableTooNew`."""
    from parbake.tables.lmdb import read_lineage

    return read_lineage(table).bundle_digest
