"""Figures as sections: printed, kept as JSON, and written as a page for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from bench.machine import Machine
from parbake.cli.output import emit, emit_table, emit_title

ORDER: Final = ("http", "race", "head", "advise", "cold-start", "many", "size", "bake", "judge", "scale-out")
_PAGE: Final = "benchmarks.md"
_FIGURES: Final = "benchmarks.json"
_MEASURED: Final = "<!-- measured: {} -->"
_END: Final = "<!-- end of what was measured -->"


class Target(Struct, frozen=True):
    """Something that was promised, and what was measured."""

    what: str
    wanted: str
    """In words: ``at least 0.5``."""
    got: float
    unit: str = ""
    met: bool = False


class Table(Struct, frozen=True):
    """Figures by row; all columns but the first hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Section(Struct, frozen=True):
    """Everything that one measurement found."""

    key: str
    title: str
    how: str
    """What was measured and how, for people."""
    tables: tuple[Table, ...]
    targets: tuple[Target, ...]
    machine: Machine
    figures: dict[str, Any] = {}
    """The same, unrounded, for machines."""


def at_least(what: str, got: float, least: float, unit: str = "") -> Target:
    """A target that more is better for."""
    return Target(what, f"at least {least:g}", got, unit, got >= least)


def at_most(what: str, got: float, most: float, unit: str = "") -> Target:
    """A target that less is better for."""
    return Target(what, f"at most {most:g}", got, unit, got <= most)


def show(section: Section) -> None:
    """Print a section."""
    emit()
    emit_title(section.title)
    emit(section.how)
    for table in section.tables:
        emit()
        emit_title(table.title)
        emit_table(table.rows, titles=table.columns, numbers=table.columns[1:])
    if section.targets:
        emit()
        rows = [(t.what, t.wanted, _number(t), "met" if t.met else "NOT MET") for t in section.targets]
        emit_table(rows, titles=("target", "wanted", "measured", ""), numbers=("measured",))


def keep(section: Section, folder: Path) -> None:
    """Put a section in the place of the one that ``folder`` holds of the same kind, and write the page again.

    Its tables go into other pages of the folder too, where one has ``<!-- measured: KEY -->``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FIGURES
    kept: dict[str, Section] = {}
    if path.exists():
        kept = {old.key: old for old in msgspec.json.decode(path.read_bytes(), type=list[Section])}
    kept[section.key] = section
    ordered = [kept[key] for key in ORDER if key in kept]
    path.write_bytes(msgspec.json.format(msgspec.json.encode(ordered)) + b"\n")
    (folder / _PAGE).write_text(page(ordered))
    for other in folder.rglob("*.md"):
        text = other.read_text()
        if (filled := fill(text, ordered)) != text:
            other.write_text(filled)


def fill(text: str, sections: list[Section]) -> str:
    """A page with what was measured between its marks."""
    for section in sections:
        mark = _MEASURED.format(section.key)
        before, found, rest = text.partition(mark)
        if found:
            _, end, after = rest.partition(_END)
            lines = [*_tables(section)[1:], "", _machine(section.machine)]
            text = "\n".join([before + mark, *lines, end + after])
    return text


def _tables(section: Section) -> list[str]:
    lines: list[str] = []
    for table in section.tables:
        lines += ["", f"**{table.title}**", "", *_markdown(table.columns, table.rows)]
    return lines


def page(sections: list[Section]) -> str:
    """The sections as Markdown."""
    lines = [
        "<!-- Written by `make bench` and `make race`: run them again to change it. -->",
        "# Benchmarks",
        "",
        "Written by `make bench` and `make race`. Times differ from machine to machine; compare the",
        "ratios, as they come from one run.",
        "The unrounded figures are in [benchmarks.json](benchmarks.json).",
    ]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.how]
        lines += _tables(section)
        if section.targets:
            rows = [
                (t.what, t.wanted, _number(t), "met" if t.met else "**not met**") for t in section.targets
            ]
            lines += ["", "**Targets**", "", *_markdown(("target", "wanted", "measured", ""), rows)]
        lines += ["", _machine(section.machine)]
    return "\n".join(lines) + "\n"


def _markdown(columns: tuple[str, ...], rows: Any) -> list[str]:
    sides = ["---", *("---:" for _ in columns[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (columns, sides, *rows)]


def _machine(machine: Machine) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    return (
        f"*Measured on {machine.date}: {machine.cpu}, {machine.cores} CPUs, {machine.memory_gib:g} GiB, "
        f"{machine.system}, {machine.python}; {libraries}.*"
    )


def _number(target: Target) -> str:
    # Differences of shares need a digit more.
    digits = 3 if abs(target.got) < 0.1 else 2
    return f"{target.got:,.{digits}f} {target.unit}".rstrip()
