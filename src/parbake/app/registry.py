"""Register bundles, and ask what is registered: the registry and the bundle store, as the settings name them."""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

from parbake.app.state import STATE_FILE, open_state, state_dir
from parbake.contract.bundle import read_bundle
from parbake.errors import Conflict, ParbakeError, RegisterRefused, SettingsError
from parbake.release.bundles import BundleStore, Collected
from parbake.release.registry import MemoryRegistry, Registration, Registry, Version, parse_reference
from parbake.settings import Settings

if TYPE_CHECKING:
    from parbake.release.mlflow_models import LoggedModel

BUNDLES: Final = "bundles"
"""Folder in the state directory: the bundle store where none is set, else its cache."""

_SQLITE: Final = "sqlite:///"
_S3: Final = "s3://"


def registry_url(settings: Settings) -> str:
    """Where the registry is: as set, else MLflow on SQLite in the state directory."""
    return settings.release.registry or f"{_SQLITE}{state_dir(settings).absolute() / 'mlflow.db'}"


def cache_root(settings: Settings) -> Path:
    """Where bundles lie by digest on this machine."""
    return state_dir(settings).absolute() / BUNDLES


def store_place(settings: Settings) -> str:
    """Where the bundle store is: as set, else the folder that is the cache elsewhere."""
    return settings.release.bundle_store or str(cache_root(settings))


def open_registry(url: str) -> Registry:
    """The registry at a URL. Raises `SettingsError`, `MissingExtra`."""
    from parbake.release.mlflow import Calls, MlflowRegistry

    calls: Calls
    if url.startswith(_SQLITE):
        from parbake.release.mlflow_sqlite import SqliteCalls

        calls = SqliteCalls(Path(url.removeprefix(_SQLITE)))
    elif url.startswith(("http://", "https://")):
        from parbake.release.mlflow_rest import RestCalls

        calls = RestCalls(url)
    else:
        raise SettingsError(
            f"{url!r} is no registry", hint="https://HOST of an MLflow server, or sqlite:///PATH"
        )
    return MlflowRegistry(calls)


def registry_to_ask(url: str) -> Registry:
    """The registry at a URL, for who only asks: one that was never made has nothing, with MLflow or without.

    Raises `SettingsError`, `MissingExtra`, `RegistryAway` where one may not look whether it was.
    """
    from parbake.release.mlflow_sqlite import is_made

    path = Path(url.removeprefix(_SQLITE))
    return MemoryRegistry(str(path)) if url.startswith(_SQLITE) and not is_made(path) else open_registry(url)


def open_bundles(place: str) -> BundleStore:
    """The bundle store at a path or URL. Raises `SettingsError`, `MissingExtra`."""
    if place.startswith(_S3):
        from parbake.release.bundles_s3 import S3Store

        return S3Store(place)
    if "://" in place:
        raise SettingsError(f"{place!r} is no bundle store", hint="a directory, or s3://BUCKET/PREFIX")
    from parbake.release.bundles_directory import DirectoryStore

    return DirectoryStore(Path(place))


def register(
    settings: Settings,
    path: Path,
    *,
    name: str = "",
    alias: str = "",
    by: str = "",
    force: bool = False,
) -> tuple[Version, str]:
    """Keep a bundle in the store, then register it: a version is never there without its bundle.

    Beside the version, what `move_alias` says of the alias.

    Raises `BundleError`, `RegisterRefused` where it has no purpose or owner (``force`` records that instead),
    `RegistryAway`, `StoreAway`; then no version was made.
    """
    bundle = read_bundle(path)
    contract = bundle.contract
    lacking = [what for what in ("purpose", "owner") if not getattr(contract, what).strip()]
    if lacking and not force:
        raise RegisterRefused(
            f"{path} does not say its {' and '.join(lacking)}",
            hint=f"parbake pack --{lacking[0]} ..., or --force, which is recorded",
        )
    registry = open_registry(registry_url(settings))
    source = open_bundles(store_place(settings)).put(bundle)
    version = registry.register(
        Registration(
            name or contract.name,
            bundle.digest,
            contract.purpose,
            contract.owner,
            source,
            by or who(),
            f"no {' and no '.join(lacking)}" if lacking else "",
        )
    )
    untold = ""
    if alias:
        untold = move_alias(settings, registry, version.name, alias, version.version, by=by)
        version = registry.version(version.name, alias)
    return version, untold


def move_alias(
    settings: Settings,
    registry: Registry,
    name: str,
    alias: str,
    version: str,
    *,
    by: str = "",
    why: str = "",
) -> str:
    """Let an alias point at a version, and have the history know; gives why it does not, "" where it does.

    The alias comes first: whoever goes back by it must not have to wait for a history. Raises as `Registry.alias`.
    """
    before = registry.aliases(name).get(alias, "")
    registry.alias(name, alias, version)
    kept = settings.release
    # Not `Path.exists`, which raises where the folder must not be looked into; the alias has moved.
    if kept.registry and not kept.store and not os.path.exists(state_dir(settings) / STATE_FILE):
        # The registry is everybody's; a history that only this folder has would be nobody's.
        return (
            "this does not stand in a history: no store of releases is known here; --store says where one is"
        )
    details = {"alias": alias, "before": before if before != version else ""}
    try:
        with closing(open_state(settings)) as state:
            state.record_change("alias", name, version=version, by=by or who(), why=why, details=details)
    except ParbakeError as error:
        return f"this does not stand in the history: {error.message}"
    return ""


def prune(settings: Settings, *, grace_s: float) -> Collected:
    """Remove from the bundle store what no version in the registry refers to. Raises `RegistryAway`, `StoreAway`."""
    registry = open_registry(registry_url(settings))
    keep = {version.digest for name in registry.names() for version in registry.versions(name)}
    return open_bundles(store_place(settings)).collect(keep, grace_s=grace_s)


def logged_model(settings: Settings, text: str, folder: Path, *, allow_pickle: bool) -> LoggedModel:
    """The model of a version that MLflow's own flavours have logged; its files go to ``folder``.

    Raises `ModelNotFound`, `VersionNotFound`, `Conflict` for a version that is a bundle, and what `take` raises.
    """
    from parbake.release.mlflow_models import take

    reference = parse_reference(text)
    version = open_registry(registry_url(settings)).version(reference.name, reference.which)
    if version.digest:
        raise Conflict(f"{text} is a bundle already", hint=f"parbake serve {text} serves it")
    return take(registry_url(settings), reference, folder, allow_pickle=allow_pickle)


def versions(settings: Settings, name: str) -> Sequence[Version]:
    """The versions of a model, oldest first. Raises `ModelNotFound`, `RegistryAway`."""
    return registry_to_ask(registry_url(settings)).versions(name)


def who() -> str:
    """Whoever asks: the user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
