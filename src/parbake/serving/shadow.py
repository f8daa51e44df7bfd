"""Ask another version what a caller was answered, when nobody is kept waiting by it, and compare.

Copies wait in a short queue behind the answers; what does not fit into it is dropped and counted. They go one at a
time, with the lowest priority, only while no caller waits in front of the model that answers, and take a tenth of the
event loop's time at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import numpy as np
from msgspec import Struct

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY
from parbake.contract.model import Contract
from parbake.contract.tensors import Shape, split_bytes
from parbake.errors import ModelFailed, NotReady, ParbakeError
from parbake.logs import log
from parbake.runtime.batcher import Job, Scheduler
from parbake.runtime.waiting import LOW
from parbake.serving.model import Answer
from parbake.serving.observer import Observer
from parbake.serving.service import ServedVersion

_MOST_COPIES: Final = 256
_MOST_BYTES: Final = 16 * 1024 * 1024
_UNDER_WAY: Final = 8
"""Copies that one version works on at a time."""
_PAUSE_S: Final = 0.001
_BUSY_PAUSE_S: Final = 0.005
_TIMES: Final = 9.0
"""How many times as long as a copy took of the event loop it is left alone afterwards."""
_FAR: Final = 1e100


class ShadowCounts(Struct):
    """What became of the copies for one version, and how its answers compare; can be added up over fronts."""

    asked: int = 0
    """Copies that the version was given."""
    dropped: int = 0
    """Copies that did not fit into the queue, or whose version was gone."""
    answered: int = 0
    failed: int = 0
    """Copies that the version could not answer."""
    rows: int = 0
    """Rows that were compared."""
    same_rows: int = 0
    """Of these, the ones with the same answer, within the tolerance of the champion's contract."""
    values: int = 0
    """Numbers that were compared."""
    difference: float = 0.0
    """Sum of the absolute differences of finite numbers."""
    largest: float = 0.0

    def add(self, other: ShadowCounts) -> None:
        """Add another's counts to these."""
        for name in self.__struct_fields__:
            if name != "largest":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)

    @property
    def agreement(self) -> float | None:
        """Share of the rows with the same answer; None before any was compared."""
        return self.same_rows / self.rows if self.rows else None


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that was answered: its rows, and by whom and how."""

    served: ServedVersion
    """Who is to be asked."""
    raws: Sequence[bytes]
    rows: int
    shapes: tuple[Shape, ...]
    champion: ServedVersion
    answer: Answer
    counts: ShadowCounts
    key: bytes
    """What the versions got it by."""
    observer: Observer | None
    """Told what the version said, and after how many seconds."""

    @property
    def bytes(self) -> int:
        """What it takes in the queue, about."""
        return sum(map(len, self.raws)) + sum(map(len, self.answer.raws))


class Shadows:
    """The queue of one front. Nothing of it ever raises, or touches a caller."""

    def __init__(self, loop: Scheduler) -> None:
        self._loop = loop
        self._queue: deque[Copy] = deque()
        self._bytes = 0
        self._under_way: dict[int, int] = {}
        self._scheduled = False
        self._spent_s = 0.0
        self.closed = False
        """Whether nothing more is asked; those who ask it look here."""

    def offer(self, copy: Copy) -> None:
        """Take a copy, if there is room."""
        if self.closed or len(self._queue) >= _MOST_COPIES or self._bytes + copy.bytes > _MOST_BYTES:
            copy.counts.dropped += 1
            return
        self._queue.append(copy)
        self._bytes += copy.bytes
        if not self._scheduled:
            self._later(_PAUSE_S)

    def close(self) -> None:
        """Ask nobody any more, and let go of what waits."""
        self.closed = True
        for copy in self._queue:
            copy.counts.dropped += 1
        self._queue.clear()
        self._bytes = 0

    def _later(self, delay_s: float) -> None:
        self._scheduled = True
        self._loop.call_later(delay_s, self._next)

    def _next(self) -> None:
        self._scheduled = False
        if not self._queue:
            return
        copy = self._queue[0]
        answering = copy.champion.batcher
        full = self._under_way.get(id(copy.served), 0) >= _UNDER_WAY
        if full or (answering is not None and answering.queued_rows):
            self._later(_BUSY_PAUSE_S)
            return
        self._queue.popleft()
        self._bytes -= copy.bytes
        began = perf_counter()
        self._ask(copy)
        spent_s = perf_counter() - began + self._spent_s
        self._spent_s = 0.0
        if self._queue:
            self._later(max(_PAUSE_S, _TIMES * spent_s))

    def _ask(self, copy: Copy) -> None:
        served = copy.served
        began = perf_counter()
        if served.closed:
            copy.counts.dropped += 1
            return
        copy.counts.asked += 1
        place = id(served)
        self._under_way[place] = self._under_way.get(place, 0) + 1

        def done(result: Answer | ParbakeError) -> None:
            left = self._under_way[place] = self._under_way[place] - 1
            if not left:
                del self._under_way[place]
            ended = perf_counter()
            try:
                observer = copy.observer
                if isinstance(result, ParbakeError):
                    copy.counts.failed += 1
                    if observer is not None:
                        observer.failed(copy.key)
                else:
                    copy.counts.answered += 1
                    if observer is not None:
                        observer.answered(
                            ended - began, copy.raws, copy.rows, copy.shapes, result, "", copy.key
                        )
                    compare(copy.champion.contract, copy.answer, result, copy.counts)
            except Exception:
                log().exception("shadow.not_compared", deployment=served.name, version=served.version)
            self._spent_s += perf_counter() - ended

        try:
            raws = served.rounded(copy.raws, copy.rows, copy.shapes)
            answer = served.baked(raws, copy.rows, copy.shapes)
            if answer is None:
                self._submit(copy, raws, began, done)
                return
        except Exception as error:
            done(
                error if isinstance(error, ParbakeError) else ModelFailed(f"{type(error).__name__}: {error}")
            )
            return
        done(answer)

    def _submit(
        self, copy: Copy, raws: Sequence[bytes], began: float, done: Callable[[Answer | ParbakeError], None]
    ) -> None:
        """Have the model answer, by its batcher alone: no caller's row waits for this one, or is answered with it."""
        served, batcher = copy.served, copy.served.batcher
        if batcher is None:
            raise NotReady(f"model {served.name!r} version {served.version} is not loaded")

        def finished(job: Job) -> None:
            done(job.error or Answer(job.out_raws, job.out_shapes, copy.rows, 0, job.queue_s, job.model_s))

        job = Job(raws, copy.rows, copy.shapes, began + served.deadline_s, finished, self)
        job.belongs("", LOW)
        batcher.submit_at_once(job)


def compare(contract: Contract, ours: Answer, theirs: Answer, counts: ShadowCounts) -> None:
    """Count in which rows two answers agree, and how far their numbers are apart. ``contract`` has the tolerance."""
    rows = min(ours.rows, theirs.rows)
    same = np.ones(rows, bool)
    tolerance = contract.tolerance
    for spec, a, b, one, other in zip(
        contract.outputs, ours.raws, theirs.raws, ours.shapes, theirs.shapes, strict=False
    ):
        if tuple(one) != tuple(other):
            same[:] = False
            continue
        if spec.datatype == "BYTES":
            elements = int(np.prod(one, dtype=np.int64))
            left, right = split_bytes(a, rows * elements), split_bytes(b, rows * elements)
            for row in range(rows):
                part = slice(row * elements, (row + 1) * elements)
                same[row] &= left[part] == right[part]
            continue
        x = np.frombuffer(a, NUMPY[spec.datatype]).reshape(rows, -1)
        y = np.frombuffer(b, NUMPY[spec.datatype]).reshape(rows, -1)
        if spec.datatype in FLOATS:
            same &= np.isclose(y, x, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True).all(axis=1)
        else:
            same &= (x == y).all(axis=1)
        if spec.datatype in FLOATS or spec.datatype in INTEGERS:
            apart = np.abs(x.astype(np.float64) - y.astype(np.float64))
            # Sums of more would be no numbers any more.
            apart = np.minimum(apart[np.isfinite(apart)], _FAR)
            counts.values += apart.size
            counts.difference += float(apart.sum())
            counts.largest = max(counts.largest, float(apart.max(initial=0.0)))
    counts.rows += rows
    counts.same_rows += int(same.sum())
