"""``python -m bench.pace``: how much of what changes from one half second to the next `parbake.runtime.pace` sees.

A server under a steady load is observed in parts of half a second, and so is the pace. Printed is the standard
deviation of the logarithm of its requests per second, as they are and divided by the pace. Parts in which CPU time was
taken from the machine are left out as far as the system tells.

And what that costs: how much longer a model on all CPUs takes while the pace is looked at, in turns of a tenth of a
second with and without. Last, how the pace differs by what runs beside it, in turns of a second.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from bench.load import Load, pouring, put
from bench.network import Rows, packed_network, row_body, rows_of
from bench.processes import with_descendants
from bench.quiet import busy_s
from bench.samples import rows_and_hits
from parbake.app.measure import batch_of, examples_of, quick_table
from parbake.cli.output import emit, emit_table
from parbake.contract.bundle import StoredBundle
from parbake.contract.key import Keys
from parbake.runtime import cpu
from parbake.runtime.pace import Pace
from parbake.runtime.session import Session
from parbake.testing import serving

_WAYS: Final = (
    ("table hits", "static", 0),
    ("dynamic, a model of microseconds", "dynamic", 0),
    ("dynamic, a model of about 1 ms", "dynamic", 6),
)
_ROWS: Final = 5000
_PART_S: Final = 0.5
_MOST_STOLEN: Final = 0.02
"""Share of the CPU time of a part."""
_MODELS: Final = ((6, 1), (6, 8), (80, 1))
"""Convolutions, and the rows that go through them at a time."""
_TURN_S: Final = 0.1
_BATCH: Final = 8
_BESIDE_S: Final = 1.0
_MOST_PROVED: Final = 20
"""Networks of more convolutions are packed without the proof, which would take minutes."""


def main() -> None:
    """Observe each way in turn."""
    parser = argparse.ArgumentParser(prog="python -m bench.pace", description="What the pace explains.")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="of each way, and of each model  [default: 40]"
    )
    seconds: float = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="parbake-pace-") as folder:
        with Pace() as pace:
            lines = [
                (
                    what,
                    *(
                        f"{figure:.3f}"
                        for figure in _spread(Path(folder) / str(at), mode, layers, seconds, pace)
                    ),
                )
                for at, (what, mode, layers) in enumerate(_WAYS)
            ]
        costs = [
            (
                f"{layers} convolutions, {rows} rows at a time",
                f"{_cost(Path(folder), layers, rows, seconds):.3f}",
            )
            for layers, rows in _MODELS
        ]
        with Pace() as pace:
            beside = _beside(Path(folder) / "beside", seconds, pace)
    emit_table(lines, ("way", "as it is", "divided by the pace"), numbers=("as it is", "divided by the pace"))
    emit()
    emit_table(
        costs, ("model on all CPUs", "looked at, in ratio to not"), numbers=("looked at, in ratio to not",)
    )
    emit()
    emit_table(
        [(what, f"{figure:.3f}") for what, figure in beside.items()],
        ("what runs", "pace, in ratio to table hits"),
        numbers=("pace, in ratio to table hits",),
    )
    emit()


def _beside(folder: Path, seconds: float, pace: Pace) -> dict[str, float]:
    """The pace while something runs, in ratio to that a moment before or after beside table hits: medians."""
    rows = rows_of(_ROWS)
    bundle = packed_network(folder, 6, rows[:64])
    examples, session = examples_of(bundle), Session(bundle, threads=cpu.quota())
    raws, bodies = batch_of(examples, _BATCH), tuple(row_body(row) for row in rows)

    def compute() -> None:
        limit = time.monotonic() + _BESIDE_S
        while time.monotonic() < limit:
            session.run_raw(raws, _BATCH, examples.shapes)

    with serving(bundle.path, arguments=_static(bundle, rows)) as server:
        path = f"/v2/models/{bundle.contract.name}/infer"
        load = Load(server.port, path, bodies, tuple(range(_ROWS)), 32, _BESIDE_S, warm_up_s=0.0)
        kinds: dict[str, Callable[[], object]] = {
            "table hits": lambda: put(load),
            "nothing": lambda: time.sleep(_BESIDE_S),
            "a model on all CPUs": compute,
        }
        found: dict[str, list[float]] = {what: [] for what in kinds}
        for _ in range(max(round(seconds / _BESIDE_S), 1)):
            for what, do in kinds.items():
                do()
                ended = time.monotonic()
                # To start the load generator takes a moment.
                found[what].append(pace.between(ended - 0.9 * _BESIDE_S, ended))
    return {
        what: median(one / hits for one, hits in zip(paces, found["table hits"], strict=True))
        for what, paces in found.items()
    }


def _static(bundle: StoredBundle, rows: Rows) -> list[str]:
    """Arguments of a server that answers these rows from a table."""
    table = bundle.path.parent / "all.table"
    hashes = [Keys(bundle.contract).of([row.tobytes()], 1)[0] for row in rows]
    every = cycle(examples_of(bundle).records)
    quick_table(bundle, hashes, [next(every) for _ in hashes], table)
    return ["--mode", "static", "--workers", "1", "--table", str(table)]


def _cost(folder: Path, layers: int, rows: int, seconds: float) -> float:
    """The mean time of a call while the pace is looked at, in ratio to before: the median of all turns."""
    bundle = packed_network(folder / f"{layers}-{rows}", layers, rows_of(8), single=layers > _MOST_PROVED)
    examples, session = examples_of(bundle), Session(bundle, threads=cpu.quota())
    raws = batch_of(examples, rows)
    before = set(with_descendants(os.getpid()))

    def turn(how: signal.Signals) -> float:
        for pacer in pacers:
            os.kill(pacer, how)
        calls, started = 0, time.perf_counter()
        while calls < 1 or time.perf_counter() - started < _TURN_S:
            session.run_raw(raws, rows, examples.shapes)
            calls += 1
        return (time.perf_counter() - started) / calls

    with Pace():
        pacers = set(with_descendants(os.getpid())) - before
        turns = [(turn(signal.SIGSTOP), turn(signal.SIGCONT)) for _ in range(round(seconds / _TURN_S / 2))]
    return median(looked / alone for alone, looked in turns)


def _spread(folder: Path, mode: str, layers: int, seconds: float, pace: Pace) -> tuple[float, float]:
    rows = rows_of(_ROWS)
    bundle = packed_network(folder, layers, rows[:64])
    words = _static(bundle, rows) if mode == "static" else ["--mode", mode, "--workers", "1"]
    bodies = tuple(row_body(row) for row in rows)
    with serving(bundle.path, arguments=words) as server:
        path = f"/v2/models/{bundle.contract.name}/infer"
        seen: list[tuple[float, float, float]] = []
        with pouring(Load(server.port, path, bodies, tuple(range(_ROWS)), 32, seconds=3600.0)):
            time.sleep(2)
            while len(seen) <= seconds / _PART_S:
                seen.append((time.monotonic(), rows_and_hits(server.url)[0], busy_s()[1]))
                time.sleep(_PART_S)
    times, counts, stolen = np.array(seen).T
    paces = pace.of(list(pairwise(times.tolist())))
    kept = np.diff(stolen) <= _MOST_STOLEN * np.diff(times) * (os.cpu_count() or 1)
    rates = (np.diff(counts) / np.diff(times))[kept]
    return float(np.std(np.log(rates))), float(np.std(np.log(rates / paces[kept])))


if __name__ == "__main__":
    main()
