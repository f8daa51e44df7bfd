"""Traffic to replay: the traces of a shop where they are there, else made up with a fixed seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from parbake.monitoring.trace import read_trace, shifting_keys, zipf_keys

TRACES: Final = Path(__file__).parents[2] / "shared" / "traces"


@dataclass(frozen=True, slots=True)
class Trace:
    """Keys in the order in which they were asked for, numbered from 0 in the order of their first request."""

    name: str
    keys: tuple[int, ...]

    @property
    def distinct(self) -> int:
        """Number of different keys."""
        return max(self.keys) + 1


def real() -> tuple[Trace, ...]:
    """The traces of a shop's pages (cache2k's web12 and web07); none where they are not there."""
    paths = [TRACES / f"{name}.trace.xz" for name in ("web12", "web07")]
    return tuple(_trace(path.name.partition(".")[0], read_trace(path)) for path in paths if path.exists())


def generated() -> tuple[Trace, ...]:
    """Zipf traffic with a constant head, and with one that moves; always the same."""
    return (
        _trace("zipf", zipf_keys(1.0, 15_000, 80_000)),
        _trace("shifting head", shifting_keys(1.0, 10_000, 80_000, every=2000, share=0.02)),
    )


def _trace(name: str, ids: np.ndarray) -> Trace:
    _, first, places = np.unique(ids, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return Trace(name, tuple(number[places].tolist()))
