"""Bake rows of the learned head by the model: before a version takes traffic, and in idle moments while it serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

import numpy as np

from parbake.contract.model import Contract
from parbake.errors import ParbakeError
from parbake.runtime.batcher import Batcher, Job
from parbake.runtime.waiting import LOW
from parbake.serving.head import Head, Row
from parbake.serving.service import ServedVersion

_SLICE_S: Final = 0.005
"""About the longest that a request has to wait for rows that nobody asked for yet."""
_MOST_ROWS: Final = 256
_LEFT_S: Final = 30.0
"""Deadline of such rows."""
_STEP: Final = 500
"""Rows that are handled at once while requests are answered."""
_ENOUGH: Final = 0.98
"""Share of the hits of the head before at which a version may take traffic."""
_PASS_S: Final = 0.5
"""How long is baked before what is missing is looked up again."""
_GIVE_UP_AFTER: Final = 3
"""Slices in a row of which no row could be computed."""

Item = tuple[bytes, Row]


def takes(contract: Contract, other: Contract) -> bool:
    """Whether rows of one contract are rows of the other."""
    return [(s.name, s.datatype, s.shape) for s in contract.inputs] == [
        (s.name, s.datatype, s.shape) for s in other.inputs
    ]


class Handover:
    """What a version that takes over learns from the one before it, while that goes on answering.

    Everything is done in steps, between which requests are answered.
    """

    def __init__(self, served: ServedVersion, head: Head, old: Head, *, same_bundle: bool) -> None:
        self._served = served
        self._head = head
        self._old = old
        self.same_bundle = same_bundle

    async def learn(self) -> None:
        """Take over what is known of the traffic."""
        await self._settle_old()
        for _ in self._head.take_over(self._old):
            await asyncio.sleep(0)

    async def copy(self) -> None:
        """Take over the records as they are: for two versions of the same bundle."""
        old, head = self._old, self._head
        held: list[tuple[float, bytes, Row]] = []
        async for key, row, _ in self._hottest():
            if len(held) >= head.most_rows:
                break
            held.append((old.baked_at(key) or 0.0, key, row))
        # In the order of baking, in which they stop being fresh.
        held.sort(key=lambda item: item[0])
        for number, (baked_at, key, row) in enumerate(held):
            record = old.find(key)
            # One that was baked again meanwhile would stand before older ones.
            if record is not None and (old.baked_at(key) or 0.0) == baked_at:
                head.warm(key, row, record, old.baked_at(key))
            if number % _STEP == _STEP - 1:
                await asyncio.sleep(0)

    async def missing(self) -> tuple[list[Item], float]:
        """The rows that the old head holds now and the new one does not, the hottest first, and its share.

        The share is that of the old head's hits which the new one would have too. What the old one has dropped
        meanwhile is dropped here, to make room.
        """
        head = self._head
        while head.expire(_STEP) == _STEP:
            await asyncio.sleep(0)
        found: list[Item] = []
        held: set[bytes] = set()
        there = whole = 0.0
        async for _, row, hazard in self._hottest():
            if len(held) >= head.most_rows:
                break
            # The same rows have other keys where the contracts make keys in different ways.
            key = self._served.head_key(row)
            held.add(key)
            whole += hazard
            if head.holds(key):
                there += hazard
            else:
                found.append((key, row))
        for number, key in enumerate(head.held()):
            if key not in held:
                head.drop(key)
            if number % _STEP == _STEP - 1:
                await asyncio.sleep(0)
        return found, there / whole if whole else 1.0

    async def _hottest(self) -> AsyncIterator[tuple[bytes, Row, float]]:
        """Keys of the old head with row and hazard, the likeliest to be asked for first."""
        await self._settle_old()
        places, hazards = self._old.hazards()
        order = await asyncio.to_thread(np.argsort, -hazards, kind="stable")
        for start in range(0, len(order), _STEP):
            step = order[start : start + _STEP]
            for place, hazard in zip(places[step].tolist(), hazards[step].tolist(), strict=True):
                held = self._old.at(place)
                if held is not None:
                    yield *held, hazard
            await asyncio.sleep(0)

    async def _settle_old(self) -> None:
        while self._old.settle(_STEP):
            await asyncio.sleep(0)


class Warmer:
    """Bakes the rows of one version in slices that are short enough to go unnoticed."""

    def __init__(self, served: ServedVersion, head: Head, batcher: Batcher) -> None:
        self._served = served
        self._head = head
        self._batcher = batcher
        self._misses = 0
        self.baked = 0
        """Rows baked for which nobody waited."""
        self.waiting: list[Item] = []
        """Rows still to be baked, the hottest last."""

    async def before_traffic(self, handover: Handover, longest_s: float) -> float:
        """Bake what the head before it holds; gives the share of that head's hits which this one has too.

        The traffic moves on meanwhile, so what is missing is looked up again and again, and the hottest of it
        comes first. What is not done in ``longest_s`` is done later, in idle moments.
        """
        until = time.monotonic() + longest_s
        if handover.same_bundle:
            await handover.copy()
        while True:
            looked = time.monotonic()
            missing, share = await handover.missing()
            now = time.monotonic()
            self.waiting = missing[::-1]
            held = self._head.rows
            if share >= _ENOUGH or not missing or now >= until:
                break
            await self._bake_for(min(until - now, max(_PASS_S, 10 * (now - looked))))
            if self._head.rows == held:
                # Nothing more fits, or the model answers none of them.
                break
        await handover.learn()
        return share

    async def _bake_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.waiting:
            started = time.monotonic()
            if started >= until or not await self._slice(fresh=True):
                return
            # The version in force has the same processors: leave it half of the time.
            await asyncio.sleep(time.monotonic() - started)

    async def when_idle(self, longest_s: float, within_s: float) -> None:
        """Use idle moments for at most ``longest_s`` seconds.

        For rows that are left from before, and for those that would not be fresh any more in ``within_s`` seconds.
        """
        until = time.monotonic() + longest_s
        while time.monotonic() < until and self._batcher.idle and self._batcher.up:
            if self.waiting:
                held = self._head.rows
                done = await self._slice(fresh=True)
                if self._head.rows == held:
                    # They were asked for meanwhile, or do not fit any more.
                    self.waiting = [item for item in self.waiting if not self._head.holds(item[0])]
                    if self._head.full:
                        self.waiting = []
            else:
                ageing = self._head.ageing(within_s, self._rows())
                if not ageing:
                    return
                self.waiting = ageing
                done = await self._slice(fresh=False)
                self.waiting = []
            if not done:
                return
            # Whoever came meanwhile goes first.
            await asyncio.sleep(0)

    def _rows(self) -> int:
        cost = self._batcher.cost
        return cost.rows_within(_SLICE_S, _MOST_ROWS) if cost.known else 1

    async def _slice(self, *, fresh: bool) -> bool:
        """Bake some rows; says whether it is worth going on."""
        rows = self._rows()
        taken: list[Item] = []
        while self.waiting and len(taken) < rows:
            item = self.waiting.pop()
            if not fresh or not self._head.holds(item[0]):
                taken.append(item)
        finished = asyncio.Event()
        left = len(taken)
        failed = 0

        def done(job: Job) -> None:
            nonlocal left, failed
            try:
                if job.error is not None:
                    failed += 1
                    return
                record = self._served.records.join(job.out_raws, job.out_shapes)
                if not fresh:
                    self._head.refresh(job.key, record)
                    self.baked += 1
                elif self._head.warm(job.key, rows_by_job[id(job)], record):
                    self.baked += 1
            finally:
                left -= 1
                if not left:
                    finished.set()

        rows_by_job: dict[int, Row] = {}
        jobs: list[Job] = []
        deadline = time.perf_counter() + _LEFT_S
        for key, row in taken:
            job = Job(row.raws, 1, row.shapes, deadline, done)
            job.key = key
            job.belongs("", LOW)
            rows_by_job[id(job)] = row
            jobs.append(job)
        for job in jobs:
            try:
                self._batcher.submit(job)
            except ParbakeError as error:
                job.error = error
                done(job)
        if jobs:
            await finished.wait()
        self._misses = self._misses + 1 if failed == len(jobs) else 0
        return self._misses < _GIVE_UP_AFTER
