"""What one version did in one front, as those who judge it want to know: failures, latency, predictions by segment.

Versions get keys by lot, and each key with all its requests. So the unit of all that is compared is the key, not the
request: what repeats says nothing new of the version, and one key that many ask for, and that always fails, would make
two equal versions look different. A key counts once:

- latency and output by the answer to its first request;
- its failure by its first request, apart from that by its 10th, by its 100th and so on (`TURNS`): a key that is asked
  again after it failed adds nothing until then, and what fails only now and then, or only later, is still found. Each
  of these is a comparison of its own.

A key counts for the version that it came to first. Where the shares of the versions change, all keys begin anew, for
both: a key that has moved must be held against one that has stayed, not against those that nobody asked for before.

What few keys cannot say, pairs do (`Observation.paired`): where a version fails a request and the champion answers
the same one, it was not the key.

The hot path only keeps what it has in its hands; the counting is done in bulk (`Observer.fold`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from time import time
from typing import Final
from zlib import crc32

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from parbake.contract.datatypes import INTEGERS, NUMPY
from parbake.contract.model import TensorSpec
from parbake.contract.tensors import Shape, split_bytes
from parbake.runtime.observation import LATENCY_EDGES_MS, MOST_BINS, TURNS, Bins, Observation
from parbake.serving.model import Answer
from parbake.serving.route import Column, Watch, watched, words
from parbake.serving.service import ServedVersion

FOLD_AT: Final = 256
"""Requests after which they are counted."""
_FOLD_ROWS: Final = 16 * 1024
_MOST_SEGMENTS: Final = 32
LONGEST_ID: Final = 200
_MOST_KEYS: Final = 200_000
"""Keys of which is known how often they were asked for; then only every second one is counted."""
_MOST_WAITING: Final = 20_000
"""Predictions that wait to be told on."""


class Foretold(Struct, frozen=True, array_like=True):
    """A prediction that a label may come for."""

    version: str
    id: str
    """Of its request, "" where it had none."""
    row: int
    """Of the request."""
    key: bytes
    segment: str
    value: float | str
    at: float
    """Unix time."""
    shadow: bool = False
    """Whether nobody was answered with it."""


class KeyTurns:
    """How often each key was asked for, in one front; of too many keys a part, by a hash apart from that of the lot.

    ``turn`` is the number of this front and how many there are: each counts its part of the keys.
    """

    def __init__(self, turn: tuple[int, int] = (0, 1)) -> None:
        self._turn = turn
        self._asked: dict[int, int] = {}
        """By hash of the key."""
        self._left_out = 0
        """Bits of which none is set in the hash of a key that counts."""

    def next(self, key: bytes) -> int:
        """The how-manieth request of its key this is; 0 where the key is none of those that count here."""
        number, fronts = self._turn
        if fronts > 1 and crc32(key) % fronts != number:
            return 0
        mark = hash(key)
        if mark & self._left_out:
            return 0
        turn = self._asked.get(mark, 0) + 1
        if turn == 1 and len(self._asked) >= _MOST_KEYS:
            # Nobody is forgotten and counted again: that would be a key that counts twice.
            self._left_out = out = 2 * self._left_out + 1
            self._asked = {mark: turn for mark, turn in self._asked.items() if not mark & out}
            if mark & out:
                return 0
        self._asked[mark] = turn
        return turn


class Observer:
    """Observes one version under one `Watch`.

    ``turns`` counts the requests of each key for all versions that share them out. Raises `InvalidInput` or
    `SettingsError` where the version has no such output or column.
    """

    def __init__(
        self,
        served: ServedVersion,
        watch: Watch,
        bins: Bins,
        *,
        shadow: bool = False,
        turns: KeyTurns,
    ) -> None:
        self._served = served
        self._turns = turns
        self._shadow = shadow
        self._watch = watch
        self._bins = bins
        self._output, self._spec = watched(served.contract, watch.output)
        self._column = Column(served.contract, watch.segment) if watch.segment else None
        self._requests = self._failures = 0
        self._tries: dict[str, tuple[int, int]] = {}
        self._paired = (0, 0)
        self._latency = np.zeros(len(LATENCY_EDGES_MS), np.int64)
        self._outputs: dict[str, npt.NDArray[np.int64]] = {"": np.zeros(bins.count, np.int64)}
        self._segments: dict[bytes, str] = {}
        self._log: list[tuple[float, int, Sequence[bytes], Sequence[Shape], Answer, str, bool]] = []
        self._rows = 0
        self.foretold: deque[Foretold] = deque()
        self.untold = 0
        """Predictions for which there was no room."""

    def look_at(self, served: ServedVersion) -> None:
        """The version was loaded anew."""
        self.fold()
        self._served = served

    def failed(self, key: bytes) -> None:
        """A request of this key was not answered."""
        self._requests += 1
        self._failures += 1
        self._try(key, failed=True)
        if self._shadow:
            self.pair(saved=True)

    def pair(self, *, saved: bool) -> None:
        """A request that the champion is asked too where this version fails it, and whether it was, and answered.

        A shadow is asked what the champion has answered: it counts these by itself, but not what the champion failed.
        """
        self._paired = self._paired[0] + 1, self._paired[1] + saved

    def _try(self, key: bytes, *, failed: bool) -> bool:
        """Count a request where it is one of those of its key that count; whether it is the first."""
        turn = self._turns.next(key)
        name = TURNS.get(turn)
        if name is not None:
            tries, failures = self._tries.get(name, (0, 0))
            self._tries[name] = tries + 1, failures + failed
        return turn == 1

    def answered(
        self,
        seconds: float,
        raws: Sequence[bytes],
        rows: int,
        shapes: Sequence[Shape],
        answer: Answer,
        request_id: str,
        key: bytes,
    ) -> None:
        """A request of this key was answered after so long."""
        if self._shadow:
            self.pair(saved=False)
        self._log.append((seconds, rows, raws, shapes, answer, request_id, self._try(key, failed=False)))
        self._rows += rows
        if len(self._log) >= FOLD_AT or self._rows >= _FOLD_ROWS:
            self.fold()

    def observation(self) -> Observation:
        """All of it until now."""
        self.fold()
        return Observation(
            self._requests,
            self._failures,
            tuple(self._latency.tolist()) if self._latency.any() else (),
            {segment: tuple(counts.tolist()) for segment, counts in self._outputs.items()},
            {},
            dict(self._tries),
            self._paired,
        )

    def fold(self) -> None:
        """Count what has come."""
        noted, self._log, self._rows = self._log, [], 0
        if not noted:
            return
        self._requests += len(noted)
        milliseconds = np.array([item[0] for item in noted if item[-1]]) * 1e3
        self._latency += np.bincount(
            np.searchsorted(LATENCY_EDGES_MS, milliseconds, side="left"), minlength=len(self._latency)
        )
        values: list[float | str] = []
        segments: list[str] = []
        for _, rows, raws, shapes, answer, request_id, first in noted:
            if not first and not self._watch.loss:
                continue
            mine = self._values(answer, rows)
            theirs = self._segments_of(raws, rows if self._watch.loss else 1)
            # Of the rows of a request one is counted: those that came together are not independent.
            if first:
                values.append(mine[0])
                segments.append(theirs[0])
            if self._watch.loss:
                self._foretell(mine, theirs, raws, rows, shapes, request_id)
        if not values:
            return
        places = places_of(self._bins, values)
        self._outputs[""] += np.bincount(places, minlength=self._bins.count)
        for segment in dict.fromkeys(segments):
            if not segment:
                continue
            counts = self._outputs.get(segment)
            if counts is None:
                counts = self._outputs[segment] = np.zeros_like(self._outputs[""])
            inside = np.array([other == segment for other in segments])
            counts += np.bincount(places[inside], minlength=self._bins.count)

    def _values(self, answer: Answer, rows: int) -> list[float | str]:
        """The watched value of each row: a number, or a class in words."""
        raw, spec = answer.raws[self._output], self._spec
        elements = math.prod(answer.shapes[self._output])
        if spec.datatype == "BYTES":
            return [
                text.decode(errors="replace") for text in split_bytes(raw, rows * elements)[:: elements or 1]
            ]
        table = np.frombuffer(raw, NUMPY[spec.datatype]).reshape(rows, elements)
        if not elements:
            return [math.nan] * rows
        if is_distribution(spec):
            labels = spec.labels
            return [labels[i] if i < len(labels) else str(i) for i in table.argmax(axis=1).tolist()]
        column = table[:, min(self._watch.place, elements - 1)].tolist()
        if self._bins.classes:
            return [words(value) for value in column]
        return [float(value) for value in column]

    def _segments_of(self, raws: Sequence[bytes], rows: int) -> list[str]:
        """The segment of each row; "" where it is none of its own."""
        column = self._column
        if column is None:
            return [""] * rows
        found: list[str] = []
        for value in column.each(raws, rows):
            segment = self._segments.get(value)
            if segment is None:
                # Those that came first have one of their own: what callers send must not fill the memory.
                if len(self._segments) >= _MOST_SEGMENTS:
                    segment = ""
                else:
                    segment = self._segments[value] = column.text(value)[:80] if value else ""
            found.append(segment)
        return found

    def _foretell(
        self,
        values: Sequence[float | str],
        segments: Sequence[str],
        raws: Sequence[bytes],
        rows: int,
        shapes: Sequence[Shape],
        request_id: str,
    ) -> None:
        served = self._served
        shapes = tuple(shapes)
        keys = served.keys.of(served.rounded(raws, rows, shapes), rows, shapes)
        now = time()
        # No label can name a longer one.
        request_id = request_id if len(request_id) <= LONGEST_ID else ""
        for row, (key, segment, value) in enumerate(zip(keys, segments, values, strict=True)):
            if len(self.foretold) >= _MOST_WAITING:
                self.untold += 1
                continue
            if isinstance(value, float) and not math.isfinite(value):
                # JSON, by which it is told on, has no such number.
                value = str(value)
            self.foretold.append(
                Foretold(served.version, request_id, row, key, segment, value, now, self._shadow)
            )


def default_bins(spec: TensorSpec, values: Sequence[float | str]) -> Bins:
    """Bins for an output by what it has been: one for each class, or quantiles of the numbers."""
    if is_distribution(spec):
        return Bins.of_classes(spec.labels)
    counted = Counter(map(words, values))
    few = spec.datatype in INTEGERS and len(counted) <= MOST_BINS
    if spec.datatype in ("BYTES", "BOOL") or few:
        return Bins.of_classes(value for value, _ in counted.most_common(MOST_BINS))
    return Bins.of_numbers(map(float, values))


def places_of(bins: Bins, values: Sequence[float | str]) -> npt.NDArray[np.int64]:
    """`Bins.place` of many values."""
    if bins.classes:
        known = {name: place for place, name in enumerate(bins.classes)}
        return np.array([known.get(str(value), len(known)) for value in values], np.int64)
    numbers = np.array(values, np.float64)
    return np.where(
        np.isnan(numbers), bins.count - 1, np.searchsorted(bins.edges, numbers, side="right")
    ).astype(np.int64)


def is_distribution(spec: TensorSpec) -> bool:
    """Whether an output gives a probability for each class."""
    return len(spec.labels) > 1 and spec.fixed and spec.elements == len(spec.labels)
