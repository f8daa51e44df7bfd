"""How long a runner may be silent before it is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from parbake.errors import RunnerDown
from parbake.runtime import wire
from parbake.runtime.backends import RunnerBackend
from parbake.runtime.batcher import Outcome

ROW = np.zeros(2, np.float32).tobytes()
ROWS = 8
Runner: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def connected(
    runner: Runner, folder: Path, wedged_s: float, on_wedged: Callable[[float], None]
) -> AsyncIterator[tuple[RunnerBackend, asyncio.Event]]:
    """A backend that connects to a runner made up by a test, and what is set whenever it has."""
    path = str(folder / "runner.sock")
    listening = await asyncio.start_unix_server(runner, path)
    up = asyncio.Event()
    backend = RunnerBackend("eta", path, asyncio.get_running_loop(), wedged_s=wedged_s, on_wedged=on_wedged)
    backend.watch(on_up=up.set, on_down=lambda: None)
    backend.connect()
    yield backend, up
    backend.close()
    listening.close()
    await listening.wait_closed()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0.01)


def busy(golden_s: float) -> Runner:
    """Answers the first probe, and is busy from then on."""

    async def runner(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request_id, *_ = wire.read_request(await reader.read(65536))
        writer.writelines(wire.reply_frame(request_id, wire.OK, golden_s, (), ()))
        await reader.read(-1)
        writer.close()

    return runner


def ask(backend: RunnerBackend) -> asyncio.Future[Outcome]:
    """Send a batch."""
    done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    backend.run((ROW * ROWS,), ROWS, ((ROWS, 2),), done.set_result)
    return done


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
        said: list[str] = []
        async with connected(runner, tmp_path, wedged_s, lambda asked_at: None) as (backend, up):
            for _ in patience:
                await up.wait()
                up.clear()
                outcome = await ask(backend)
                assert outcome.error is not None
                said.append(outcome.error.message)
                backend.connect()
        return said

    assert asyncio.run(main()) == [
        f"model 'eta' did not answer within {wedged_s * times:.1f} s; its process is restarted"
        for times in patience
    ]


@pytest.mark.parametrize(("golden_s", "hangs"), [(0.0, True), (2.0, False)])
def test_a_process_that_is_busy_with_another_fronts_slow_row_is_not_called_hanging(
    golden_s: float, hangs: bool, tmp_path: Path
) -> None:
    async def main() -> list[float]:
        wedged: list[float] = []
        async with connected(busy(golden_s), tmp_path, 0.1, wedged.append):
            # It is asked once a second.
            await asyncio.sleep(3)
        return wedged

    assert bool(asyncio.run(main())) is hangs


def test_what_is_sent_on_a_line_that_is_closing_was_not_read(tmp_path: Path) -> None:
    async def main() -> Outcome:
        async with connected(busy(0.0), tmp_path, 1.0, lambda asked_at: None) as (backend, up):
            await up.wait()
            backend.close()
            # The end has not been told yet.
            assert backend.up
            return await ask(backend)

    outcome = asyncio.run(main())
    assert isinstance(outcome.error, RunnerDown)
    assert outcome.unread
