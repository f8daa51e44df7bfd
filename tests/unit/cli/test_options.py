"""Options: one for each setting, flag over environment, and None where nothing was given."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import click
import msgspec
import pytest
from click.testing import CliRunner
from msgspec import Struct

from parbake.cli.options import given, server_options, settings_options
from parbake.cli.serve import command as serve
from parbake.settings import DeploymentSettings, Option, ServerSettings, declared


class Oven(Struct, frozen=True):
    """Settings of a test."""

    heat_c: Annotated[int, Option("How hot.", "C"), msgspec.Meta(ge=0, le=300)] = 180
    minutes: Annotated[float, Option("How long."), msgspec.Meta(gt=0)] = 30.0
    fan: Annotated[bool, Option("Blow.")] = False
    shelf: Annotated[Literal["top", "bottom"] | None, Option("Where.", short="-s")] = None
    serial: str = "only in the file"


def run(*arguments: str, env: dict[str, str] | None = None) -> dict[str, Any] | str:
    """What a command with the options of `Oven` was given, or what it complained about."""
    found: dict[str, Any] = {}

    @click.command
    @settings_options(Oven)
    def command(**values: Any) -> None:
        found.update(given(Oven, values))

    result = CliRunner().invoke(command, arguments, env=env)
    return found if result.exit_code == 0 else result.output


def test_nothing_given_is_nothing() -> None:
    assert run() == {}


def test_a_flag_wins_over_the_environment() -> None:
    assert run(env={"PARBAKE_HEAT_C": "200"}) == {"heat_c": 200}
    assert run("--heat-c", "250", env={"PARBAKE_HEAT_C": "200"}) == {"heat_c": 250}


def test_a_switch_can_be_turned_off_again() -> None:
    assert run("--fan") == {"fan": True}
    assert run(env={"PARBAKE_FAN": "1"}) == {"fan": True}
    assert run("--no-fan", env={"PARBAKE_FAN": "1"}) == {"fan": False}


def test_a_short_flag_works_as_the_long_one() -> None:
    assert run("-s", "top") == run("--shelf", "top") == {"shelf": "top"}


def test_a_key_without_an_option_is_no_flag() -> None:
    assert "No such option" in run("--serial", "1")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--heat-c", "301"], "301 is not in the range 0<=x<=300"),
        (["--minutes", "0"], "0.0 is not in the range x>0"),
        (["--shelf", "left"], "'left' is not one of 'top', 'bottom'"),
        (["--heat-c", "hot"], "'hot' is not a valid integer"),
    ],
)
def test_a_value_out_of_bounds_is_named(arguments: list[str], complaint: str) -> None:
    assert complaint in run(*arguments)


def test_help_shows_words_metavar_and_default() -> None:
    @click.command
    @settings_options(Oven)
    def command(**values: Any) -> None: ...

    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert "--heat-c C How hot. [default: 180]" in text
    assert "--shelf" in text


@pytest.mark.parametrize("kind", [ServerSettings, DeploymentSettings])
def test_every_setting_of_the_server_is_an_option_of_serve(kind: type[Struct]) -> None:
    options = {option.name: option for option in serve.params if isinstance(option, click.Option)}
    for setting in declared(kind):
        if setting.option is not None:
            option = options[setting.field]
            assert setting.flag in option.opts
            assert option.envvar == setting.variable
            assert option.help is not None
            assert option.help.startswith(setting.option.help)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ((), (7000, "http://away")),
        (("--port", "9000"), (9000, "")),
        (("--admin-url", "http://here"), (7000, "http://here")),
        (("--port", "9000", "--admin-url", "http://here"), (9000, "http://here")),
    ],
)
def test_a_typed_port_goes_before_a_url_that_only_the_environment_gives(
    arguments: tuple[str, ...], meant: tuple[int, str]
) -> None:
    found: list[tuple[int, str]] = []

    @click.command
    @server_options
    def command(port: int, admin_url: str, token: str) -> None:
        found.append((port, admin_url))

    env = {"PARBAKE_PORT": "7000", "PARBAKE_ADMIN_URL": "http://away"}
    assert CliRunner().invoke(command, arguments, env=env).exit_code == 0
    assert found == [meant]
