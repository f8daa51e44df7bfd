"""A model that never comes back is found by its deadline, ended, and started again; nobody else waits for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from parbake.contract.bundle import Goldens
from parbake.runtime.pool import RunnerPool
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import Call, Noted, answer, bake_rows, busy, calling, infer, is_there, once, rows, wait_for

SLEEPS = """
import time

def predict(x):
    while (x == 666).any():
        time.sleep(1)
    return x * 2
"""
STUCK = (666.0, 1.0)
WEDGED = "/v2/models/wedged/infer"


def test_a_wedged_runner_is_found_by_its_deadline_and_started_again(tmp_path: Path) -> None:
    x = np.ones((2, 2), np.float32)
    wedged = write_function(tmp_path, SLEEPS, name="wedged", goldens=Goldens({"x": x}, {"y": 2 * x}))
    table = bake_rows(wedged, [(1.0, 2.0)], tmp_path / "wedged.table")
    sound = write_scaled(tmp_path / "sound.bundle", 3, name="sound")
    got: list[Noted] = []
    with (
        serving(
            wedged.path,
            sound.path,
            "--table",
            f"wedged={table}",
            placement="process",
            deadline_ms=1500,
            workers=1,
        ) as server,
        calling(server.url, rows("sound", (1.0, 2.0)), rows("wedged", (1.0, 2.0))) as (other, baked),
    ):
        versions = {v.name: v for v in client.status(port=server.port).versions}
        (pid,) = versions["wedged"].runner_pids

        def ask(row: tuple[float, ...]) -> threading.Thread:
            thread = threading.Thread(target=lambda: got.append(once(server.url, WEDGED, infer(row))))
            thread.start()
            return thread

        # The first batch of this model, and of many rows: nobody knows yet how long those may take.
        threads = [ask(STUCK + (5.0, 6.0) * 9)]
        wait_for(lambda: busy(server.url, WEDGED))
        threads += [ask((8.0, 9.0)), ask((7.0, 7.0))]
        for thread in threads:
            thread.join(60)
        wait_for(lambda: not is_there(pid))
        with Call(server.url) as call:
            wait_for(lambda: call(WEDGED, infer((8, 9))).status == 200)
            assert answer(call(WEDGED, infer((8, 9)))) == [16.0, 18.0]
        versions = {v.name: v for v in client.status(port=server.port).versions}
        assert versions["wedged"].runner_restarts == 1
        assert versions["sound"].runner_restarts == 0
        other.wait(5)
        baked.wait(5)
        log = server.log()
    (after_s,) = (json.loads(line)["after_s"] for line in log.splitlines() if '"runner.wedged"' in line)
    assert 2.0 <= after_s < 2.5
    assert "runner.killed" in log
    # Whoever was in the batch, or behind it, is told, and by its name.
    assert len(got) == 3
    stuck = next(
        noted for noted in got if noted.status == 504 and "did not answer within" in noted.json()["error"]
    )
    assert stuck.json()["code"] == "deadline_exceeded"
    for noted in got:
        assert noted.status in (503, 504), noted
        assert int(noted.headers["retry-after"]) >= 1
    for caller, factor in ((other, 3), (baked, 2)):
        assert {tuple(answer(noted)) for noted in caller.noted} == {(1.0 * factor, 2.0 * factor)}


def test_who_waits_behind_a_long_batch_is_answered_by_his_own_deadline(tmp_path: Path) -> None:
    slow = write_function(
        tmp_path,
        "import time\ndef predict(x):\n    time.sleep(3 * float(x.max() == 666))\n    return x * 2\n",
    )
    path = "/v2/models/function/infer"
    with serving(slow.path, workers=1) as server, Call(server.url) as first, Call(server.url) as second:
        thread = threading.Thread(target=lambda: first(path, infer(STUCK)))
        thread.start()
        wait_for(lambda: busy(server.url, path))
        noted = second(path, infer((1, 2)), {"parbake-deadline-ms": "300"})
        # The batch before it goes on for seconds.
        assert thread.is_alive()
        assert (noted.status, noted.json()["code"]) == (504, "deadline_exceeded")
        thread.join(60)
        assert answer(second(path, infer((1, 2)))) == [2.0, 4.0]


def test_a_runner_that_hangs_while_nobody_asks_is_found_and_replaced(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, "def predict(x):\n    return x * 2\n")
    with serving(bundle.path, workers=2, deadline_ms=500) as server, Call(server.url) as call:
        assert call("/v2/health/ready").status == 200
        (pid,) = client.status(port=server.port).versions[0].runner_pids
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        # Nobody says ready for a model that cannot answer.
        wait_for(lambda: call("/v2/health/ready").status == 503)
        wait_for(lambda: not is_there(pid))
        wait_for(lambda: call("/v2/health/ready").status == 200)
        assert answer(call("/v2/models/function/infer", infer((8, 9)))) == [16.0, 18.0]
        took_s = time.monotonic() - stopped
        (version,) = client.status(port=server.port).versions
        log = server.log()
    assert version.runner_restarts == 1, log
    assert "runner.wedged" in log
    # By its deadline, a probe's time, and a start; not by luck.
    assert took_s < 30


def test_a_report_about_the_process_before_does_not_kill_the_one_in_its_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = write_function(tmp_path, "def predict(x):\n    return x * 2\n")

    async def test() -> None:
        pool = RunnerPool(tmp_path)
        runner = await pool.start(str(bundle.path), digest=bundle.digest, threads=1)
        try:
            asked_at = time.monotonic()
            first = runner.process
            assert first is not None
            pool.kill(runner.socket, asked_at)
            await first.wait()
            while runner.process is None or runner.process is first:
                await asyncio.sleep(0.01)
            second = runner.process
            # The second front found the first process hanging too, and says so now.
            pool.kill(runner.socket, asked_at)
            await asyncio.sleep(0.2)
            assert second.returncode is None
            pool.kill(runner.socket, time.monotonic())
            # 255: somebody else was told its status first, which asyncio's watcher of children takes for unknown.
            assert await second.wait() in (-signal.SIGKILL, 255)
            killed = [line for line in capfd.readouterr().err.splitlines() if '"runner.killed"' in line]
            assert [json.loads(line)["pid"] for line in killed] == [first.pid, second.pid]
        finally:
            await pool.close()

    asyncio.run(test())


def test_a_front_that_hangs_is_replaced(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 3)
    with serving(bundle.path, workers=2) as server:
        first, _ = client.status(port=server.port).front_pids
        os.kill(first, signal.SIGSTOP)
        wait_for(lambda: not is_there(first))
        wait_for(lambda: client.status(port=server.port).front_restarts == 1)
        with Call(server.url) as call:
            assert answer(call("/v2/models/scaled/infer", infer((8, 9)))) == [24.0, 27.0]
        assert "front.wedged" in server.log()
