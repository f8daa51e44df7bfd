"""``python -m bench.pace``: how much of what changes from one half second to the next `parbake.runtime.pace` sees.

A server under a steady load is observed in parts of half a second, and so is the pace. Printed is the standard
deviation of the logarithm of its requests per second, as they are and divided by the pace. Parts in which CPU time was
taken from the machine are left out as far as the system tells.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import cycle, pairwise
from pathlib import Path
from typing import Final

import numpy as np

from bench.load import Load, pouring
from bench.network import packed_network, row_body, rows_of
from bench.quiet import busy_s
from bench.samples import rows_and_hits
from parbake.app.measure import examples_of, quick_table
from parbake.cli.output import emit, emit_table
from parbake.contract.key import Keys
from parbake.runtime.pace import Pace
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


def main() -> None:
    """Observe each way in turn."""
    parser = argparse.ArgumentParser(prog="python -m bench.pace", description="What the pace explains.")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each way  [default: 40]")
    seconds: float = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="parbake-pace-") as folder, Pace() as pace:
        lines = [
            (
                what,
                *(f"{figure:.3f}" for figure in _spread(Path(folder) / str(at), mode, layers, seconds, pace)),
            )
            for at, (what, mode, layers) in enumerate(_WAYS)
        ]
    emit_table(lines, ("way", "as it is", "divided by the pace"), numbers=("as it is", "divided by the pace"))
    emit()


def _spread(folder: Path, mode: str, layers: int, seconds: float, pace: Pace) -> tuple[float, float]:
    rows = rows_of(_ROWS)
    bundle = packed_network(folder, layers, rows[:64])
    words = ["--mode", mode, "--workers", "1"]
    if mode == "static":
        table = bundle.path.parent / "all.table"
        hashes = [Keys(bundle.contract).of([row.tobytes()], 1)[0] for row in rows]
        every = cycle(examples_of(bundle).records)
        quick_table(bundle, hashes, [next(every) for _ in hashes], table)
        words += ["--table", str(table)]
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
