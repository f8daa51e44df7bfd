"""What the learned head is compared with: LRU, adaptive W-TinyLFU, what is known in hindsight, Belady's bound.

Each function gives the coverage of a trace (keys as integers) under a budget of ``rows``, from a cold start.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from parbake.serving.head import Head, Row

_ROW = Row((b"",), ((0,),))
_NEVER = 1 << 62
_EVERY = 50
"""Requests after which what is held is chosen anew, where hazards are known."""
_AGES = 64
_COUNTS = 20

Numbers = npt.NDArray[np.int64]


def learned(rows: int, trace: Sequence[int]) -> float:
    """The head of hybrid mode itself, offered every answer that it did not have."""
    head = Head(most_rows=rows, most_bytes=1 << 60, clock=lambda: 0.0)
    hits = 0
    for number in trace:
        key = number.to_bytes(16, "little")
        if head.get(key) is not None:
            hits += 1
        else:
            head.store(key, _ROW, b"answer")
    return hits / len(trace)


def lru(rows: int, trace: Sequence[int]) -> float:
    """Least recently used goes first."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        if len(held) >= rows:
            held.popitem(last=False)
        held[key] = None
    return hits / len(trace)


def best_fixed(rows: int, trace: Sequence[int]) -> float:
    """The most asked-for keys of the whole trace, known beforehand; their first touches do not count."""
    return sum(count - 1 for _, count in Counter(trace).most_common(rows)) / len(trace)


def known_hazards(rows: int, trace: Sequence[int]) -> float:
    """What how often and how long ago tell: how likely keys of each class are, measured on the whole trace.

    Classes are by count (each of 1 to 8 on its own, then by half octaves) and by age (half octaves). Every 50 requests
    the keys most likely to come are held, of all that were asked for before, at no cost; those asked for meanwhile too.
    """
    keys = np.array(trace)
    asked, there = np.zeros(_COUNTS * _AGES), np.zeros(_COUNTS * _AGES)
    for at, known, cells in _classes(keys):
        there += np.bincount(cells, minlength=len(there))
        coming = np.isin(known, keys[at : at + _EVERY])
        asked += np.bincount(cells[coming], minlength=len(asked))
    hazards = asked / np.maximum(there, 1)
    hits = 0
    for at, known, cells in _classes(keys):
        held = known
        if len(known) > rows:
            held = known[np.argpartition(-hazards[cells], rows - 1)[:rows]]
        coming = keys[at : at + _EVERY]
        _, first = np.unique(coming, return_index=True)
        # What was asked for just now is held until the next choice.
        hits += len(coming) - len(first) + int(np.isin(coming[first], held).sum())
    return hits / len(keys)


def _classes(keys: Numbers) -> Iterator[tuple[int, Numbers, Numbers]]:
    """Every so often: the number of the next request, the keys asked for before it, and the class of each."""
    count, last = (np.zeros(int(keys.max()) + 1, np.int64) for _ in range(2))
    for at in range(0, len(keys), _EVERY):
        known = np.flatnonzero(count)
        times = count[known]
        often = np.where(times <= 8, times - 1, 2 + 2 * np.log2(times)).astype(np.int64)
        ages = (2 * np.log2(at - last[known])).astype(np.int64)
        yield at, known, np.minimum(often, _COUNTS - 1) * _AGES + np.minimum(ages, _AGES - 1)
        part = keys[at : at + _EVERY]
        np.add.at(count, part, 1)
        last[part] = np.arange(at, at + len(part))


def belady(rows: int, trace: Sequence[int]) -> float:
    """What is asked for again latest goes first, or does not come in: no cache that fills on demand does better.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer" (1966).
    """
    following = [_NEVER] * len(trace)
    last: dict[int, int] = {}
    for at in range(len(trace) - 1, -1, -1):
        following[at] = last.get(trace[at], _NEVER)
        last[trace[at]] = at
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for at, key in enumerate(trace):
        hits += key in held
        if following[at] == _NEVER:
            held.pop(key, None)
            continue
        if key not in held and len(held) >= rows:
            while held.get(farthest[0][1]) != -farthest[0][0]:
                heapq.heappop(farthest)
            if -farthest[0][0] <= following[at]:
                continue
            del held[heapq.heappop(farthest)[1]]
        held[key] = following[at]
        heapq.heappush(farthest, (-following[at], key))
    return hits / len(trace)


def tiny_lfu(rows: int, trace: Sequence[int]) -> float:
    """Adaptive W-TinyLFU: Einziger, Friedman, Manes, "TinyLFU" (2017) and "Adaptive software cache management" (2018).

    With exact counts in place of the sketch, and the hill climber, sample sizes and limits of Caffeine.
    """
    return _TinyLfu(rows).run(trace)


class _TinyLfu:
    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._counts: dict[int, int] = {}
        self._added = 0
        self._sample = 10 * max(rows, 16)
        self._window: OrderedDict[int, None] = OrderedDict()
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()
        self._step = -0.0625 * rows
        self._rate_before = 0.0
        self._hits = self._misses = 0
        self._resize(max(1, rows // 100))

    def run(self, trace: Sequence[int]) -> float:
        hits = 0
        for key in trace:
            self._count(key)
            if key in self._window:
                self._window.move_to_end(key)
            elif key in self._probation:
                del self._probation[key]
                self._protected[key] = None
                self._demote()
            elif key in self._protected:
                self._protected.move_to_end(key)
            else:
                self._misses += 1
                self._window[key] = None
                self._evict()
                self._climb()
                continue
            hits += 1
            self._hits += 1
            self._climb()
        return hits / len(trace)

    def _count(self, key: int) -> None:
        count = self._counts.get(key, 0)
        if count < 15:
            self._counts[key] = count + 1
            self._added += 1
        if self._added >= self._sample:
            self._added //= 2
            self._counts = {key: count // 2 for key, count in self._counts.items() if count > 1}

    def _evict(self) -> None:
        newcomer: int | None = None
        while len(self._window) > self._most_window:
            newcomer, _ = self._window.popitem(last=False)
            self._probation[newcomer] = None
        while len(self._window) + len(self._probation) + len(self._protected) > self._rows:
            part = self._probation or self._protected or self._window
            victim = next(iter(part))
            if newcomer is not None and part is self._probation and newcomer != victim:
                if self._counts.get(newcomer, 0) <= self._counts.get(victim, 0):
                    victim = newcomer
                newcomer = None
            del part[victim]

    def _climb(self) -> None:
        if self._hits + self._misses < self._sample:
            return
        rate = self._hits / (self._hits + self._misses)
        change = rate - self._rate_before
        amount = self._step if change >= 0 else -self._step
        restart = 0.0625 * self._rows * (1 if amount >= 0 else -1)
        self._step = restart if abs(change) >= 0.05 else 0.98 * amount
        self._rate_before = rate
        self._hits = self._misses = 0
        self._resize(max(1, min(int(0.8 * self._rows), self._most_window + int(amount))))
        while len(self._window) > self._most_window:
            key, _ = self._window.popitem(last=False)
            self._probation[key] = None

    def _resize(self, window: int) -> None:
        self._most_window = window
        self._most_protected = int(0.8 * (self._rows - window))
        self._demote()

    def _demote(self) -> None:
        while len(self._protected) > self._most_protected:
            key, _ = self._protected.popitem(last=False)
            self._probation[key] = None
