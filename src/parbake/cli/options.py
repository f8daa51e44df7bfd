"""Click options out of the settings structs, and the options that commands have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import click
from click.core import ParameterSource
from msgspec import Struct

from parbake.errors import InvalidInput, NotFound
from parbake.names import NAME_PATTERN
from parbake.settings import (
    CONFIG_FILE,
    REGISTERED,
    Declared,
    ReleaseSettings,
    ServerSettings,
    Settings,
    declared,
    override,
    read_settings,
)

F = TypeVar("F", bound=Callable[..., Any])

DEBUG_KEY = "parbake.debug"
_TYPED: Final = ParameterSource.COMMANDLINE


def settings_options(
    kind: type[Struct], *, multiple: Collection[str] = (), only: Collection[str] = ()
) -> Callable[[F], F]:
    """A decorator that gives a command one option for each setting of a struct, or for those in ``only``.

    The option's value is None (or, of ``multiple``, empty) where neither flag nor environment gave one,
    so that `given` can tell what overrides the file.
    """

    def decorate(function: F) -> F:
        # Click shows the option that was decorated last first.
        for setting in reversed(declared(kind)):
            if setting.option is not None and (not only or setting.field in only):
                function = _option(setting, setting.field in multiple)(function)
        return function

    return decorate


def given(kind: type[Struct], values: Mapping[str, Any]) -> dict[str, Any]:
    """What flags and environment gave for a struct, by field."""
    return {
        setting.field: values[setting.field]
        for setting in declared(kind)
        if setting.option is not None and values.get(setting.field) is not None
    }


def json_option(function: F) -> F:
    """``--json``: data for a script instead of tables for a person."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def progress_option(function: F) -> F:
    """``--no-progress``."""
    return click.option(
        "--progress/--no-progress",
        "show_progress",
        default=True,
        help="Show progress on a terminal.",
        show_default=True,
    )(function)


def server_options(function: F) -> F:
    """``--port``, ``--admin-url`` and ``--token``: which running server is meant.

    A port that was typed goes before a URL that only the environment gives.
    """

    @wraps(function)
    def chosen(*arguments: Any, **given: Any) -> Any:
        source = click.get_current_context().get_parameter_source
        if source("port") is _TYPED and source("admin_url") is not _TYPED:
            given["admin_url"] = ""
        return function(*arguments, **given)

    for option in (
        click.option(
            "--token",
            default="",
            envvar="PARBAKE_ADMIN_TOKEN",
            metavar="TOKEN",
            help="Token of the admin API.",
        ),
        click.option(
            "--admin-url",
            default="",
            envvar="PARBAKE_ADMIN_URL",
            metavar="URL",
            help="Admin API of the server.",
        ),
        click.option(
            "--port",
            type=click.IntRange(1, 65535),
            envvar="PARBAKE_PORT",
            metavar="PORT",
            help="HTTP port of the server, where several run on this machine.",
        ),
    ):
        chosen = option(chosen)
    return cast(F, chosen)


def who_option(help_text: str) -> Callable[[F], F]:
    """``--who``, or ``--by``: the name in the history."""
    return click.option(
        "--who",
        "--by",
        "who",
        default="",
        metavar="NAME",
        help=f"{help_text}  [default: the user of this machine]",
    )


def pickle_option(function: F) -> F:
    """``--allow-pickle``."""
    return click.option(
        "--allow-pickle", is_flag=True, help="Load pickles (they can run any code); only if you trust them."
    )(function)


class RegisteredOrBundle(click.ParamType[Any]):
    """A bundle's path, or a version in the registry, which comes back as it is."""

    name = "bundle"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or the reference. Raises `NotFound`, `InvalidInput`."""
        if str(value).startswith(REGISTERED):
            from parbake.release.registry import parse_reference

            return str(parse_reference(str(value)))
        return BUNDLE.convert(value, param, ctx)


class VersionOrBundle(RegisteredOrBundle):
    """A bundle's path, ``models:/NAME@champion``, or ``NAME@3``: a version that is registered or released."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or the text of the version. Raises `NotFound`, `InvalidInput`."""
        text = os.fsdecode(value)
        if "@" in text and not text.startswith(REGISTERED) and not Path(text).exists():
            return text
        return super().convert(value, param, ctx)


class ExistingPath(click.Path):
    """A path that must exist; where it does not, `NotFound` and its exit code say so, not a usage error."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(path_type=Path)
        self._what = what
        self._hint = hint

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Raises `NotFound`."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.exists() and not (ctx is not None and ctx.resilient_parsing):
            raise NotFound(f"no {self._what} at {path}", hint=self._hint)
        return path


def state_options(function: F) -> F:
    """``--config``, ``--state-dir`` and all that says where releases, versions and bundles are kept."""
    return _places(function)


def registry_options(function: F) -> F:
    """``--config``, ``--state-dir`` and what says where registry and bundle store are."""
    return _places(function, ("registry", "bundle_store"))


def alias_options(function: F) -> F:
    """The same, and ``--store``: what is changed in the registry stands in the history."""
    return _places(function, ("store", "registry", "bundle_store"))


def _places(function: F, only: Collection[str] = ()) -> F:
    function = click.option(
        "--state-dir",
        envvar="PARBAKE_STATE_DIR",
        metavar="DIR",
        help="Folder of what parbake keeps by itself.  [default: .parbake]",
    )(function)
    function = settings_options(ReleaseSettings, only=only)(function)
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="PARBAKE_CONFIG",
        help=f"Settings as TOML  [default: {CONFIG_FILE}, if there]",
    )(function)


def state_settings(config: Path | None, values: Mapping[str, Any]) -> Settings:
    """The settings file with what `state_options` or `registry_options` gave. Raises `NotFound`, `SettingsError`."""
    if config is not None and not config.is_file():
        raise NotFound(f"no settings file at {config}")
    default = Path(CONFIG_FILE)
    file = config or (default if default.is_file() else None)
    base = Settings() if file is None else read_settings(file)
    return Settings(
        server=override(base.server, given(ServerSettings, values)),
        deployments=base.deployments,
        release=override(base.release, given(ReleaseSettings, values)),
        queue=base.queue,
    )


def name_and_version(text: str, *, aliases: bool = False) -> tuple[str, str]:
    """``NAME@3`` taken apart, or ``NAME@champion`` where ``aliases`` will do too. Raises `InvalidInput`."""
    from parbake.release.registry import check_name, check_number, check_which

    name, separator, which = text.removeprefix(REGISTERED).partition("@")
    if not (name and separator and which):
        known = f"{name}@3" if NAME_PATTERN.match(name) else "price@3"
        raise InvalidInput(f"{text[:200]!r} is not NAME@VERSION", hint=f"as in {known}")
    check_name(name)
    if aliases:
        check_which(name, which)
    else:
        check_number(name, which)
    return name, which


def name_and_directory(table: str) -> tuple[str, str]:
    """``NAME=DIR`` taken apart; for a plain directory the name is empty."""
    name, separator, directory = table.partition("=")
    return (name, directory) if separator and not Path(table).exists() else ("", table)


BUNDLE = ExistingPath("bundle", "parbake pack MODEL --out DIR writes one")
REGISTERED_OR_BUNDLE = RegisteredOrBundle()
VERSION_OR_BUNDLE = VersionOrBundle()
FILE = ExistingPath("file")


class Command(click.Command):
    """A subcommand: takes ``--debug`` wherever it stands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())


class Group(click.Group):
    """Subcommands; takes ``--debug`` in front of them too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option())


def debug_option() -> click.Option:
    """``--debug``: the traceback of an error."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[DEBUG_KEY] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        envvar="PARBAKE_DEBUG",
        help="Show the traceback of an error.",
    )


def _option(setting: Declared, multiple: bool) -> Callable[[F], F]:
    assert setting.option is not None
    names = [setting.flag] + ([setting.option.short] if setting.option.short else [])
    help_text = setting.option.help
    if setting.default not in (None, "") and setting.kind is not bool:
        shown = f"{setting.default:g}" if setting.kind is float else setting.default
        help_text += f"  [default: {shown}]"
    if setting.kind is bool:
        return click.option(
            f"{setting.flag}/--no-{setting.flag[2:]}",
            setting.field,
            default=None,
            envvar=setting.variable,
            help=help_text,
        )
    return click.option(
        *names,
        setting.field,
        type=_type(setting),
        default=None,
        multiple=multiple,
        envvar=setting.variable,
        metavar=setting.option.metavar or None,
        help=help_text + ("  [repeatable]" if multiple else ""),
    )


def _type(setting: Declared) -> click.ParamType[Any]:
    if setting.choices:
        return click.Choice(setting.choices)
    if setting.kind is int:
        low = None if setting.minimum is None else int(setting.minimum)
        high = None if setting.maximum is None else int(setting.maximum)
        return click.IntRange(low, high, min_open=setting.minimum_open)
    if setting.kind is float:
        return click.FloatRange(setting.minimum, setting.maximum, min_open=setting.minimum_open)
    return click.STRING
