"""The learned head of hybrid mode: which keys to keep baked under a budget, learned from the traffic itself.

Whatever the model has just computed may be kept at no cost; the question is which of the keys seen so far will be
asked again soonest. It is answered by counting, not by a rule: keys are put into classes by how often they were
asked for, and by how long ago (in requests) that was last; for each pair of the two is measured how many keys
there were and how many were asked for, which gives the chance of a key to be the next one asked for (its *hazard*,
as in survival analysis). The head holds the keys of the greatest hazard per byte. Traffic where only recency
counts makes this behave like LRU, traffic with a constant head like LFU, and what is between them as it is.

The idea of ranking by the hazard rate is that of Panigrahy et al., "An Analysis of Hit Rates of Caches under
Non-Stationary Traffic" (2022), and of LHD (Beckmann, Chen and Cidon, NSDI 2018), which estimates hits per space
and time from ages; that history is kept for keys that are not (any longer) held is from LRU-K and ARC.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

_CLASSES: Final = 12
"""Classes of how often a key was asked for: 1, 2, 3, 4-5, 6-8, ... in steps of 2^(2/3)."""

_AGES: Final = 48
"""Classes of how long ago it was asked for last: 1, 2-3, 4-7, ... requests."""

_MOST_COUNT: Final = 1024
_CLASS_OF: Final = tuple(min(_CLASSES - 1, int(1.5 * np.log2(max(n, 1)))) for n in range(_MOST_COUNT + 1))

_CENSUS_KEYS: Final = 8192
"""Keys looked at in a census: all, or a sample, so that it takes well below a millisecond."""

_WORTH: Final = 0.1
"""Only keys whose hazard is at least this part of the average over all known keys push others out: below that,
differences are noise, and acting on it loses what a loop through many keys would find again."""

_FIRST_CENSUS: Final = 500
_CENSUS_SHARE: Final = 16
"""A census comes when the requests since the last are this part of all, but not more seldom than ..."""
_LONGEST_CENSUS: Final = 50_000

_KEPT: Final = 0.7
"""Weight of what was measured before, at each census."""

_PRIOR_KEYS: Final = 3.0
"""Weight of the prior, in requests answered."""

_CANDIDATES: Final = 1024
"""Keys of the head that are looked at to find the least useful."""

_KNOWN_PER_ROW: Final = 8
_FEWEST_KNOWN: Final = 65_536
_MOST_KNOWN: Final = 2_000_000
_KNOWN_BYTES: Final = 200
"""What the process spends on what it knows of a key (the key, a dict entry, a place in five arrays)."""
_HISTORY_SHARE: Final = 0.5
"""Most of the memory that may go to what is known of keys."""
_LOOKS: Final = 8
"""Samples in which keys to be forgotten are looked for."""

ENTRY_BYTES: Final = 320
"""What the process spends on a row beside its key, inputs and record (dict entries, object headers)."""

_STEP: Final = 500
"""Keys that are handled at once where nobody waits for it."""
_SETTLED_AT_ONCE: Final = 1024
_BULK: Final = 64
"""From so many requests on it is quicker to take them in by columns than one by one."""
_ORDER_BITS: Final = 20
"""Bits behind a place for where in the part it was asked for."""
_LONGEST_PART: Final = (1 << _ORDER_BITS) - 1
"""At most so many are taken in at once."""
_LOOKED_AT: Final = 5000

Get = Callable[[bytes], bytes | None]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One row's inputs as raw bytes in the contract's order, and their shapes, to bake it again."""

    raws: tuple[bytes, ...]
    shapes: Shapes

    @property
    def bytes(self) -> int:
        """Size of the raw bytes."""
        return sum(map(len, self.raws))


class Head:
    """Records by key, under a budget of rows and bytes; used from one thread.

    ``most_bytes`` is for all of it; what is known of keys that are not held may take half of that. `bytes` is what
    the rows and records take.

    ``below`` is asked for keys that are not held: the prediction table, where there is one. ``freshness_s`` is how
    long a record may be answered, by ``clock`` (seconds, monotonic).
    """

    def __init__(
        self,
        *,
        most_rows: int,
        most_bytes: int,
        clock: Callable[[], float],
        below: Get | None = None,
        freshness_s: float | None = None,
    ) -> None:
        self.most_rows = most_rows
        self.most_bytes = most_bytes
        self.bytes = 0
        self.evicted = 0
        self.refused = 0
        """Answers that were not kept, because nothing held was less likely to be asked for."""
        self.expired = 0
        self.stored = 0
        self.below = below
        self.found_below = 0
        """Requests for keys that are not held and that ``below`` has."""
        self._freshness_s = freshness_s
        self._clock = clock
        self._random = np.random.default_rng(0)
        # In the order of baking, for the sake of expiry.
        self._records: dict[bytes, bytes] = {}
        self._rows: dict[bytes, Row] = {}
        self._baked_at: dict[bytes, float] = {}
        self.find: Get = self._records.get
        """The record that is held for a key, or None (without counting as a request)."""
        self._touched: list[bytes] = []
        self.asked: Callable[[bytes], None] = self._touched.append
        """Notes that a key was asked for that is held, or whose answer is being computed."""
        self.all_asked: Callable[[list[bytes]], None] = self._touched.extend
        """`asked` for each of some keys."""
        # Everything known of keys, held or not, by place.
        self._places: dict[bytes, int] = {}
        self._names: list[bytes] = []
        self._free: list[int] = []
        """Places of keys that were forgotten."""
        self._most_known = max(
            min(
                max(_KNOWN_PER_ROW * most_rows, _FEWEST_KNOWN),
                max(_MOST_KNOWN, 2 * most_rows),
                int(_HISTORY_SHARE * most_bytes) // _KNOWN_BYTES,
            ),
            1,
        )
        self._record_bytes = most_bytes - _KNOWN_BYTES * self._most_known
        """What is left for the rows and their records."""
        self._count = array("H")
        self._last = array("q")
        self._slot = array("q")
        """Where in `_held` a place is, -1 if it is not held."""
        self._held = array("q")
        self._size = array("q")
        """Bytes of each place's entry while it is held."""
        self._now = 0
        self._census_at = _FIRST_CENSUS
        self._census_was = 0
        self._asked = [0] * (_CLASSES * _AGES)
        self._asked_in_bulk = np.zeros(_CLASSES * _AGES, np.int64)
        self._asked_sum = np.zeros(_CLASSES * _AGES)
        self._exposed_sum = np.zeros(_CLASSES * _AGES)
        self._hazards = _prior()
        self._hazard: list[float] = self._hazards.tolist()
        self._candidates: list[int] = []
        self._chosen_at = 0
        self._attempts = 0

    # What requests do ------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Records held."""
        return len(self._records)

    def get(self, key: bytes) -> bytes | None:
        """The record of a key, or None."""
        record = self.find(key)
        if record is not None:
            # Looked at later, in one go.
            self.asked(key)
            return record
        below = self.below
        if below is None:
            return None
        record = below(key)
        if record is not None:
            self.found_below += 1
        return record

    def store(self, key: bytes, row: Row, record: bytes) -> bool:
        """Offer the record that the model just computed for a key; ``row`` is what it was computed from.

        Says whether it is held from now on.
        """
        self.settle(_SETTLED_AT_ONCE)
        place = self._seen(key)
        if self._now >= self._census_at:
            self._census()
        size = _size_of(key, row, record)
        if key in self._records:
            self._replace(place, row, record, size)
            return True
        if not self._make_room(place, size):
            self.refused += 1
            return False
        self._insert(place, row, record, size)
        return True

    # What is done in between -----------------------------------------------------------------------

    def settle(self, most: int | None = None) -> int:
        """Take in requests that were answered from here since the last time, ``most`` at once.

        Gives how many are left.
        """
        touched = self._touched
        while touched:
            part = touched[: _LONGEST_PART if most is None else min(most, _LONGEST_PART)]
            if len(part) < _BULK:
                self._take_in(part)
            else:
                self._take_in_bulk(part)
            # The same list stays: `asked` is bound to it.
            del touched[: len(part)]
            if most is not None:
                break
        return len(touched)

    def expire(self, most: int | None = None) -> int:
        """Drop what is no longer fresh, ``most`` records at once; gives how many those were."""
        if self._freshness_s is None:
            return 0
        stale = list(islice(self._stale(self._clock() - self._freshness_s), most))
        for key in stale:
            self._drop(key)
        self.expired += len(stale)
        return len(stale)

    def ageing(self, within_s: float, rows: int) -> list[tuple[bytes, Row]]:
        """Up to ``rows`` keys, with their rows, whose records stop being fresh in ``within_s`` seconds.

        Of those only the ones that are likelier than the average of the head to be asked for again.
        """
        if self._freshness_s is None or not self._records:
            return []
        self.settle()
        mean = float(np.mean(self._scores(self._sample_held())[0]))
        limit = self._clock() - self._freshness_s + within_s
        found: list[tuple[bytes, Row]] = []
        for key in islice(self._stale(limit), _LOOKED_AT):
            if self._score(self._places[key]) >= mean:
                found.append((key, self._rows[key]))
                if len(found) == rows:
                    break
        return found

    def refresh(self, key: bytes, record: bytes) -> None:
        """Put a newly computed record in place of one that is held; nothing happens if it is not held any more."""
        if key in self._records:
            place = self._places[key]
            row = self._rows[key]
            size = _size_of(key, row, record)
            self._replace(place, row, record, size)

    @property
    def full(self) -> bool:
        """Whether another row of the usual size would not fit."""
        usual = self.bytes // len(self._records) if self._records else ENTRY_BYTES
        return not self._fits(usual)

    def holds(self, key: bytes) -> bool:
        """Whether a record is held (without counting as a request)."""
        return key in self._records

    def hazards(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Places of the keys that are held, and the hazard of each; see `at`."""
        places = np.frombuffer(self._held, dtype=np.int64).copy() if self._held else np.empty(0, np.int64)
        return places, self._scores(places)[0]

    def at(self, place: int) -> tuple[bytes, Row] | None:
        """The key that is held at a place, with its row; None where it was dropped meanwhile."""
        if self._slot[place] < 0:
            return None
        key = self._names[place]
        return key, self._rows[key]

    def own(self, key: bytes) -> bytes:
        """The key as it is kept here: that very object is found more quickly than one that equals it."""
        place = self._places.get(key)
        return key if place is None else self._names[place]

    def held(self) -> list[bytes]:
        """The keys that are held."""
        return list(self._records)

    def drop(self, key: bytes) -> None:
        """Hold the record of a key no longer; what is known of the key stays."""
        if key in self._records:
            self._drop(key)

    def take_over(self, other: Head) -> Iterator[None]:
        """Learn from another head what it knows of the traffic, in steps that each take well below a millisecond.

        Records are not taken over: they may be another bundle's.
        """
        self._now = other._now
        self._asked_sum = other._asked_sum.copy()
        self._exposed_sum = other._exposed_sum.copy()
        self._hazards = other._hazards.copy()
        self._hazard = list(other._hazard)
        self._census_at = other._census_at
        self._census_was = other._census_was
        yield
        # By place, because a copy of the dict would take long.
        for place in range(len(other._names)):
            key = other._names[place]
            if other._places.get(key) != place:
                continue
            mine = self._places.get(key)
            if mine is None and len(self._names) < self._most_known:
                mine = self._place(key)
            if mine is not None:
                self._count[mine] = other._count[place]
                # The other one goes on counting in between.
                self._last[mine] = min(other._last[place], self._now)
            if place % _STEP == _STEP - 1:
                yield

    def baked_at(self, key: bytes) -> float | None:
        """When the record of a key was baked, by the head's clock; None where nothing expires."""
        return self._baked_at.get(key)

    def warm(self, key: bytes, row: Row, record: bytes, baked_at: float | None = None) -> bool:
        """Hold the record of a key that was not asked for just now. Says no where the budget is used up.

        ``baked_at`` is for a record from another head of the same bundle, by the same clock.
        """
        size = _size_of(key, row, record)
        if key in self._records or not self._fits(size):
            return False
        place = self._places.get(key)
        if place is None:
            place = self._place(key)
            self._last[place] = max(self._now - 1, 0)
        self._insert(place, row, record, size)
        if baked_at is not None and self._freshness_s is not None:
            self._baked_at[key] = baked_at
        return True

    # Inside ----------------------------------------------------------------------------------------

    def _seen(self, key: bytes) -> int:
        """Note a request for a key, and give its place."""
        self._now += 1
        now = self._now
        place = self._places.get(key)
        if place is None:
            place = self._place(key)
        else:
            times = self._count[place]
            self._asked[_CLASS_OF[times] * _AGES + (now - self._last[place]).bit_length() - 1] += 1
            if times < _MOST_COUNT:
                self._count[place] = times + 1
        self._last[place] = now
        return place

    def _take_in(self, keys: Sequence[bytes]) -> None:
        """Note requests for keys, one by one."""
        places, last, count = self._places, self._last, self._count
        asked = self._asked
        now = self._now
        for key in keys:
            now += 1
            place = places.get(key)
            if place is None:
                continue
            times = count[place]
            asked[_CLASS_OF[times] * _AGES + (now - last[place]).bit_length() - 1] += 1
            last[place] = now
            if times < _MOST_COUNT:
                count[place] = times + 1
        self._now = now

    def _take_in_bulk(self, keys: Sequence[bytes]) -> None:
        """The same for many, with the requests for one key side by side."""
        found = list(map(self._places.get, keys))
        if None in found:
            found = [-1 if place is None else place for place in found]
        # By way of struct, which takes in a list twice as fast as numpy.
        places = np.frombuffer(struct.pack(f"{len(found)}q", *found), np.int64)
        # Sorted by place, then by moment: as one number, which is several times as quick.
        order = np.sort((places << _ORDER_BITS) + np.arange(len(keys)))
        order = order[np.searchsorted(order, 0) :]
        places, moments = order >> _ORDER_BITS, (order & (1 << _ORDER_BITS) - 1) + (self._now + 1)
        self._now += len(keys)
        if not len(places):
            return
        last, count = np.frombuffer(self._last, np.int64), np.frombuffer(self._count, np.uint16)
        begins = np.flatnonzero(np.diff(places, prepend=-1))
        ends = np.append(begins[1:], len(places)) - 1
        before = np.empty_like(moments)
        before[1:] = moments[:-1]
        before[begins] = last[places[begins]]
        times = np.arange(len(places)) - np.repeat(begins, ends - begins + 1) + count[places]
        ages = np.frexp((moments - before).astype(np.float64))[1] - 1
        cells = _CLASSES_OF[np.minimum(times, _MOST_COUNT)] * _AGES + ages
        self._asked_in_bulk += np.bincount(cells, minlength=_CLASSES * _AGES)
        last[places[ends]] = moments[ends]
        count[places[ends]] = np.minimum(times[ends] + 1, _MOST_COUNT)

    def _place(self, key: bytes) -> int:
        if self._free or len(self._names) >= self._most_known:
            if not self._free:
                self._forget()
            place = self._free.pop()
            self._names[place] = key
            self._count[place] = 1
            self._last[place] = self._now
        else:
            place = len(self._names)
            self._names.append(key)
            self._count.append(1)
            self._last.append(self._now)
            self._slot.append(-1)
            self._size.append(0)
        self._places[key] = place
        return place

    def _forget(self) -> None:
        """Make room for what is new: forget some of the keys that are least likely to be asked for and not held."""
        for _ in range(_LOOKS):
            if self._free:
                break
            sample = np.unique(self._random.integers(0, len(self._names), _CANDIDATES))
            sample = sample[np.frombuffer(self._slot, dtype=np.int64)[sample] < 0]
            scores, places = self._scores(sample)
            least = np.argsort(scores, kind="stable")[: _CANDIDATES // 4]
            self._free = places[least].tolist()
        if not self._free:
            # Nearly all that is known is held.
            self._choose_candidates()
            victim = self._candidates.pop()
            self._drop(self._names[victim])
            self.evicted += 1
            self._free = [victim]
        for place in self._free:
            del self._places[self._names[place]]

    def _census(self) -> None:
        """Measure the hazards anew: what was asked for since the last census, by how many keys could have been."""
        known = len(self._names)
        if known <= _CENSUS_KEYS:
            places, weight = np.arange(known), 1.0
        else:
            places, weight = self._random.integers(0, known, _CENSUS_KEYS), known / _CENSUS_KEYS
        since = self._now - self._census_was
        there = np.bincount(self._cells(places), minlength=_CLASSES * _AGES)
        self._exposed_sum = self._exposed_sum * _KEPT + there * (weight * since)
        self._asked_sum = self._asked_sum * _KEPT + self._asked + self._asked_in_bulk
        self._asked = [0] * (_CLASSES * _AGES)
        self._asked_in_bulk[:] = 0
        prior = _prior()
        self._hazards = (self._asked_sum + _PRIOR_KEYS) / (self._exposed_sum + _PRIOR_KEYS / prior)
        self._hazards = _ahead(self._hazards, float(max(len(self._records), 1)))
        self._hazard = self._hazards.tolist()
        self._census_was = self._now
        self._census_at = self._now + min(max(2 * _FIRST_CENSUS, self._now // _CENSUS_SHARE), _LONGEST_CENSUS)
        self._candidates.clear()

    def _cells(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        count = np.frombuffer(self._count, dtype=np.uint16)[places]
        last = np.frombuffer(self._last, dtype=np.int64)[places]
        age = np.maximum(self._now + 1 - last, 1)
        ages = np.minimum(np.log2(age).astype(np.int64), _AGES - 1)
        cells: npt.NDArray[np.int64] = _CLASSES_OF[count] * _AGES + ages
        return cells

    def _scores(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Hazards of places, and the places."""
        return self._hazards[self._cells(places)], places

    def _score(self, place: int) -> float:
        age = self._now + 1 - self._last[place]
        return self._hazard[_CLASS_OF[self._count[place]] * _AGES + age.bit_length() - 1]

    def _sample_held(self) -> npt.NDArray[np.int64]:
        held = np.frombuffer(self._held, dtype=np.int64)
        if len(held) <= _CANDIDATES:
            return held.copy()
        sample: npt.NDArray[np.int64] = held[self._random.integers(0, len(held), _CANDIDATES)]
        return sample

    def _choose_candidates(self) -> None:
        """Find some of the least useful keys that are held, the least useful last."""
        scores, places = self._scores(self._sample_held())
        sizes = np.frombuffer(self._size, dtype=np.int64)[places]
        per_byte = scores / sizes
        count = max(1, len(places) // 16)
        least = np.argpartition(per_byte, count - 1)[:count]
        self._candidates = places[least[np.argsort(-per_byte[least], kind="stable")]].tolist()
        self._attempts = 4 * count
        self._chosen_at = self._now

    def _fits(self, size: int) -> bool:
        return len(self._records) < self.most_rows and self.bytes + size <= self._record_bytes

    def _make_room(self, place: int, size: int) -> bool:
        """Drop keys until a row of ``size`` bytes fits, as long as they are worth less than it is."""
        if self._fits(size):
            return True
        if size > self._record_bytes or not self.most_rows:
            return False
        worth = self._score(place) / size
        least = _WORTH / len(self._names)
        while not self._fits(size):
            self._attempts -= 1
            if self._attempts <= 0 or not self._candidates:
                self._choose_candidates()
            victim = self._candidates[-1]
            if self._slot[victim] < 0:
                self._candidates.pop()
                continue
            if max(self._score(victim), least) / self._size[victim] >= worth:
                if self._last[victim] > self._chosen_at:
                    # It was asked for since: the next one may be worth less.
                    self._candidates.pop()
                    continue
                return False
            self._candidates.pop()
            self._drop(self._names[victim])
            self.evicted += 1
        return True

    def _insert(self, place: int, row: Row, record: bytes, size: int) -> None:
        # See `own`.
        key = self._names[place]
        self._records[key] = record
        self._rows[key] = row
        if self._freshness_s is not None:
            self._baked_at[key] = self._clock()
        self._slot[place] = len(self._held)
        self._held.append(place)
        self._size[place] = size
        self.bytes += size
        self.stored += 1

    def _replace(self, place: int, row: Row, record: bytes, size: int) -> None:
        key = self._names[place]
        # Taken out first: the dicts are in the order of baking.
        del self._records[key]
        self._records[key] = record
        self._rows[key] = row
        if self._freshness_s is not None:
            self._baked_at.pop(key, None)
            self._baked_at[key] = self._clock()
        self.bytes += size - self._size[place]
        self._size[place] = size

    def _drop(self, key: bytes) -> None:
        place = self._places[key]
        del self._records[key]
        del self._rows[key]
        self._baked_at.pop(key, None)
        at = self._slot[place]
        last = self._held.pop()
        if last != place:
            self._held[at] = last
            self._slot[last] = at
        self._slot[place] = -1
        self.bytes -= self._size[place]
        self._size[place] = 0

    def _stale(self, limit: float) -> Iterator[bytes]:
        """Keys whose records were baked before ``limit``, the oldest first."""
        for key, baked_at in self._baked_at.items():
            if baked_at > limit:
                return
            yield key


_CLASSES_OF: Final = np.array(_CLASS_OF, dtype=np.int64)


def _size_of(key: bytes, row: Row, record: bytes) -> int:
    return ENTRY_BYTES + len(key) + len(record) + row.bytes


def _prior() -> npt.NDArray[np.float64]:
    """What is assumed before anything is measured: in proportion to how often, and to one over how long ago."""
    count = 2.0 ** (np.arange(_CLASSES) / 1.5)
    age = 2.0 ** np.arange(_AGES)
    return np.minimum(count[:, None] / (2 * age[None, :]), 0.5).ravel()


def _ahead(hazards: npt.NDArray[np.float64], requests: float) -> npt.NDArray[np.float64]:
    """The mean hazard over the coming ``requests``, for a key that ages meanwhile."""
    edges = 2.0 ** np.arange(_AGES + 1)
    start = 1.5 * edges[:-1]
    low = np.maximum(edges[None, :-1], start[:, None])
    high = np.minimum(edges[None, 1:], start[:, None] + requests)
    weights = np.maximum(high - low, 0.0) / requests
    mean: npt.NDArray[np.float64] = (hazards.reshape(_CLASSES, _AGES) @ weights.T).ravel()
    return mean
