"""A room as the supervisor holds it: its process may end at any moment, also one that nobody has noticed yet."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from parbake.errors import NotReady, RunnerDown
from parbake.runtime.pool import RunnerPool
from parbake.runtime.rooms import Room
from parbake.runtime.runner import Assignment
from tests.functions import write_scaled


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    # Unless the event loop's own thread was the first to be told its status.
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_load_that_meets_a_process_whose_end_is_not_known_yet_costs_one_try(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 3)

    async def test() -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        pool = RunnerPool(tmp_path)
        ends: list[Room] = []
        room = Room("ours", tmp_path / "room.marks", pool, on_end=ends.append, on_uses=lambda uses: None)
        assignment = Assignment(str(bundle.path), str(pool.folder / "model.sock"), digest=bundle.digest)
        try:
            await room.start()
            first = room.pid
            assert first is not None
            # The system has closed its line then; the event loop, which does nothing meanwhile, does not know.
            _kill(first)
            assert room.pid == first
            with pytest.raises(RunnerDown):
                await room.load(assignment, 0)
            # Whoever tries again at once meets another process.
            await room.load(assignment, 0)
            assert room.pid not in (None, first)
            assert ends == [room]
            gc.collect()
            assert complaints == []
        finally:
            await room.close()
            await pool.close()

    asyncio.run(test())


def test_a_full_disk_refuses_a_model_and_does_not_end_the_room(small_disk: Path, tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 3)

    async def test() -> None:
        pool = RunnerPool(tmp_path)
        room = Room(
            "ours", small_disk / "room.marks", pool, on_end=lambda room: None, on_uses=lambda uses: None
        )
        assignment = Assignment(str(bundle.path), str(pool.folder / "model.sock"), digest=bundle.digest)
        junk = small_disk / "junk"
        try:
            await room.start()
            pid = room.pid
            with suppress(OSError), junk.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
            with pytest.raises(NotReady, match="nothing can be written"):
                await room.load(assignment, 0)
            junk.unlink()
            await room.load(assignment, 0)
            assert room.pid == pid
        finally:
            await room.close()
            await pool.close()

    asyncio.run(test())
