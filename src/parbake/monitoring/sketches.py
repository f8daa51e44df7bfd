"""Summaries of a stream of keys that stay small and can be merged: frequent keys, and a sample of whole keys.

Keys are 64-bit integers that look random (the first half of a key, which is a hash). Batches come as sorted
arrays of distinct keys with their counts, so that everything is done by numpy, per batch and not per request.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]

NO_IDS: Final[Ids] = np.empty(0, np.uint64)
NO_COUNTS: Final[Counts] = np.empty(0, np.int64)


def places_of(ids: Ids, wanted: Ids) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Where each of ``wanted`` stands in the sorted ``ids``, and whether it is there at all."""
    if not len(ids):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
    places = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return places, ids[places] == wanted


class FrequentKeys:
    """The most frequent keys of a stream with a lower and an upper bound for the count of each.

    Space-Saving (Metwally, Agrawal, El Abbadi, "Efficient computation of frequent and top-k elements in data
    streams", ICDT 2005), a batch at a time and with the error of each key by itself. A key has been seen
    ``seen`` times since it is tracked, and at most ``missed`` times before. A key that is not tracked came at
    most `floor` times, and ``floor <= total / capacity``. Merging keeps that bound (Agarwal et al., "Mergeable
    summaries", PODS 2012).
    """

    __slots__ = ("capacity", "floor", "ids", "missed", "seen", "total")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids = NO_IDS
        """Tracked keys, ascending."""
        self.seen = NO_COUNTS
        self.missed = NO_COUNTS
        self.floor = 0
        self.total = 0

    def add(self, ids: Ids, counts: Counts) -> Ids:
        """Count a batch: distinct keys, ascending, and how often each came. Returns those that were not tracked."""
        self.total += int(counts.sum())
        places, known = places_of(self.ids, ids)
        # Distinct keys have distinct places, so that no addition is lost.
        self.seen[places[known]] += counts[known]
        new = ids[~known]
        if len(new):
            self._insert(new, counts[~known], np.full(len(new), self.floor, np.int64))
        return new

    def merge(self, other: FrequentKeys) -> None:
        """Count what the other has counted."""
        places, known = places_of(self.ids, other.ids)
        missed = self.missed + other.floor
        missed[places[known]] += other.missed[known] - other.floor
        self.missed = missed
        self.seen = self.seen.copy()
        self.seen[places[known]] += other.seen[known]
        own_floor = self.floor
        self.floor += other.floor
        self.total += other.total
        self._insert(other.ids[~known], other.seen[~known], other.missed[~known] + own_floor)

    def top(self, count: int) -> tuple[Ids, Counts]:
        """The ``count`` keys with the largest estimates (all, if there are fewer), and the estimates."""
        estimates = self.seen + self.missed // 2
        order = np.argsort(-estimates, kind="stable")[:count]
        return self.ids[order], estimates[order]

    def _insert(self, ids: Ids, seen: Counts, missed: Counts) -> None:
        ids = np.concatenate([self.ids, ids])
        seen = np.concatenate([self.seen, seen])
        missed = np.concatenate([self.missed, missed])
        if len(ids) > self.capacity:
            upper = seen + missed
            # Of two equals the one that is known better stays.
            rank = upper * 2 - (missed > 0)
            out = np.argpartition(rank, len(ids) - self.capacity - 1)[: len(ids) - self.capacity]
            self.floor = max(self.floor, int(upper[out].max()))
            kept = np.ones(len(ids), np.bool_)
            kept[out] = False
            ids, seen, missed = ids[kept], seen[kept], missed[kept]
        order = np.argsort(ids, kind="stable")
        self.ids, self.seen, self.missed = ids[order], seen[order], missed[order]


class KeySample:
    """The exact counts of those keys that are below a limit, which falls so that at most ``capacity`` remain.

    Distinct sampling (Gibbons, "Distinct sampling for highly-accurate answers to distinct values queries and
    event reports", VLDB 2001): since keys are hashes, the sample is uniform over the distinct keys however often
    each came, so that it shows the tail of the distribution. Whole keys: what is in the sample was counted from its
    first request on. The sample of two merged streams is that of the streams one after the other.
    """

    __slots__ = ("capacity", "counts", "ids", "limit")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.ids = NO_IDS
        """Sampled keys, ascending."""
        self.counts = NO_COUNTS
        self.limit: int = 1 << 64
        """Keys below it are in the sample, with all their requests."""

    @property
    def share(self) -> float:
        """Share of the distinct keys that are in the sample."""
        return self.limit / 2.0**64

    def add(self, ids: Ids, counts: Counts) -> None:
        """Count a batch: distinct keys, ascending, and how often each came."""
        if self.limit < 1 << 64:
            # Ascending, so that what is below the limit is what comes first.
            cut = int(np.searchsorted(ids, np.uint64(self.limit)))
            ids, counts = ids[:cut], counts[:cut]
        places, known = places_of(self.ids, ids)
        self.counts[places[known]] += counts[known]
        new = ~known
        if new.any():
            merged = np.concatenate([self.ids, ids[new]])
            order = np.argsort(merged, kind="stable")
            self.ids = merged[order]
            self.counts = np.concatenate([self.counts, counts[new]])[order]
            self._shrink()

    def merge(self, other: KeySample) -> None:
        """Count what the other has counted."""
        if other.limit < self.limit:
            self.limit = other.limit
            self._cut()
        self.counts = self.counts.copy()
        self.add(other.ids, other.counts)

    def _shrink(self) -> None:
        if len(self.ids) > self.capacity:
            self.limit = int(self.ids[self.capacity])
            self._cut()

    def _cut(self) -> None:
        if self.limit < 1 << 64:
            cut = int(np.searchsorted(self.ids, np.uint64(self.limit)))
            self.ids, self.counts = self.ids[:cut].copy(), self.counts[:cut].copy()
