"""``python -m bench.pages``: how long the two writers of a prediction table take for the same entries."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from parbake.cli.output import emit_table
from parbake.contract.key import KEY_BYTES
from parbake.tables.lmdb import LmdbWriter
from parbake.tables.pages import PageWriter

_ENTRIES = 2_000_000
_RECORD_BYTES = 12
_AT_A_TIME = 100_000
_ROUNDS = 3


def main() -> None:
    """Write both files a few times in turn; the best round of each counts. Nothing is synced."""
    random = np.random.default_rng(0)
    keys = random.integers(0, 256, (_ENTRIES, KEY_BYTES), np.uint8)
    keys = keys[np.argsort(keys.copy().view(">u8")[:, 0])]
    records = random.integers(0, 256, (_ENTRIES, _RECORD_BYTES), np.uint8)
    found: dict[str, list[float]] = {"pages": [], "library": []}
    sizes: dict[str, int] = {}
    for number in range(_ROUNDS):
        for name, times in found.items():
            with tempfile.TemporaryDirectory(prefix=f"parbake-pages-{number}-") as temporary:
                folder = Path(temporary)
                started = time.perf_counter()
                writer = (
                    PageWriter(folder / "data.mdb", _RECORD_BYTES)
                    if name == "pages"
                    else LmdbWriter(folder, 1 << 30)
                )
                for at in range(0, _ENTRIES, _AT_A_TIME):
                    writer.append(keys[at : at + _AT_A_TIME], records[at : at + _AT_A_TIME])
                writer.finish()
                times.append(time.perf_counter() - started)
                sizes[name] = (folder / "data.mdb").stat().st_size
    emit_table(
        [(name, f"{min(times):.2f}", f"{sizes[name] / 1e6:.0f}") for name, times in found.items()],
        ("writer", "seconds", "MB"),
        numbers=("seconds", "MB"),
    )


if __name__ == "__main__":
    main()
