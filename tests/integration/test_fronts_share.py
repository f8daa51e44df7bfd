"""Fronts share the process of a model: who of them is to blame when it ends, or hangs, over a batch of one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from parbake.contract.bundle import StoredBundle
from parbake.errors import DeadlineExceeded, RunnerDown
from parbake.runtime import marks
from parbake.runtime.backends import RunnerBackend
from parbake.runtime.batcher import Outcome
from parbake.runtime.pool import RunnerPool
from parbake.runtime.rooms import Room
from parbake.runtime.runner import Assignment
from tests.functions import write_function

WEDGED_S = 1.0
SOURCE = """
import os, time
def predict(x):
    if (x == 666).any():
        time.sleep(0.4)
        os._exit(3)
    while (x == 667).any():
        time.sleep(1)
    return x * 2
"""
SLOT = 5
"""In the marks of the room: not the first, so that a mark that went elsewhere shows."""
PLACEMENTS = pytest.mark.parametrize("placement", ["process", "room"])


@asynccontextmanager
async def two_fronts(
    bundle: StoredBundle, placement: str, folder: Path
) -> AsyncIterator[tuple[RunnerBackend, RunnerBackend]]:
    """What two fronts have of one process that runs the model, both connected."""
    pool = RunnerPool(folder)
    room = Room("ours", folder / "room.marks", pool, on_end=lambda room: None, on_uses=lambda uses: None)
    fronts: list[RunnerBackend] = []
    try:
        if placement == "room":
            path, file, slot = str(pool.folder / "model.sock"), Path(room.marks), SLOT
            await room.load(Assignment(str(bundle.path), path, digest=bundle.digest), SLOT)
        else:
            path = (await pool.start(str(bundle.path), digest=bundle.digest, threads=1)).socket
            file, slot = marks.beside(path), 0
        for _ in range(2):
            up = asyncio.Event()
            front = RunnerBackend(
                "function",
                path,
                asyncio.get_running_loop(),
                wedged_s=WEDGED_S,
                on_wedged=lambda asked_at: None,
                at_work=lambda request_id: marks.was_at_work(file, slot, request_id),
            )
            front.watch(on_up=up.set, on_down=lambda: None)
            front.connect()
            fronts.append(front)
            await asyncio.wait_for(up.wait(), 30)
        yield fronts[0], fronts[1]
    finally:
        for front in fronts:
            front.close()
        await room.close()
        await pool.close()


def ask(front: RunnerBackend, *values: float) -> asyncio.Future[Outcome]:
    """Send a batch."""
    done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    rows = np.array([(value, 1) for value in values], np.float32)
    front.run([rows.tobytes()], len(rows), ((2,),), done.set_result)
    return done


async def both(
    fronts: Sequence[RunnerBackend], first: Sequence[float], second: Sequence[float]
) -> tuple[Outcome, Outcome]:
    """What comes of two batches, the second sent while the model is at work on the first."""
    one = ask(fronts[0], *first)
    await asyncio.sleep(0.1)
    other = ask(fronts[1], *second)
    return await one, await other


@PLACEMENTS
def test_a_process_that_ends_had_one_fronts_batch_at_work_and_the_other_was_not_read(
    placement: str, tmp_path: Path
) -> None:
    bundle = write_function(tmp_path, SOURCE)

    async def test() -> None:
        async with two_fronts(bundle, placement, tmp_path) as fronts:
            assert [len(one.raws) for one in await both(fronts, [1], [2, 3])] == [1, 1]
            bad, good = await both(fronts, [666], [1])
        assert isinstance(bad.error, RunnerDown)
        assert isinstance(good.error, RunnerDown)
        # Whoever sends it again, alone and at once, must not be taken for who ended the process.
        assert (bad.unread, good.unread) == (False, True)

    asyncio.run(test())


@PLACEMENTS
def test_who_waits_behind_a_batch_that_hangs_has_no_part_in_it(placement: str, tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SOURCE)

    async def test() -> None:
        async with two_fronts(bundle, placement, tmp_path) as fronts:
            bad, good = await both(fronts, [667], [1])
        assert isinstance(bad.error, DeadlineExceeded)
        assert isinstance(good.error, DeadlineExceeded)
        assert (bad.unread, good.unread) == (False, True)

    asyncio.run(test())
