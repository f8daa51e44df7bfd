"""Findings in a table on the terminal, as JSON, and as the page docs/reliability.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from bench.machine import Machine
from chaos.model import Check, Finding
from parbake.cli.output import emit, emit_table, emit_title

_PAGE: Final = "reliability.md"
_FIGURES: Final = "reliability.json"


class Report(Struct, frozen=True):
    """One run, or what is left of several: each finding is of the last time that its scenario was played."""

    machine: Machine
    findings: tuple[Finding, ...]


def verdict(finding: Finding) -> str:
    """In a word or two."""
    if finding.not_tested:
        return "not tested here"
    if finding.late:
        return "late"
    return "held" if finding.held else "NOT HELD"


def show(findings: Sequence[Finding]) -> None:
    """Print one line for each scenario, and every promise that was broken."""
    titles = ("scenario", "requests", "failed", "wrong", "longest outage", "")
    rows = [
        (
            f.name,
            f"{f.requests:,}",
            f"{sum(f.failed.values()):,}",
            f"{f.wrong:,}",
            f"{f.outage_ms:,.0f} ms",
            verdict(f),
        )
        for f in findings
    ]
    emit_table(rows, titles=titles, numbers=titles[1:-1])
    for finding in findings:
        if finding.not_tested:
            emit(f"{finding.name} was not tested here: {finding.not_tested}")
        broken = [check for check in finding.checks if not check.held]
        if broken:
            emit()
            emit_title(f"{finding.name}: {finding.broken}")
            emit_table([_row(check) for check in broken], titles=_CHECK_TITLES, numbers=("observed",))
            emit(_seen(finding))
            if finding.complaint:
                emit(finding.complaint)


def keep(report: Report, folder: Path, order: Iterable[str]) -> None:
    """Put findings in the place of those that ``folder`` holds of the same scenarios, and write the page again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FIGURES
    kept: dict[str, Finding] = {}
    if path.exists():
        kept = {f.name: f for f in msgspec.json.decode(path.read_bytes(), type=Report).findings}
    kept.update({f.name: f for f in report.findings})
    whole = Report(report.machine, tuple(kept[name] for name in order if name in kept))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
    (folder / _PAGE).write_text(page(whole))


def page(report: Report) -> str:
    """A report as Markdown."""
    findings = report.findings
    tested = [f for f in findings if not f.not_tested]
    counted = f"{sum(f.requests for f in tested):,} requests in {len(tested)} scenarios"
    lines = [
        "<!-- Written by `make chaos`: run it again to change it. -->",
        "# Reliability",
        "",
        "What is promised when something breaks, and what was observed. Written by `make chaos`: each scenario starts",
        "a server, has callers ask it who check the value of every answer, breaks something, and counts. The unrounded",
        "figures are in [reliability.json](reliability.json).",
        "",
        f"{counted}, {sum(f.wrong for f in tested):,} wrong answers.",
        "",
        "| what is broken | what is promised | requests | failed | longest outage | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for f in findings:
        figures = (
            ("", "", "")
            if f.not_tested
            else (f"{f.requests:,}", f"{sum(f.failed.values()):,}", f"{f.outage_ms:,.0f} ms")
        )
        word = verdict(f) if f.held else "**not held**"
        lines.append(f"| [{f.broken}](#{f.name}) | {f.promised} | {' | '.join(figures)} | {word} |")
    lines += [
        "",
        "The *longest outage* is the longest time in which any one kind of callers got no right answer, whatever they",
        "were promised. Below stands what was promised to whom.",
    ]
    for f in findings:
        lines += ["", f"## {f.name}", "", f"{_sentence(f.broken)} Promised: {f.promised}."]
        if f.not_tested:
            lines += ["", f"Not tested here: {f.not_tested}."]
            continue
        lines += ["", "| promise | wanted | observed | |", "| --- | --- | ---: | --- |"]
        lines += [f"| {' | '.join(_row(check))} |" for check in f.checks]
        lines += ["", _seen(f)]
    lines += ["", _machine(report.machine)]
    return "\n".join(lines) + "\n"


_CHECK_TITLES: Final = ("promise", "wanted", "observed", "")


def _row(check: Check) -> tuple[str, str, str, str]:
    number = "never"
    if check.got is not None:
        whole = check.got >= 100 or check.got.is_integer()
        number = f"{check.got:,.0f}" if whole else f"{check.got:,.3g}"
        number = f"{number} {check.unit}".rstrip()
    return (check.promise, check.wanted, number, "held" if check.held else "NOT HELD")


def _seen(found: Finding) -> str:
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.failed.items())) or "none"
    seen = [f"{found.requests:,} requests in {found.seconds:.0f} s; failed: {told}"]
    seen += [
        f"{name} {'never' if value is None else f'{value:,.5g}'}" for name, value in found.figures.items()
    ]
    return f"{'; '.join(seen)}."


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _machine(machine: Machine) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    return (
        f"*Observed on {machine.date}: {machine.cpu}, {machine.cores} CPUs, {machine.memory_gib:g} GiB, "
        f"{machine.system}, {machine.python}; {libraries}.*"
    )
