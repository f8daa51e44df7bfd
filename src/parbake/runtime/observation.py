"""What one version did in a while, as counts that add up: requests, failures, latencies, outputs, labels."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from msgspec import Struct

_PER_DECADE: Final = 24
"""A bucket is wide by 10.07 %: a margin of 10 % costs one bucket, not two."""
LATENCY_EDGES_MS: Final = (*(10 ** (step / _PER_DECADE - 1) for step in range(6 * _PER_DECADE + 1)), math.inf)
"""Upper edges of the buckets, from 0.1 ms to 100 s; bucket i holds what is above edge i - 1 and at most edge i."""
MOST_BINS: Final = 20

_Value = TypeVar("_Value")

TURNS: Final = {1: "", 10: "10th", 100: "100th", 1000: "1,000th", 10_000: "10,000th", 100_000: "100,000th"}
"""Requests of a key whose failures are held against a version, with what they are called in `Observation.tries`."""

Labels = tuple[int, float, float]
"""How many, sum of their losses, sum of the squares."""


def latency_bucket(ms: float) -> int:
    """The place of a latency in `Observation.latency`; what is no number is as slow as can be."""
    return bisect_left(LATENCY_EDGES_MS, ms) if ms == ms else len(LATENCY_EDGES_MS) - 1


class Observation(Struct, frozen=True):
    """Counts of one version over a while. Values: `add` joins two whiles, `minus` gives the increase since."""

    requests: int = 0
    failures: int = 0
    """Of the requests: those that were answered with a fault of ours."""
    latency: tuple[int, ...] = ()
    """Admitted requests by bucket (`LATENCY_EDGES_MS`), one for each key; () where none was."""
    outputs: dict[str, tuple[int, ...]] = {}
    """Segment to counts by bin of the watched output; "" is everything. Count one row of a key:
    rows that came together, and what repeats, are not independent."""
    labels: dict[str, Labels] = {}
    """Segment to number, sum and sum of squares of the losses; count each within the deployment's bound, and one for
    each key."""
    tries: dict[str, tuple[int, int]] = {}
    """How many keys were asked for, and how many of these requests failed: "" for the first request of each key,
    and by the names in `TURNS` for later ones."""
    paired: tuple[int, int] = (0, 0)
    """Requests that the champion would have been asked in place of this version, had it failed, and those that this
    version failed and the champion answered."""

    def add(self, other: Observation) -> Observation:
        """Both whiles together."""
        return Observation(
            self.requests + other.requests,
            self.failures + other.failures,
            _counts(self.latency, other.latency, 1),
            _joined(self.outputs, other.outputs, _counts, (), 1),
            _joined(self.labels, other.labels, _labels, (0, 0.0, 0.0), 1),
            _joined(self.tries, other.tries, _pairs, (0, 0), 1),
            _pairs(self.paired, other.paired, 1),
        )

    def minus(self, before: Observation) -> Observation:
        """The increase since ``before``. A counter that fell (a process began again) makes it negative: see `fault`."""
        return Observation(
            self.requests - before.requests,
            self.failures - before.failures,
            _counts(self.latency, before.latency, -1),
            _joined(self.outputs, before.outputs, _counts, (), -1),
            _joined(self.labels, before.labels, _labels, (0, 0.0, 0.0), -1),
            _joined(self.tries, before.tries, _pairs, (0, 0), -1),
            _pairs(self.paired, before.paired, -1),
        )

    def fault(self) -> str | None:
        """Why these cannot be counts of anything, or None where they can."""
        if self.requests < 0 or not 0 <= self.failures <= self.requests:
            return f"{self.failures:,} failures of {self.requests:,} requests"
        for tries, failed in (*self.tries.values(), self.paired):
            if not 0 <= failed <= tries:
                return f"{failed:,} failures of {tries:,} keys"
        if any(count < 0 for count in self.latency) or len(self.latency) > len(LATENCY_EDGES_MS):
            return "latency counts that are negative or too many"
        for segment, counts in self.outputs.items():
            if any(count < 0 for count in counts):
                return f"negative counts of outputs in segment {segment!r}"
        for segment, (n, total, squares) in self.labels.items():
            if n < 0 or not (math.isfinite(total) and math.isfinite(squares)) or squares < 0:
                return f"losses that are no numbers in segment {segment!r}"
        return None


def empty() -> Observation:
    """Nothing happened."""
    return Observation()


def _counts(one: tuple[int, ...], other: tuple[int, ...], sign: int) -> tuple[int, ...]:
    size = max(len(one), len(other))
    padded = (*one, *(0,) * (size - len(one)))
    return tuple(a + sign * b for a, b in zip(padded, (*other, *(0,) * (size - len(other))), strict=True))


def _pairs(one: tuple[int, int], other: tuple[int, int], sign: int) -> tuple[int, int]:
    return one[0] + sign * other[0], one[1] + sign * other[1]


def _labels(one: Labels, other: Labels, sign: int) -> Labels:
    return one[0] + sign * other[0], one[1] + sign * other[1], one[2] + sign * other[2]


def _joined(
    one: Mapping[str, _Value],
    other: Mapping[str, _Value],
    join: Callable[[_Value, _Value, int], _Value],
    nothing: _Value,
    sign: int,
) -> dict[str, _Value]:
    return {key: join(one.get(key, nothing), other.get(key, nothing), sign) for key in sorted({*one, *other})}


class Bins(Struct, frozen=True):
    """Where a value of the watched output is counted: by edges or by class; the last bin takes the rest."""

    edges: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()

    @classmethod
    def of_numbers(cls, values: Iterable[float], bins: int = MOST_BINS) -> Bins:
        """Bins that hold about as many of ``values`` each, at most ``bins``; equal values share one."""
        known = sorted(value for value in values if math.isfinite(value))
        bins = min(bins, MOST_BINS)
        return cls(
            edges=tuple(sorted({known[len(known) * k // bins] for k in range(1, bins)} if known else ()))
        )

    @classmethod
    def of_classes(cls, names: Iterable[str]) -> Bins:
        """One bin per class, at most `MOST_BINS`, and one for all others."""
        return cls(classes=tuple(sorted(set(names)))[:MOST_BINS])

    @property
    def count(self) -> int:
        """How many bins there are; numbers have one more, for what is no number."""
        return len(self.classes) + 1 if self.classes else len(self.edges) + 2

    def place(self, value: float | str) -> int:
        """The bin of a value; raises nothing: what fits nowhere is in the last bin."""
        if self.classes:
            at = bisect_left(self.classes, str(value))
            return at if at < len(self.classes) and self.classes[at] == value else len(self.classes)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        return self.count - 1 if math.isnan(number) else bisect_right(self.edges, number)
