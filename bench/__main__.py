"""``python -m bench [http|head|advise|cold-start|many|size|bake|judge|scale-out|race]... [--quick]``.

Without a name everything but the race, which installs other servers and takes ten minutes, and scale-out, which
needs root, buildah and podman.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench import advise, bench_bake, cold_start, head, http, judge, many, race, scale_out, size
from bench.clients import client
from bench.report import ORDER, Section, keep, show
from parbake.cli.output import emit, say, stages

DOCS: Final = Path(__file__).parents[1] / "docs"
EVERYTHING: Final = tuple(key for key in ORDER if key not in ("race", "scale-out"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; gives the exit status, which says nothing about targets: machines are noisy."""
    options = _options().parse_args(arguments)
    started = time.perf_counter()
    written = options.out or (None if options.quick else DOCS)
    missed = 0
    for key in options.what or EVERYTHING:
        with tempfile.TemporaryDirectory(prefix="parbake-bench-") as folder:
            found = _measure(key, Path(folder), options)
        show(found)
        if written is not None:
            keep(found, written)
        missed += sum(not target.met for target in found.targets)
        sys.stdout.flush()
    emit()
    verdict = f"{missed} targets missed" if missed else "all targets met"
    emit(f"{verdict}; took {time.perf_counter() - started:.0f} s")
    if written is None:
        say("nothing was written: --quick is too short to tell anything")
    else:
        say(f"written: {written}/benchmarks.md and benchmarks.json")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure speed and size on this machine."
    )
    parser.add_argument(
        "what",
        nargs="*",
        choices=[*ORDER, []],
        help="what to measure  [default: everything but the race and scale-out]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="see that it runs: far too short to tell anything"
    )
    parser.add_argument(
        "--client", choices=["auto", "wrk", "own"], default="auto", help="what puts the load on"
    )
    parser.add_argument(
        "--rounds", type=int, help="rounds over HTTP, or of starts  [default: 5; of the race: 3]"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of one measurement over HTTP  [default: 1]"
    )
    parser.add_argument(
        "--peers",
        help="peers that race, by their folders in bench/peers, with commas between  [default: all]",
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to  [default: docs; --quick: nothing is written]"
    )
    return parser


def _measure(key: str, folder: Path, options: argparse.Namespace) -> Section:
    quick: bool = options.quick
    with stages(key) as stage:
        if key == "http":
            return http.run(
                client("own" if quick and options.client == "auto" else options.client),
                folder,
                rounds=1 if quick else options.rounds or 5,
                seconds=0.2 if quick else options.seconds,
                quick=quick,
                say=stage,
            )
        if key == "race":
            return race.run(
                client("own" if quick and options.client == "auto" else options.client),
                folder,
                rounds=1 if quick else options.rounds or 3,
                seconds=0.3 if quick else options.seconds,
                quick=quick,
                peers=None if options.peers is None else options.peers.split(","),
                say=stage,
            )
        if key == "cold-start":
            return cold_start.run(folder, starts=1 if quick else 5, say=stage)
        if key == "head":
            return head.run(
                client("own" if quick and options.client == "auto" else options.client),
                folder,
                rounds=1 if quick else options.rounds or 5,
                seconds=0.5 if quick else 5.0,
                quick=quick,
                say=stage,
            )
        if key == "advise":
            return advise.run(
                folder,
                seconds=0.5 if quick else 3.0,
                rounds=1 if quick else options.rounds or 4,
                quick=quick,
                say=stage,
            )
        if key == "many":
            return many.run(folder, models=50 if quick else 1000, quick=quick, say=stage)
        if key == "judge":
            return judge.run(quick=quick, say=stage)
        if key == "scale-out":
            return scale_out.run(folder, starts=1 if quick else options.rounds or 5, quick=quick, say=stage)
        if key == "size":
            return size.run(folder, install=not quick, say=stage)
        return bench_bake.run(
            folder, rows=20_000 if quick else bench_bake.ROWS, rounds=1 if quick else 5, say=stage
        )


if __name__ == "__main__":
    raise SystemExit(main())
