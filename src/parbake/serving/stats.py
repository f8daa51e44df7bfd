"""Count what one served version answers, cheaply: a tuple per request, summed up when somebody asks.

Histograms use the upper bounds in `BOUNDS_S` (seconds) and `BATCH_BOUNDS` (rows); the last bucket is
everything above.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from msgspec import Struct

BOUNDS_S: Final = (
    0.00001, 0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005,
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
BATCH_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STAGES: Final = ("parse", "queue", "model", "total")

FOLD_AT: Final = 6 * 1024
"""Length of `Stats.log` at which it is summed up."""


class Histogram(Struct):
    """Counts per bucket (one more than bounds) and the sum of all values."""

    counts: list[int]
    sum: float = 0.0

    def add(self, other: Histogram) -> None:
        """Add another's counts to these."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Counts(Struct):
    """What has been counted so far; can be added up over fronts."""

    stages: dict[str, Histogram]
    batches: Histogram
    outcomes: dict[str, int] = {}
    """Requests by outcome: ``ok`` or the code of the error."""
    rescued: dict[str, int] = {}
    """Requests that the fallback answered, by the code of the error that they would have got; they are ``ok``."""
    rows: int = 0
    baked_rows: int = 0
    executions: int = 0
    """Batches that the model ran."""
    last_ms: int = 0
    """Unix time of the last request in milliseconds."""

    def add(self, other: Counts) -> None:
        """Add another's counts to these."""
        for name, histogram in other.stages.items():
            self.stages[name].add(histogram)
        self.batches.add(other.batches)
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        for code, count in other.rescued.items():
            self.rescued[code] = self.rescued.get(code, 0) + count
        self.rows += other.rows
        self.baked_rows += other.baked_rows
        self.executions += other.executions
        self.last_ms = max(self.last_ms, other.last_ms)


def no_counts() -> Counts:
    """Counts of nothing."""
    return Counts(
        stages={name: Histogram([0] * (len(BOUNDS_S) + 1)) for name in STAGES},
        batches=Histogram([0] * (len(BATCH_BOUNDS) + 1)),
        outcomes={},
        rescued={},
    )


class Stats:
    """Collects for one served version in one front."""

    __slots__ = ("_batches", "_counts", "_recent", "log")

    def __init__(self) -> None:
        self._counts = no_counts()
        # Six numbers per request, one after another: a flat list is the quickest to fill and to sum up.
        self.log: list[float] = []
        self._batches: list[tuple[int, float]] = []
        self._recent = False
        """Whether anything has been summed up since somebody last asked."""

    def answered(
        self, parse_s: float, queue_s: float, model_s: float, total_s: float, rows: int, baked_rows: int
    ) -> None:
        """One request was answered. ``model_s`` is 0 where the table answered all rows."""
        self.log += (parse_s, queue_s, model_s, total_s, rows, baked_rows)
        self.settle()

    def settle(self) -> None:
        """Sum up, if `log` has grown long."""
        if len(self.log) >= FOLD_AT:
            self.fold()

    def refused(self, code: str) -> None:
        """One request was answered with an error."""
        outcomes = self._counts.outcomes
        outcomes[code] = outcomes.get(code, 0) + 1

    def rescued(self, code: str) -> None:
        """One request was answered by the fallback."""
        rescued = self._counts.rescued
        rescued[code] = rescued.get(code, 0) + 1

    def batch(self, rows: int, seconds: float) -> None:
        """The model ran one batch."""
        self._batches.append((rows, seconds))
        if len(self._batches) >= FOLD_AT:
            self.fold()

    @property
    def asked(self) -> bool:
        """Whether there is anything to count."""
        counts = self._counts
        return bool(self.log or self._batches or counts.outcomes or counts.executions or counts.rescued)

    def counts(self, now_ms: int) -> Counts:
        """All counts until now."""
        self.fold()
        if self._recent:
            self._counts.last_ms = now_ms
        self._recent = False
        return self._counts

    def fold(self) -> None:
        """Sum up what has come."""
        counts = self._counts
        if self.log:
            # By way of struct, which takes in a list three times as fast as numpy does.
            table = np.frombuffer(struct.pack(f"{len(self.log)}d", *self.log)).reshape(-1, 6)
            self.log.clear()
            self._recent = True
            for column, name in enumerate(STAGES):
                values = table[:, column]
                if name in ("queue", "model"):
                    # Rows from the table never met the model: they have no such stage.
                    values = values[table[:, 2] > 0]
                _tally(counts.stages[name], values, BOUNDS_S)
            counts.outcomes["ok"] = counts.outcomes.get("ok", 0) + len(table)
            counts.rows += int(table[:, 4].sum())
            counts.baked_rows += int(table[:, 5].sum())
        if self._batches:
            batches = np.array(self._batches)
            self._batches.clear()
            _tally(counts.batches, batches[:, 0], BATCH_BOUNDS)
            counts.executions += len(batches)


def _tally(histogram: Histogram, values: np.ndarray, bounds: tuple[float, ...]) -> None:
    places = np.searchsorted(bounds, values, side="left")
    found = np.bincount(places, minlength=len(bounds) + 1)
    histogram.counts = [int(a + b) for a, b in zip(histogram.counts, found, strict=True)]
    histogram.sum += float(values.sum())
