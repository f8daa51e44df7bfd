"""How long a runner may be silent before it is given up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from parbake.runtime import wire
from parbake.runtime.backends import RunnerBackend
from parbake.runtime.batcher import Outcome

ROW = np.zeros(2, np.float32).tobytes()
ROWS = 8


@pytest.mark.parametrize(("golden_s", "patience"), [(0.0, [8]), (1e-6, [1, 1, 1, 1, 8])])
def test_a_model_that_has_answered_nothing_yet_is_not_called_hanging_for_ever(
    golden_s: float, patience: list[int], tmp_path: Path
) -> None:
    wedged_s = 0.1

    async def runner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers probes, and says how long a golden row takes; never a batch."""
        while head := await reader.read(65536):
            request_id, rows, *_ = wire.read_request(head)
            if not rows:
                writer.writelines(wire.reply_frame(request_id, wire.OK, golden_s, (), ()))
        writer.close()

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        path = str(tmp_path / "runner.sock")
        listening = await asyncio.start_unix_server(runner, path)
        up = asyncio.Event()
        backend = RunnerBackend("eta", path, loop, wedged_s=wedged_s, on_wedged=lambda asked_at: None)
        backend.watch(on_up=up.set, on_down=lambda: None)
        backend.connect()
        said: list[str] = []
        for _ in patience:
            await up.wait()
            up.clear()
            done: asyncio.Future[Outcome] = loop.create_future()
            backend.run((ROW * ROWS,), ROWS, ((ROWS, 2),), done.set_result)
            outcome = await done
            assert outcome.error is not None
            said.append(outcome.error.message)
            backend.connect()
        backend.close()
        listening.close()
        await listening.wait_closed()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)
        return said

    assert asyncio.run(main()) == [
        f"model 'eta' did not answer within {wedged_s * times:.1f} s; its process is restarted"
        for times in patience
    ]


@pytest.mark.parametrize(("golden_s", "silent"), [(0.0, True), (2.0, False)])
def test_a_process_that_is_busy_with_another_fronts_slow_row_is_not_called_hanging(
    golden_s: float, silent: bool, tmp_path: Path
) -> None:
    async def runner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the first probe, and is busy from then on."""
        request_id, *_ = wire.read_request(await reader.read(65536))
        writer.writelines(wire.reply_frame(request_id, wire.OK, golden_s, (), ()))
        await reader.read(-1)
        writer.close()

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        path = str(tmp_path / "runner.sock")
        listening = await asyncio.start_unix_server(runner, path)
        wedged: list[float] = []
        backend = RunnerBackend("eta", path, loop, wedged_s=0.1, on_wedged=wedged.append)
        backend.connect()
        # It is asked once a second.
        await asyncio.sleep(3)
        backend.close()
        listening.close()
        await listening.wait_closed()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)
        return wedged

    assert bool(asyncio.run(main())) is silent
