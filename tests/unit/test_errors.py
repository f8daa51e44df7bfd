"""The error tree: complete, stable, and drawn as it is."""

from __future__ import annotations

import inspect
import re

import pytest

from parbake import errors
from parbake.cli.exits import EXITS, Exit, exit_of
from parbake.errors import MissingExtra, ParbakeError, RunnerDown, by_code

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ParbakeError)]


def test_the_drawing_shows_every_class_under_its_parent() -> None:
    drawn: dict[str, str] = {}
    above: list[str] = []
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        if found := re.match(r"^    ((?:[|` ] {3})*)(?:[|`]-- )?([A-Z]\w+)", line):
            depth = len(found[1]) // 4 + ("-- " in line)
            above[depth:] = [found[2]]
            drawn[found[2]] = above[depth - 1] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES}


def test_every_class_has_a_code_of_its_own_and_a_docstring() -> None:
    codes = {kind.code: kind for kind in CLASSES}
    assert len(codes) == len(CLASSES)
    for kind in CLASSES:
        assert "code" in vars(kind)
        assert vars(kind)["__doc__"]


def test_every_class_has_an_exit_code() -> None:
    assert set(EXITS) == set(CLASSES)
    assert set(EXITS.values()) <= set(Exit)
    assert Exit.DONE not in EXITS.values()


def test_a_class_that_the_table_does_not_know_exits_like_its_parent() -> None:
    class Stalled(RunnerDown):
        """A runner that does not answer."""

    assert exit_of(Stalled("no answer")) is EXITS[RunnerDown]


@pytest.mark.parametrize("code", Exit)
def test_every_exit_code_has_a_meaning(code: Exit) -> None:
    assert code.meaning


def test_a_message_reads_what_then_where_then_what_to_do() -> None:
    error = ParbakeError("expected FP32", path="$.inputs[0]", hint="send numbers")
    assert str(error) == "expected FP32 at $.inputs[0]\nhint: send numbers"
    assert str(ParbakeError("expected FP32")) == "expected FP32"


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    told = by_code("missing_extra", "pandas is not installed", hint="pip install 'parbake[sklearn]'")
    assert isinstance(told, MissingExtra)
    assert str(told) == str(MissingExtra("pandas", "sklearn"))
    assert MissingExtra("pandas", "sklearn").hint == "pip install 'parbake[sklearn]'"
