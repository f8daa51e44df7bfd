"""Bake rows of the learned head by the model: before a version takes traffic, and in idle moments while it serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from parbake.contract.model import Contract
from parbake.errors import ParbakeError
from parbake.runtime.batcher import Batcher, Job
from parbake.serving.head import Head, Row
from parbake.serving.service import ServedVersion

_SLICE_S: Final = 0.005
"""About the longest that a request has to wait for rows that nobody asked for yet."""
_MOST_ROWS: Final = 256
_LEFT_S: Final = 30.0
"""Deadline of such rows."""
_STEP: Final = 500
"""Rows that are handled at once while requests are answered."""
_GIVE_UP_AFTER: Final = 3
"""Slices in a row of which no row could be computed."""

Item = tuple[bytes, Row]


def takes(contract: Contract, other: Contract) -> bool:
    """Whether rows of one contract are rows of the other."""
    return [(s.name, s.datatype, s.shape) for s in contract.inputs] == [
        (s.name, s.datatype, s.shape) for s in other.inputs
    ]


async def succeed(served: ServedVersion, before: ServedVersion) -> list[Item]:
    """Give a version what the one before it knows of the traffic; gives the rows to bake, the hottest first.

    Where both are the same bundle the records go over as they are, and nothing is left to bake.
    """
    head, old = served.head, before.head
    if head is None or old is None or not takes(served.contract, before.contract):
        return []
    # Requests are answered in between: each step is short.
    for _ in head.take_over(old):
        await asyncio.sleep(0)
    items = old.hottest()
    if served.digest != before.digest:
        # The same rows have the same keys as long as the contract makes keys in the same way.
        renamed: list[Item] = []
        for number, (_, row) in enumerate(items):
            renamed.append((served.head_key(row), row))
            if not number % _STEP:
                await asyncio.sleep(0)
        return renamed
    # In the order of baking, in which they stop being fresh.
    held = [(old.baked_at(key) or 0.0, key, row) for key, row in items]
    for number, (_, key, row) in enumerate(sorted(held, key=lambda item: item[0])):
        record = old.find(key)
        if record is not None:
            head.warm(key, row, record, old.baked_at(key))
        if not number % _STEP:
            await asyncio.sleep(0)
    return []


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

    async def before_traffic(self, items: Sequence[Item], longest_s: float) -> bool:
        """Bake what fits the budget before the version takes traffic; says whether all of it was.

        What is not done in ``longest_s`` is done later, in idle moments.
        """
        self.waiting = list(items[: self._head.most_rows][::-1])
        until = time.monotonic() + longest_s
        while self.waiting and time.monotonic() < until:
            started = time.monotonic()
            if not await self._slice(fresh=True):
                break
            # The version in force has the same processors: leave it half of the time.
            await asyncio.sleep(time.monotonic() - started)
        return not self.waiting

    async def when_idle(self, longest_s: float, within_s: float) -> None:
        """Use idle moments for at most ``longest_s`` seconds.

        For rows that are left from before, and for those that would not be fresh any more in ``within_s`` seconds.
        """
        until = time.monotonic() + longest_s
        while time.monotonic() < until and self._batcher.idle and self._batcher.up:
            if self.waiting:
                done = await self._slice(fresh=True)
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
        taken = [self.waiting.pop() for _ in range(min(rows, len(self.waiting)))]
        finished = asyncio.Event()
        left = len(taken)
        failed = 0

        def done(job: Job) -> None:
            nonlocal left, failed
            if job.error is not None:
                failed += 1
            else:
                record = self._served.records.join(job.out_raws, job.out_shapes)
                row = rows_by_job[id(job)]
                if fresh:
                    self._head.warm(job.key, row, record)
                else:
                    self._head.refresh(job.key, record)
                self.baked += 1
            left -= 1
            if not left:
                finished.set()

        rows_by_job: dict[int, Row] = {}
        jobs: list[Job] = []
        deadline = time.perf_counter() + _LEFT_S
        for key, row in taken:
            job = Job(row.raws, 1, row.shapes, deadline, done)
            job.key = key
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
