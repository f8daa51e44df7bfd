"""The profile of a deployment's traffic: how many keys, how unevenly asked for, how fast that changes.

**Cardinality** is a HyperLogLog (Flajolet et al. 2007, as Apache DataSketches has it; 1.3 % at 95 % when it was not
merged), and exact while all keys fit the list of frequent keys.

**The coverage curve** is put together from the frequent keys (Space-Saving, counts with bounds) and, for the tail,
from a uniform sample of whole keys (distinct sampling). Its bounds follow from those of the frequent keys, from
those of the cardinality, and from the curve being concave; only the cardinality's are probable and not certain.

**Peakedness** is the Gini coefficient of the requests over the keys that were asked for, twice the area between
the coverage curve and its diagonal, less what chance alone would make of flat traffic::

    peakedness = (G - G0) / (1 - G0), between 0 and 1

where G0 is the Gini coefficient of as many requests spread evenly by chance over keys (Poisson, without the keys
that never came). 0 is flat. The Gini coefficient is the only one of fifteen common measures of concentration that
has all six properties one would ask for (Hurley and Rickard, "Comparing measures of sparsity", IEEE Transactions
on Information Theory 55(10), 2009): among them that it does not change when every key is split into two, which makes it
independent of cardinality, the other axis. By that same property it is not defined for one key alone: that is 1.

**Turnover** is how fast the head changes: the share of the weight of the last window's top keys that are not among
this window's top keys.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from itertools import pairwise
from math import exp, pi, sqrt
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import numpy.typing as npt

from parbake.contract.key import KEY_BYTES
from parbake.monitoring.model import CurvePoint, Estimate, Traffic
from parbake.monitoring.sketches import FrequentKeys, Ids, KeySample

if TYPE_CHECKING:
    from datasketches import hll_sketch

HEAD_CAPACITY: Final = 8192
SAMPLE_CAPACITY: Final = 3072
LG_REGISTERS: Final = 14
WINDOW_CAPACITY: Final = 512
TURNOVER_KEYS: Final = 100
"""Size of the head that turnover looks at."""
WINDOWS_KEPT: Final = 6

_FOLD_AT: Final = 64 * 1024
"""Requests that are collected before they are counted, unless somebody asks."""
_MAGIC: Final = b"PBTP"
_FORMAT: Final = 1
_MOST_BYTES: Final = 4 * 1024 * 1024
_MORE_THAN_ONCE: Final = 1.5
_SURE: Final = 0.8
"""Share of a frequent key's count that must be certain for the key to count as head; the others are
estimated from the sample."""

Floats = npt.NDArray[np.float64]


class _Frequent(msgspec.Struct, frozen=True):
    ids: bytes
    seen: bytes
    missed: bytes
    floor: int
    total: int


class _Window(msgspec.Struct, frozen=True):
    index: int
    first_s: float
    last_s: float
    head: _Frequent


class _Stored(msgspec.Struct, frozen=True):
    head: _Frequent
    sample_ids: bytes
    sample_counts: bytes
    sample_limit: int
    distinct: bytes
    merged: bool
    window_s: float
    windows: list[_Window]


class Window:
    """The head of one stretch of time; windows with the same index are the same stretch in every process."""

    __slots__ = ("first_s", "head", "index", "last_s")

    def __init__(self, index: int, first_s: float) -> None:
        self.index = index
        self.first_s = first_s
        self.last_s = first_s
        self.head = FrequentKeys(WINDOW_CAPACITY)


class TrafficProfile:
    """Counts the requests of one deployment in bounded memory; profiles of several fronts or machines can be merged.

    ``window_s`` is the length of the windows in which change is measured, on the clock that `feed` is given.
    Not for several threads at once.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        from datasketches import hll_sketch, tgt_hll_type

        self.window_s = window_s
        self.head = FrequentKeys(HEAD_CAPACITY)
        self.sample = KeySample(SAMPLE_CAPACITY)
        self._distinct: hll_sketch = hll_sketch(LG_REGISTERS, tgt_hll_type.HLL_8)
        self._merged = False
        self.windows: list[Window] = []
        self._pending: list[Ids] = []
        self._pending_rows = 0

    @property
    def requests(self) -> int:
        """Requests counted so far."""
        return self.head.total + self._pending_rows

    def feed(self, keys: Ids, now_s: float) -> None:
        """Count requests that came until ``now_s`` (any clock that does not jump), given as `ids_of` makes them."""
        if not len(keys):
            return
        index = int(now_s // self.window_s)
        if not self.windows or index > self.windows[-1].index:
            self.fold()
            self.windows.append(Window(index, now_s))
            del self.windows[:-WINDOWS_KEPT]
        window = self.windows[-1]
        window.last_s = max(window.last_s, now_s)
        self._pending.append(keys)
        self._pending_rows += len(keys)
        if self._pending_rows >= _FOLD_AT:
            self.fold()

    def fold(self) -> None:
        """Count what has been collected."""
        if not self._pending:
            return
        ids, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending.clear()
        self._pending_rows = 0
        new = self.head.add(ids, counts)
        self.sample.add(ids, counts)
        update = self._distinct.update
        # What is tracked has been counted as distinct before.
        for key in new.view(np.int64).tolist():
            update(key)
        self.windows[-1].head.add(ids, counts)

    def merge(self, other: TrafficProfile) -> None:
        """Count what the other has counted. Windows of the same time are put together."""
        from datasketches import hll_union, tgt_hll_type

        self.fold()
        other.fold()
        if not other.requests:
            return
        if self.requests:
            union = hll_union(LG_REGISTERS)
            union.update(self._distinct)
            union.update(other._distinct)
            self._distinct = union.get_result(tgt_hll_type.HLL_8)
            self._merged = True
        else:
            # A copy: it may go on counting.
            self._distinct = type(other._distinct).deserialize(other._distinct.serialize_compact())
            self._merged = other._merged
        self.head.merge(other.head)
        self.sample.merge(other.sample)
        windows = {window.index: window for window in self.windows}
        for theirs in other.windows:
            mine = windows.get(theirs.index)
            if mine is None:
                mine = windows[theirs.index] = Window(theirs.index, theirs.first_s)
            mine.first_s = min(mine.first_s, theirs.first_s)
            mine.last_s = max(mine.last_s, theirs.last_s)
            mine.head.merge(theirs.head)
        self.windows = sorted(windows.values(), key=lambda window: window.index)[-WINDOWS_KEPT:]

    def cardinality(self) -> Estimate:
        """Distinct keys, at 95 %."""
        self.fold()
        if self.head.floor == 0:
            return Estimate(*[float(len(self.head.ids))] * 3)
        sketch = self._distinct
        least = len(self.head.ids)
        return Estimate(
            max(sketch.get_estimate(), least),
            max(sketch.get_lower_bound(2), least),
            max(sketch.get_upper_bound(2), least),
        )

    def turnover(self) -> float | None:
        """The share of a window's head that is gone in the next, averaged over the windows that are kept.

        The window that is not over yet is left out, unless there are only two.
        """
        self.fold()
        windows = self.windows[:-1] if len(self.windows) > 2 else self.windows
        gone = [_turnover(before.head, after.head) for before, after in pairwise(windows)]
        return sum(gone) / len(gone) if gone else None

    def rate_per_s(self) -> float:
        """Requests per second in the last window that is over, or over all windows where it was long ago."""
        self.fold()
        if len(self.windows) > 2 and self.windows[-1].first_s - self.windows[-2].last_s < self.window_s:
            return self.windows[-2].head.total / self.window_s
        if not self.windows:
            return 0.0
        seconds = self.windows[-1].last_s - self.windows[0].first_s
        return sum(window.head.total for window in self.windows) / seconds if seconds > 0 else 0.0

    def traffic(self) -> Traffic:
        """All figures."""
        self.fold()
        total, distinct = self.head.total, self.cardinality()
        if not total:
            return Traffic(0, distinct, 0.0, 0.0, (), 0.0, None, 0.0)
        values, weights = self._distribution(distinct.value)
        return Traffic(
            requests=total,
            cardinality=distinct,
            peakedness=_peakedness(values, weights, total),
            first_touch_share=min(1.0, distinct.value / total),
            curve=self._curve(values, weights, distinct),
            rate_per_s=self.rate_per_s(),
            turnover=self.turnover(),
            head_error=max(self.head.floor, int(self.head.missed.max(initial=0))) / total,
            unseen_share=min(1.0, float(weights[values < _MORE_THAN_ONCE].sum()) / total),
        )

    def _distribution(self, distinct: float) -> tuple[Floats, Floats]:
        """Requests per key, falling, and how many keys each value stands for (the weights sum to ``distinct``)."""
        head = self.head
        sure = head.seen >= _SURE * (head.seen + head.missed)
        values = (head.seen + head.missed / 2)[sure]
        weights = np.ones(len(values))
        rest, keys = head.total - values.sum(), distinct - len(values)
        if rest > 0 and keys > 0:
            tail = self.sample.counts[~np.isin(self.sample.ids, head.ids[sure])].astype(np.float64)
            if not len(tail):
                tail = np.ones(1)
            # The sample gives the shape of the tail; its weight and its number of keys are known better than that.
            values = np.concatenate([values, tail * (rest / keys / tail.mean())])
            weights = np.concatenate([weights, np.full(len(tail), keys / len(tail))])
        order = np.argsort(-values, kind="stable")
        return values[order], weights[order]

    def _curve(self, values: Floats, weights: Floats, distinct: Estimate) -> tuple[CurvePoint, ...]:
        total = self.head.total
        grid = curve_grid(distinct.value)
        share = np.interp(
            grid,
            np.concatenate([[0], np.cumsum(weights)]),
            np.concatenate([[0], np.cumsum(values * weights)]),
        )
        lower, upper = self._bounds(grid, distinct)
        share = np.clip(share / total, lower, upper)
        share[-1] = 1.0
        share = np.maximum.accumulate(share)
        return tuple(
            CurvePoint(int(n), float(s), float(low), float(up))
            for n, s, low, up in zip(grid, share, lower, np.maximum(upper, share), strict=True)
        )

    def _bounds(self, grid: Floats, distinct: Estimate) -> tuple[Floats, Floats]:
        head, total = self.head, self.head.total
        tracked = len(head.ids)
        certain = np.concatenate([[0], np.cumsum(-np.sort(-head.seen))]) / total
        possible = np.concatenate([[0], np.cumsum(-np.sort(-(head.seen + head.missed)))]) / total
        inside = np.minimum(grid, tracked).astype(np.intp)
        upper = possible[inside] + np.maximum(grid - tracked, 0) * head.floor / total
        # Whatever is not among them came at least once.
        upper = np.minimum(upper, 1 - np.maximum(distinct.lower - grid, 0) / total)
        lower = certain[inside]
        # The curve is concave: it is above the line from any point that is certain to its end.
        end = max(distinct.upper, float(tracked), 1.0)
        corners = np.concatenate([[0], grid[grid < tracked], [tracked]])
        for keys, share in zip(corners, certain[corners.astype(np.intp)], strict=True):
            if keys < end:
                line = share + (1 - share) * np.minimum(1.0, (grid - keys) / (end - keys))
                lower = np.where(grid > keys, np.maximum(lower, line), lower)
        return np.minimum(lower, 1.0), np.clip(upper, np.minimum(lower, 1.0), 1.0)

    def to_bytes(self) -> bytes:
        """All that has been counted, as bytes for another process (at most about 150 KB)."""
        self.fold()
        stored = _Stored(
            head=_store(self.head),
            sample_ids=self.sample.ids.tobytes(),
            sample_counts=self.sample.counts.tobytes(),
            # The limit of a full range does not fit 64 bits.
            sample_limit=self.sample.limit - 1,
            distinct=self._distinct.serialize_compact(),
            merged=self._merged,
            window_s=self.window_s,
            windows=[_Window(w.index, w.first_s, w.last_s, _store(w.head)) for w in self.windows],
        )
        body = zlib.compress(msgspec.msgpack.encode(stored), 1)
        return _MAGIC + struct.pack("<BI", _FORMAT, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> TrafficProfile:
        """A profile as `to_bytes` made it. Raises ValueError for anything else."""
        from datasketches import hll_sketch

        if len(data) < 9 or data[:4] != _MAGIC or data[4] != _FORMAT:
            raise ValueError("these bytes are not a traffic profile that this parbake knows")
        body = data[9:]
        if zlib.crc32(body) != struct.unpack_from("<I", data, 5)[0]:
            raise ValueError("a traffic profile is cut short or altered")
        unpacked = zlib.decompressobj()
        try:
            plain = unpacked.decompress(body, _MOST_BYTES)
            stored = msgspec.msgpack.decode(plain, type=_Stored)
        except (zlib.error, msgspec.MsgspecError) as error:
            raise ValueError(f"a traffic profile cannot be read: {error}") from error
        profile = cls(stored.window_s)
        profile.head = _restore(stored.head, HEAD_CAPACITY)
        profile.sample.ids = np.frombuffer(stored.sample_ids, np.uint64).copy()
        profile.sample.counts = np.frombuffer(stored.sample_counts, np.int64).copy()
        profile.sample.limit = stored.sample_limit + 1
        profile._distinct = hll_sketch.deserialize(stored.distinct)
        profile._merged = stored.merged
        for one in stored.windows[-WINDOWS_KEPT:]:
            window = Window(one.index, one.first_s)
            window.last_s = one.last_s
            window.head = _restore(one.head, WINDOW_CAPACITY)
            profile.windows.append(window)
        return profile


def ids_of(keys: Iterable[bytes] | bytes) -> Ids:
    """Keys (16 bytes each, or all joined) as a profile counts them: the first 8 bytes of each, big-endian."""
    joined = keys if isinstance(keys, bytes) else b"".join(keys)
    if len(joined) % KEY_BYTES:
        raise ValueError(f"a key does not have {KEY_BYTES} bytes")
    return np.frombuffer(joined, ">u8").reshape(-1, 2)[:, 0].astype(np.uint64)


def ids_of_numbers(numbers: npt.NDArray[np.integer]) -> Ids:
    """Numbers as keys: mixed so that they look random (splitmix64, Steele et al. 2014), one to one."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def profile_of(keys: Ids, windows: int = WINDOWS_KEPT) -> TrafficProfile:
    """The profile of a recorded sequence of keys without times: windows are equal parts of it, rates are unknown."""
    profile = TrafficProfile(window_s=1.0)
    for index, part in enumerate(np.array_split(keys, max(1, windows))):
        for chunk in np.array_split(part, max(1, len(part) // _FOLD_AT)):
            profile.feed(chunk, float(index))
    profile.fold()
    return profile


def exact_traffic(keys: Ids) -> Traffic:
    """The figures of a recorded sequence, counted and not estimated (memory for each distinct key)."""
    total = len(keys)
    if not total:
        return Traffic(0, Estimate(0.0, 0.0, 0.0), 0.0, 0.0, (), 0.0, None, 0.0)
    _, counts = np.unique(keys, return_counts=True)
    values = -np.sort(-counts).astype(np.float64)
    distinct = float(len(values))
    grid = curve_grid(distinct)
    shares = np.cumsum(values)[grid.astype(np.intp) - 1] / total
    gone = []
    parts = [_counted(part) for part in np.array_split(keys, WINDOWS_KEPT)] if total >= WINDOWS_KEPT else []
    for before, after in pairwise(parts[:-1]):
        gone.append(_turnover(before, after))
    return Traffic(
        requests=total,
        cardinality=Estimate(distinct, distinct, distinct),
        peakedness=_peakedness(values, np.ones(len(values)), total),
        first_touch_share=distinct / total,
        curve=tuple(
            CurvePoint(int(n), float(s), float(s), float(s)) for n, s in zip(grid, shares, strict=True)
        ),
        rate_per_s=0.0,
        turnover=sum(gone) / len(gone) if gone else None,
        head_error=0.0,
        unseen_share=float((counts == 1).sum()) / total,
    )


def curve_grid(distinct: float) -> Floats:
    """Numbers of keys at which a coverage curve is given: ten to a decade, up to all of them."""
    last = max(1, round(distinct))
    steps = np.unique(np.round(10 ** (np.arange(0, 200) / 10)))
    return np.append(steps[steps < last], float(last))


def _counted(keys: Ids) -> FrequentKeys:
    ids, counts = np.unique(keys, return_counts=True)
    exact = FrequentKeys(max(1, len(ids)))
    exact.add(ids, counts)
    return exact


def _turnover(before: FrequentKeys, after: FrequentKeys) -> float:
    ids, counts = before.top(TURNOVER_KEYS)
    still, _ = after.top(TURNOVER_KEYS)
    weight = int(counts.sum())
    return float(counts[~np.isin(ids, still)].sum() / weight) if weight else 0.0


def _peakedness(values: Floats, weights: Floats, total: int) -> float:
    """See the head of this module; ``values`` falling, ``weights`` keys each."""
    distinct = float(weights.sum())
    if round(distinct) <= 1:
        return 1.0
    by_chance = _gini_of_chance(total / distinct)
    return float(np.clip((_gini(values, weights) - by_chance) / (1 - by_chance), 0.0, 1.0))


def _gini(values: Floats, weights: Floats) -> float:
    """Gini coefficient of ``values`` in falling order, each of ``weights`` keys."""
    shares = np.concatenate([[0.0], np.cumsum(values * weights)])
    keys = weights / weights.sum()
    area = float(((shares[1:] + shares[:-1]) / 2 * keys).sum() / shares[-1])
    return 2 * area - 1


def _gini_of_chance(mean: float) -> float:
    """Gini coefficient of a Poisson number of requests per key, where keys that came have ``mean`` on average."""
    if mean <= 1 + 1e-9:
        return 0.0
    if mean > 10_000:
        # A normal distribution with the same mean and variance.
        return 1 / sqrt(pi * mean)
    low, high = 0.0, mean
    # The mean of a Poisson number that is not zero grows with its rate.
    for _ in range(60):
        rate = (low + high) / 2
        if rate / -np.expm1(-rate) < mean:
            low = rate
        else:
            high = rate
    counts = np.arange(1, int(high + 12 * sqrt(high) + 24), dtype=np.float64)
    logs = counts * np.log(high) - high - np.cumsum(np.log(counts))
    chances = np.exp(logs) / (1 - exp(-high))
    return _gini(counts[::-1], chances[::-1])


def _store(head: FrequentKeys) -> _Frequent:
    return _Frequent(head.ids.tobytes(), head.seen.tobytes(), head.missed.tobytes(), head.floor, head.total)


def _restore(stored: _Frequent, capacity: int) -> FrequentKeys:
    head = FrequentKeys(capacity)
    head.ids = np.frombuffer(stored.ids, np.uint64).copy()
    head.seen = np.frombuffer(stored.seen, np.int64).copy()
    head.missed = np.frombuffer(stored.missed, np.int64).copy()
    if not len(head.ids) == len(head.seen) == len(head.missed) <= capacity:
        raise ValueError("a traffic profile's lists do not fit together")
    head.floor, head.total = stored.floor, stored.total
    return head
