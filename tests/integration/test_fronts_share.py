"""Fronts share the process of a model: who of them is to blame when it ends, or hangs, over a batch of one of them."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import uvloop

from parbake.contract.bundle import StoredBundle
from parbake.errors import DeadlineExceeded, ParbakeError, RunnerDown
from parbake.runtime.backends import RunnerBackend
from parbake.runtime.batcher import Outcome
from parbake.runtime.marks import was_at_work
from parbake.runtime.pool import RunnerPool
from parbake.runtime.rooms import Room
from parbake.runtime.runner import Assignment
from parbake.testing import serving
from tests.functions import write_function
from tests.traffic import Noted, answer, infer, once

WEDGED_S = 2.0
SOURCE = """
import os, time
def predict(x):
    if (x >= 666).any():
        open("FOLDER/begun", "w").close()
    while (x == 666).any():
        time.sleep(0.01)
        if os.path.exists("FOLDER/gate"):
            os._exit(3)
    while (x == 667).any():
        time.sleep(1)
    return x * 2
"""
"""666 ends the process when the gate is open, 667 hangs."""
SLOT = 5
"""In the marks of the room: not the first, so that a mark that went elsewhere shows."""
PLACEMENTS = pytest.mark.parametrize(
    "placement",
    [
        pytest.param(
            "process",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what was not read"),
        ),
        "room",
    ],
)


@asynccontextmanager
async def two_fronts(
    bundle: StoredBundle, placement: str, folder: Path
) -> AsyncIterator[tuple[RunnerBackend, RunnerBackend]]:
    """What two fronts have of one process that runs the model, both connected."""
    pool = RunnerPool(folder)
    room = Room("ours", folder / "room.marks", pool, on_end=lambda room: None, on_uses=lambda uses: None)
    fronts: list[RunnerBackend] = []
    at_work: Callable[[int], bool] | None
    try:
        if placement == "room":
            path, at_work = str(pool.folder / "model.sock"), partial(was_at_work, room.marks, SLOT)
            await room.load(Assignment(str(bundle.path), path, digest=bundle.digest), SLOT)
        else:
            path = (await pool.start(str(bundle.path), digest=bundle.digest, threads=1)).socket
            at_work = None
        for _ in range(2):
            up = asyncio.Event()
            front = RunnerBackend(
                "function",
                path,
                asyncio.get_running_loop(),
                wedged_s=WEDGED_S,
                on_wedged=lambda asked_at: None,
                at_work=at_work,
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
    rows = np.ones((len(values), 2), np.float32)
    rows[:, 0] = values
    front.run([rows.tobytes()], len(rows), ((2,),), done.set_result)
    return done


async def both(
    fronts: Sequence[RunnerBackend], value: float, folder: Path, rows: int = 1
) -> tuple[Outcome, Outcome]:
    """What comes of a batch that does harm, and of another front's of so many rows that was sent meanwhile."""
    bad = ask(fronts[0], value)
    async with asyncio.timeout(30):
        while not (folder / "begun").exists():
            await asyncio.sleep(0.01)
    good = ask(fronts[1], *[1] * rows)
    # A room reads what comes while a model is at work.
    await asyncio.sleep(0.05)
    (folder / "gate").touch()
    return await bad, await good


@pytest.mark.parametrize(
    ("value", "error"), [(666, RunnerDown), (667, DeadlineExceeded)], ids=["ends", "hangs"]
)
@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
@PLACEMENTS
def test_of_two_fronts_only_the_one_whose_batch_was_at_work_may_be_to_blame(
    placement: str,
    loop: Callable[[], asyncio.AbstractEventLoop],
    value: float,
    error: type[ParbakeError],
    tmp_path: Path,
) -> None:
    # As in fronts, and the usual loop: each has its own way of saying that a connection is lost.
    bundle = write_function(tmp_path, SOURCE.replace("FOLDER", str(tmp_path)))

    async def test() -> None:
        async with two_fronts(bundle, placement, tmp_path) as fronts:
            for front in fronts:
                answered = await ask(front, 1, 2)
                assert answered.raws == [np.array([(2, 2), (4, 2)], np.float32).tobytes()]
            bad, good = await both(fronts, value, tmp_path)
        assert isinstance(bad.error, error)
        assert isinstance(good.error, error)
        # Whoever sends it again, alone and at once, must not be taken for who ended the process.
        assert (bad.unread, good.unread) == (False, True)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(test())


@pytest.mark.parametrize("placement", ["process", "room"])
def test_a_large_batch_may_have_ended_the_process_that_read_it(placement: str, tmp_path: Path) -> None:
    bundle = write_function(tmp_path, SOURCE.replace("FOLDER", str(tmp_path)))

    async def test() -> None:
        async with two_fronts(bundle, placement, tmp_path) as fronts:
            _, large = await both(fronts, 666, tmp_path, rows=(1 << 24) // 8 + 1)
        assert isinstance(large.error, RunnerDown)
        assert not large.unread

    asyncio.run(test())


def told(url: str, path: str, row: tuple[float, ...]) -> Noted:
    """What comes of a row, asked for again where nobody is there at the moment."""
    ends = time.monotonic() + 60
    while (noted := once(url, path, infer(row))).status == 503 and time.monotonic() < ends:
        assert noted.json()["code"] == "runner_down"
        time.sleep(0.05)
    return noted


@pytest.mark.parametrize("load", ["always", "on-demand"])
def test_a_good_row_of_another_front_is_answered_and_not_quarantined(load: str, tmp_path: Path) -> None:
    source = (
        "import os, time\ndef predict(x):\n    if (x >= 666).any():\n        time.sleep(0.1)\n        os._exit(3)\n"
        "    return x * 2\n"
    )
    bundle = write_function(tmp_path, source)
    path = "/v2/models/function/infer"
    with (
        serving(bundle.path, load=load, workers=2, deadline_ms=30_000) as server,
        ThreadPoolExecutor(2) as two,
    ):
        # Each on a connection of its own: by chance at the same front, or not.
        for number in range(4):
            asked = [(666.0 + number, 1.0), (float(number), 1.0)]
            bad, good = two.map(lambda row: told(server.url, path, row), asked)
            assert (bad.status, bad.json()["code"]) == (422, "row_quarantined")
            assert answer(good) == [2.0 * number, 2.0]
