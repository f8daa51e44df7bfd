"""The command's frame: subcommands found lazily, errors as words and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import click
import pytest

from parbake.cli.exits import Exit
from parbake.cli.main import COMMANDS, group, main
from parbake.cli.options import Command
from parbake.errors import InvalidInput, RunnerDown

Fail = Callable[[BaseException], list[str]]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Registers a subcommand that raises; gives the words that call it."""

    def register(error: BaseException) -> list[str]:
        @click.command("fail", cls=Command)
        def command() -> None:
            raise error

        monkeypatch.setitem(
            sys.modules, "failing_command", cast("ModuleType", SimpleNamespace(command=command))
        )
        monkeypatch.setitem(COMMANDS, "fail", ("failing_command", "Fail."))
        return ["fail"]

    return register


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_command_says_of_itself(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert command.get_short_help_str(200) == COMMANDS[name][1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"parbake {name} {parameter.opts[0]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_debug(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    assert any("--debug" in parameter.opts for parameter in command.params)


def test_an_error_is_told_in_words_and_by_its_exit_code(
    failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    error = InvalidInput("expected FP32", path="$.inputs[0]", hint="send numbers")
    assert main(failing(error)) == Exit.USAGE
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: expected FP32 at $.inputs[0]\nhint: send numbers\n")


def test_a_server_that_cannot_answer_now_has_an_exit_code_of_its_own(failing: Fail) -> None:
    assert main(failing(RunnerDown("restarting"))) == Exit.UNAVAILABLE


def test_an_error_that_nobody_expected_is_one_line_and_says_how_to_see_more(
    failing: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    words = failing(ZeroDivisionError("division by zero\nand more"))
    assert main(words) == Exit.BUG
    assert capsys.readouterr().err == (
        "error: unexpected ZeroDivisionError: division by zero\n"
        "hint: the same command with --debug shows the traceback\n"
    )


@pytest.mark.parametrize("place", ["front", "back"])
def test_debug_shows_the_traceback(failing: Fail, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = failing(ZeroDivisionError("division by zero"))
    assert main(["--debug", *words] if place == "front" else [*words, "--debug"]) == Exit.BUG
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("error: unexpected ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["delpoy", "eta@2"], "no such command 'delpoy'. Did you mean 'deploy'?"),
        (["image", "biuld"], "no such command 'biuld'. Did you mean 'build'?"),
        (["deploy", "eta@2", "--cnary", "1%"], "no such option '--cnary'. Did you mean '--canary'?"),
        (["colour"], "no such command 'colour'\n"),
    ],
)
def test_what_is_mistyped_is_told_what_is_near(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == Exit.USAGE
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (["deploy", "eta@four", "{}"], "'four' is no version: a version is a positive whole", "as in eta@4"),
        (["deploy", "eta@champion", "{}"], "'champion' is no version", "as in eta@4"),
        (["deploy", "eta@03", "{}"], "'03' is no version", "eta@3"),
        (["deploy", "eta@0", "{}"], "'0' is no version", "as in eta@4"),
        (["deploy", "eta@v3"], "'v3' is neither a version", "eta@3"),
        (["deploy", "eta@latest"], "nor an alias", "as in eta@4, or eta@champion"),
        (["deploy", "eta@1/2"], "'1/2' is neither", "as in eta@4, or eta@champion"),
        (["deploy", "eta"], "'eta' is not NAME@VERSION", "as in eta@3"),
        (["deploy", "models:/eta/3"], "'models:/eta/3' is not NAME@VERSION", "as in price@3"),
        (["deploy", "e ta@3"], "'e ta' cannot be a model's name", "letters, digits"),
        (["gate", "{}", "--waive", "memory", "--why", "x", "--for", "eta@four"], "'four' is no version", "eta@4"),
        (["serve", "models:/eta@03"], "'03' is neither a version", "eta@3"),
        (["release", "eta", "--why", "the weekend"], "--why is about a change: --set NAME=VALUE", "--help"),
        (["release", "eta", "--who", "ada"], "--who is about a change: --set NAME=VALUE", "--help"),
    ],
)  # fmt: skip
def test_what_names_no_version_or_changes_nothing_is_refused_before_anybody_is_asked(
    words: list[str], says: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp_path) for word in words]) == Exit.USAGE
    error, _, hinted = capsys.readouterr().err.partition("\nhint: ")
    assert says in error
    assert hint in hinted


def test_ctrl_c_is_no_bug(failing: Fail, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(failing(KeyboardInterrupt())) == Exit.INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_mistake_in_the_command_names_the_help_that_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == Exit.USAGE
    assert (
        capsys.readouterr().err
        == "error: missing argument 'PATH'\nhint: parbake inspect --help shows what it takes\n"
    )
