"""``python -m chaos [SCENARIO]... [--quick]``: all of them without a name. Status 1 where a promise did not hold."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from bench.machine import this_machine
from chaos.catalogue import ALL
from chaos.model import Finding, NotTested, Scenario, Stage, finding, none
from chaos.report import Report, keep, show, verdict
from parbake.cli.output import emit, emit_json, say, stages

DOCS: Final = Path(__file__).parents[1] / "docs"
_QUICK_S: Final = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, print, write; gives the exit status."""
    parser = _options()
    options = parser.parse_args(arguments)
    if options.lenient and not options.quick:
        parser.error("--lenient goes with --quick: what is written down is held to its limits")
    if options.list:
        for scenario in ALL.values():
            emit(f"{scenario.name:<18}{scenario.broken}")
        return 0
    started = time.monotonic()
    seconds = options.seconds or (_QUICK_S if options.quick else 10.0)
    findings: list[Finding] = []
    for name in dict.fromkeys(options.scenario or ALL):
        with stages(name, wanted=not options.json) as stage:
            found = play(ALL[name], seconds, quick=options.quick, stage=stage)
        findings.append(found)
        say(f"{name}: {verdict(found)} ({found.seconds:.1f} s)")
    report = Report(this_machine(), tuple(findings))
    if options.json:
        emit_json(report)
    else:
        show(findings)
        emit()
        sys.stdout.flush()
        emit(f"{_summary(findings)}; took {time.monotonic() - started:.0f} s")
    written = options.out or (None if options.quick or options.json else DOCS)
    if written is not None:
        keep(report, written, ALL)
        say(f"written: {written}/reliability.md and reliability.json")
    return int(any(not found.held and not (options.lenient and found.late) for found in findings))


def _summary(findings: Sequence[Finding]) -> str:
    broken = sum(not found.held and not found.late for found in findings)
    late = sum(found.late for found in findings)
    words = [f"{broken} scenarios in which a promise did not hold"] if broken else []
    words += [f"{late} in which times or sizes alone were over their limits"] if late else []
    return "; ".join(words) or "every promise held"


def play(scenario: Scenario, seconds: float, *, quick: bool, stage: Callable[[str], None]) -> Finding:
    """Play one scenario in a folder of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="parbake-chaos-") as folder:
        try:
            seen = scenario.play(Stage(Path(folder), seconds, quick, stage))
        except NotTested as reason:
            return Finding(
                scenario.name,
                scenario.broken,
                scenario.promised,
                time.monotonic() - began,
                not_tested=str(reason),
            )
        except Exception as error:
            # The others are played all the same; and who cannot finish has not seen a promise hold.
            return Finding(
                scenario.name,
                scenario.broken,
                scenario.promised,
                time.monotonic() - began,
                (none("errors that kept the scenario from its end", 1),),
                complaint=f"{type(error).__name__}: {error}",
            )
    return finding(scenario, seen, time.monotonic() - began)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos", description="Break a server on purpose, and see whether its promises hold."
    )
    parser.add_argument(
        "scenario",
        nargs="*",
        choices=[*ALL, []],
        metavar="SCENARIO",
        help="what to play  [default: everything]",
    )
    parser.add_argument("--list", action="store_true", help="name the scenarios, and play nothing")
    parser.add_argument(
        "--seconds", type=float, help="of load while something is broken, about  [default: 10; --quick: 2]"
    )
    parser.add_argument("--quick", action="store_true", help="everything once, in minutes on two cores")
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="times and sizes that are over their limits, but not far, are told and do not count for the exit status:"
        " other programs have a part in them; what is wrong, lost or refused counts",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument(
        "--out", type=Path, help="folder to write to  [default: docs; --quick, --json: nothing is written]"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
