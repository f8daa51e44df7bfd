"""Data to stdout, words to stderr: how the command speaks, on a terminal and to a script."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TextIO

import click

_WIDTH_WITHOUT_TERMINAL: Final = 110
_LEAST_LAST_COLUMN: Final = 24

Report = Callable[[int, int | None], None]
"""``report(done, total)``; a total of None is not known."""


def emit(line: str = "") -> None:
    """One line of data for a person."""
    click.echo(line)


def emit_title(line: str) -> None:
    """A heading on stdout, bold on a terminal."""
    click.echo(click.style(line, bold=True) if colours(sys.stdout) else line)


def emit_json(value: object) -> None:
    """Write a value (structs and dataclasses too) as indented JSON."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def emit_table(
    rows: Sequence[Sequence[str]], titles: Sequence[str] = (), numbers: Sequence[str] = ()
) -> None:
    """Columns that are legible without colours and lines.

    ``numbers`` are the titles of columns that stand on the right. The last column is wrapped where it
    would not fit the terminal.
    """
    everything = [list(titles), *rows] if titles else list(rows)
    widths = [max(map(len, cells)) for cells in zip(*everything, strict=True)]
    before = sum(width + 3 for width in widths[:-1])
    room = max(_width() - before, _LEAST_LAST_COLUMN)
    for number, row in enumerate(everything):
        line = ""
        for at, (cell, width) in enumerate(zip(row[:-1], widths, strict=False)):
            right = bool(titles) and titles[at] in numbers
            line += (cell.rjust(width) if right else cell.ljust(width)) + "   "
        last = row[-1].rjust(widths[-1]) if titles and titles[-1] in numbers else row[-1]
        for part in textwrap.wrap(last, room, break_on_hyphens=False, break_long_words=False) or [""]:
            text = (line + part).rstrip()
            emit_title(text) if titles and number == 0 else emit(text)
            line = " " * before


def say(text: str) -> None:
    """One line of words for a person."""
    click.echo(text, err=True)


def say_error(message: str, hint: str = "") -> None:
    """``error: ...`` and, where something can be done, ``hint: ...``."""
    say(f"{_coloured('error:', 'red')} {message}")
    if hint:
        say(f"{_coloured('hint:', 'cyan')} {hint}")


def plain(text: str) -> str:
    """Text that somebody else wrote, without what would move the cursor of a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def size(count: float) -> str:
    """Bytes as a person reads them: ``1.4 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float) -> str:
    """How long ago, in the largest unit that fits: ``3 days ago``."""
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


@contextmanager
def progress(what: str, unit: str, *, wanted: bool = True, stream: TextIO | None = None) -> Iterator[Report]:
    """A line on stderr with count, unit, rate and time left; gives what redraws it.

    Silent where ``wanted`` is false or the stream is no terminal. The line is gone afterwards.
    """
    from tqdm import tqdm

    target = stream if stream is not None else sys.stderr
    silent = not wanted or not target.isatty()
    with tqdm(desc=what, unit=f" {unit}", file=target, disable=silent, leave=False, ascii=True) as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


@contextmanager
def stages(what: str, *, wanted: bool = True) -> Iterator[Callable[[str], None]]:
    """A line on stderr that names the stage under way; gives what is called with a stage's name."""
    if not wanted or not sys.stderr.isatty():
        yield lambda stage: None
        return

    def enter(stage: str) -> None:
        sys.stderr.write("\r\x1b[K" + f"{what}: {stage} ..."[: _width() - 1])
        sys.stderr.flush()

    try:
        yield enter
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def colours(stream: TextIO) -> bool:
    """Whether colours are wanted: on a terminal, unless NO_COLOR says otherwise (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _coloured(text: str, colour: str) -> str:
    return click.style(text, fg=colour, bold=True) if colours(sys.stderr) else text


def _width() -> int:
    return shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns
