"""What one version of a deployment did, as counts: what those who compare versions go by."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

LATENCY_EDGES_MS: Final = tuple(float(f"{0.05 * 1.2**i:.3g}") for i in range(72))
"""Upper edges of the buckets of latency, a fifth apart; beyond the last there is one more."""


class Bins(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How values are counted: between ``edges``, or each of ``classes`` by itself and all others together."""

    edges: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()


class Observation(Struct, frozen=True):
    """Counts since the beginning, or the increase between two moments."""

    requests: int
    failures: int
    latency: tuple[int, ...]
    """Answered requests by bucket of `LATENCY_EDGES_MS`."""
    outputs: dict[str, tuple[int, ...]]
    """Rows by bin of the watched output, for each segment; "" has all rows."""
    labels: dict[str, tuple[int, float, float]]
    """Number, sum and sum of squares of the losses, for each segment; "" has all."""

    def add(self, other: Observation) -> Observation:
        """The sum of both."""
        return _together(self, other, 1)

    def minus(self, other: Observation) -> Observation:
        """The increase since ``other``."""
        return _together(self, other, -1)


def empty() -> Observation:
    """Nothing yet."""
    return Observation(0, 0, (), {}, {})


def _together(a: Observation, b: Observation, sign: int) -> Observation:
    def counts(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
        size = max(len(one), len(other))
        long, short = (part + (0,) * (size - len(part)) for part in (one, other))
        return tuple(x + sign * y for x, y in zip(long, short, strict=True))

    def labels(segment: str) -> tuple[int, float, float]:
        n, total, squares = a.labels.get(segment, (0, 0.0, 0.0))
        m, other, others = b.labels.get(segment, (0, 0.0, 0.0))
        return n + sign * m, total + sign * other, squares + sign * others

    return Observation(
        a.requests + sign * b.requests,
        a.failures + sign * b.failures,
        counts(a.latency, b.latency),
        {s: counts(a.outputs.get(s, ()), b.outputs.get(s, ())) for s in a.outputs | b.outputs},
        {s: labels(s) for s in a.labels | b.labels},
    )
