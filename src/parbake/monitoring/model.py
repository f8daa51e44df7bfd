"""What the prediction log and the traffic profile are made of: options, counters and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

InputsMode = Literal["off", "hashed", "plain"]

OK: Final = "ok"
"""Status of a row that was answered."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How the prediction log is written.

    ``inputs``: ``off`` leaves them out, ``plain`` keeps the raw bytes of each input, ``hashed`` keeps a keyed
    hash of each (BLAKE2b with a secret that stays in the log's folder) and hashes the row's key the same way:
    the bare key is an unkeyed hash of the inputs, so that who can guess an input could look it up.
    """

    rate: float = 1.0
    """Share of the keys that are kept, 0 to 1. A key is kept with all its rows or not at all."""
    inputs: InputsMode = "off"
    outputs: bool = False
    file_bytes: int = 64 * 1024 * 1024
    """A file is finished when it has grown to this size."""
    file_age_s: float = 3600.0
    """A file is finished when its first row is this old."""
    keep_bytes: int = 4 * 1024 * 1024 * 1024
    """All files together; the oldest finished ones are removed beyond it."""
    keep_age_s: float = 30 * 24 * 3600.0
    """Finished files are removed when they are this old."""
    front: int = 0
    """Number of the front that writes, part of the files' names."""


@dataclass(frozen=True, slots=True)
class LogCounts:
    """What became of the rows that one process gave to its log, and what the log takes on disk."""

    written: int = 0
    sampled_out: int = 0
    """Rows left out on purpose, because their key is not in the sample."""
    dropped_ring: int = 0
    """Rows that came while the ring was full."""
    dropped_disk: int = 0
    """Rows that could not be written."""
    files: int = 0
    """Files of the log's folder, of all writers, when it was last looked at."""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the range that holds the truth in 95 of 100 cases; a range of no width is exact."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of the coverage curve: the share of all requests that the ``keys`` most asked-for keys make up."""

    keys: int
    share: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """The traffic of one deployment in figures; see `parbake.monitoring.profile` for how they are estimated."""

    requests: int
    cardinality: Estimate
    """Distinct keys."""
    peakedness: float
    """0: every key is asked for equally often (but for chance); 1: one key is all that matters."""
    first_touch_share: float
    """Share of requests that were the first for their key: what no table learned from traffic can answer."""
    curve: tuple[CurvePoint, ...]
    rate_per_s: float
    """Requests per second over the last window that is complete, or over what there is; 0 if times are unknown."""
    turnover: float | None
    """Share of the head's weight that left the head from one window to the next, averaged; None before two windows."""
    head_error: float
    """The most by which the share of any one key can be wrong."""
    unseen_share: float = 0.0
    """Chance that the next request is for a key that never came: the share of the keys that came once (I. J. Good,
    "The population frequencies of species and the estimation of population parameters", Biometrika 1953)."""

    def share_of(self, keys: float) -> float:
        """Coverage of the top ``keys`` keys, read from the curve (linear in between)."""
        before_keys, before_share = 0.0, 0.0
        for point in self.curve:
            if keys <= point.keys:
                part = (keys - before_keys) / (point.keys - before_keys)
                return before_share + part * (point.share - before_share)
            before_keys, before_share = point.keys, point.share
        return before_share
