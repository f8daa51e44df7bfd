"""What people see: sizes, ages, and no colours where nobody wants them."""

from __future__ import annotations

import io
import time

import pytest

from parbake.cli.output import age, emit_table, progress, say_error, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_450_000, "1.4 MB"),
        (2e9, "2.0 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes_are_in_powers_of_ten(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "just now"),
        (59, "just now"),
        (60, "1 minute ago"),
        (7_300, "2 hours ago"),
        (400 * 86_400, "400 days ago"),
    ],
)
def test_ages_are_in_the_largest_unit_that_fits(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_an_error_is_two_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say_error("no bundle at x", "parbake pack writes one")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: no bundle at x\nhint: parbake pack writes one\n"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("baking", "rows", wanted=True) as report:
        report(1, 10)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_shows_count_total_and_rate_and_leaves_nothing_behind() -> None:
    stream = Terminal()
    with progress("baking", "rows", stream=stream) as report:
        report(500, 2_000)
        time.sleep(0.11)
        report(1_000, 2_000)
    drawn = stream.getvalue()
    assert "baking:  50%" in drawn
    assert "1000/2000" in drawn
    assert "rows/s" in drawn
    assert not drawn.rpartition("\r")[2].strip()


def test_progress_without_a_total_shows_the_count() -> None:
    stream = Terminal()
    with progress("baking", "rows", stream=stream) as report:
        report(1, None)
        time.sleep(0.11)
        report(3_000, None)
    assert "baking: 3000 rows" in stream.getvalue()


def test_progress_can_be_switched_off() -> None:
    stream = Terminal()
    with progress("baking", "rows", wanted=False, stream=stream) as report:
        report(1, 2)
    assert stream.getvalue() == ""


def test_columns_are_aligned_and_numbers_stand_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    emit_table([("a.onnx", "7", "x"), ("b", "1,234", "y")], ("file", "bytes", "sha"), numbers=("bytes",))
    assert capsys.readouterr().out == (
        "file     bytes   sha\n"
        "a.onnx       7   x\n"
        "b        1,234   y\n"
    )  # fmt: skip


def test_a_long_last_column_is_wrapped_under_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    emit_table([("key", "alpha beta gamma delta epsilon zeta eta"), ("k", "")])
    assert capsys.readouterr().out == (
        "key   alpha beta gamma delta epsilon\n"
        "      zeta eta\n"
        "k\n"
    )  # fmt: skip
