"""Keep runner processes alive: start, watch, start again with back-off, end.

One more runner than needed may stand by (`RunnerPool.keep_spare`), its libraries already imported: it takes
over from one that died within milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from parbake.errors import RunnerDown, by_code
from parbake.logs import log
from parbake.runtime.runner import Assignment, Loaded, Refused, Report

_BACK_OFF_S: Final = (0.0, 0.1, 0.3, 0.5)
"""Delays before a runner that ended is started again: callers are told less than a second."""
_REFUSED_S: Final = (0.3, 1.0, 3.0, 10.0)
"""Delays after it could not be started: what is wrong then does not mend itself in a moment."""
_STEADY_S: Final = 5.0
"""A runner that lived this long starts again without delay."""
_END_S: Final = 5.0
_LOAD_S: Final = 240.0
"""Longest time that a runner may take to load and prove a model."""


@dataclass(slots=True)
class Runner:
    """A place that a process keeps filled. ``socket`` is where fronts find it, whichever process is there."""

    assignment: Assignment
    loaded: Loaded | None = None
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    started: float = 0.0
    stopping: bool = False
    failures: int = 0
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def socket(self) -> str:
        """Path of the Unix-domain socket."""
        return self.assignment.socket

    @property
    def pid(self) -> int | None:
        """The process now filling the place."""
        return self.process.pid if self.process and self.process.returncode is None else None


@dataclass(slots=True)
class _Started:
    process: asyncio.subprocess.Process
    control: socket.socket


class RunnerPool:
    """All runners of one server. ``folder`` holds their sockets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._spare: asyncio.Task[_Started] | None = None
        self._keep_spare = False
        self._closing = False
        self.runners: list[Runner] = []

    @property
    def spare_pid(self) -> int | None:
        """The process that stands by, if it has been started."""
        if (
            self._spare is None
            or not self._spare.done()
            or self._spare.cancelled()
            or self._spare.exception()
        ):
            return None
        return self._spare.result().process.pid

    def keep_spare(self) -> None:
        """From now on have one runner stand by."""
        self._keep_spare = True
        if self._spare is None and not self._closing:
            self._spare = asyncio.create_task(_spawn())

    async def drop_spare(self) -> None:
        """No model runs in a process of its own: nothing to stand by for."""
        self._keep_spare = False
        spare, self._spare = self._spare, None
        if spare is not None:
            try:
                started = await spare
            except OSError:
                return
            await _end(started)

    async def start(
        self,
        bundle: str,
        *,
        digest: str = "",
        threads: int,
        allow_pickle: bool = False,
        allow_mismatch: bool = False,
    ) -> Runner:
        """Start a runner and wait until it has proved the goldens. Raises the error that made it refuse.

        ``digest``, where given, is that of the bundle: another one under the same path is refused, now and
        whenever the runner is started again.
        """
        path = str(self._folder / f"runner-{next(self._numbers)}.sock")
        runner = Runner(Assignment(bundle, path, threads, allow_pickle, allow_mismatch, digest))
        self.runners.append(runner)
        try:
            control = await self._fill(runner)
        except BaseException:
            self.runners.remove(runner)
            raise
        runner.watcher = asyncio.create_task(self._watch(runner, control))
        return runner

    async def stop(self, runner: Runner) -> None:
        """End a runner that no front uses any more."""
        runner.stopping = True
        if runner in self.runners:
            self.runners.remove(runner)
        if runner.watcher is not None:
            runner.watcher.cancel()
        if runner.process is not None:
            await end_process(runner.process)
        Path(runner.socket).unlink(missing_ok=True)

    async def close(self) -> None:
        """End all."""
        self._closing = True
        await self.drop_spare()
        await asyncio.gather(*(self.stop(runner) for runner in list(self.runners)))

    def kill(self, path: str) -> None:
        """Kill the runner behind a socket: it is wedged. It will be started again."""
        for runner in self.runners:
            if runner.socket == path and runner.process and runner.process.returncode is None:
                log().error("runner.killed", pid=runner.process.pid, bundle=runner.assignment.bundle)
                runner.process.kill()

    async def _fill(self, runner: Runner) -> socket.socket:
        """Give the place a process, the spare if there is one."""
        started = await self._take_spare() or await _spawn()
        loop = asyncio.get_running_loop()
        runner.process = started.process
        runner.started = time.monotonic()
        try:
            await loop.sock_sendall(started.control, msgspec.json.encode(runner.assignment) + b"\n")
            report = await asyncio.wait_for(_report(started.control), _LOAD_S)
        except TimeoutError as error:
            started.control.close()
            await end_process(started.process)
            raise RunnerDown(f"{runner.assignment.bundle} was not loaded within {_LOAD_S:g} s") from error
        except BaseException:
            started.control.close()
            await end_process(started.process)
            raise
        finally:
            # Not before: the next spare would take the processor from the runner that somebody waits for.
            if self._keep_spare:
                self.keep_spare()
        if isinstance(report, Refused):
            started.control.close()
            await end_process(started.process)
            raise by_code(report.code, report.message, hint=report.hint)
        runner.loaded = report
        return started.control

    async def _take_spare(self) -> _Started | None:
        """The process that stands by, unless it has died meanwhile."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        try:
            started = await spare
        except OSError:
            return None
        try:
            # Silence is what a living spare says.
            started.control.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return started
        except OSError:
            pass
        await _end(started)
        return None

    async def _watch(self, runner: Runner, control: socket.socket) -> None:
        while runner.process is not None:
            try:
                status = await runner.process.wait()
            finally:
                control.close()
            if runner.stopping or self._closing:
                return
            lived_s = time.monotonic() - runner.started
            runner.failures = 0 if lived_s > _STEADY_S else runner.failures + 1
            delay_s = _BACK_OFF_S[min(max(runner.failures - 1, 0), len(_BACK_OFF_S) - 1)]
            log().error(
                "runner.ended",
                bundle=runner.assignment.bundle,
                status=status,
                lived_s=round(lived_s, 1),
                restart_in_s=delay_s,
            )
            refused = 0
            while True:
                await asyncio.sleep(delay_s)
                began = time.monotonic()
                try:
                    control = await self._fill(runner)
                    break
                except Exception as error:
                    # Whatever it is: a place that nobody fills any more would stay empty for good.
                    delay_s = _REFUSED_S[min(refused, len(_REFUSED_S) - 1)]
                    refused += 1
                    log().error(
                        "runner.refused",
                        bundle=runner.assignment.bundle,
                        error=str(error),
                        retry_in_s=delay_s,
                    )
            runner.restarts += 1
            log().info(
                "runner.restarted",
                bundle=runner.assignment.bundle,
                pid=runner.pid,
                ms=round((time.monotonic() - began) * 1000),
            )


async def _spawn() -> _Started:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "parbake.runtime.runner",
            str(theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            # What a model prints belongs to the log: the server's stdout says where it serves.
            stdout=2,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return _Started(process, ours)


async def _report(control: socket.socket) -> Report:
    loop = asyncio.get_running_loop()
    data = b""
    while not data.endswith(b"\n"):
        chunk = await loop.sock_recv(control, 65536)
        if not chunk:
            raise RunnerDown(
                "the runner ended while it loaded the model", hint="its last words are in the log"
            )
        data += chunk
    report: Report = msgspec.json.decode(data, type=Loaded | Refused)
    return report


async def _end(started: _Started) -> None:
    started.control.close()
    await end_process(started.process)


async def end_process(process: asyncio.subprocess.Process) -> None:
    """Ask a process to end, and insist after a while."""
    if process.returncode is not None:
        return
    try:
        process.terminate()
        await asyncio.wait_for(process.wait(), _END_S)
    except ProcessLookupError:
        return
    except TimeoutError:
        process.kill()
        await process.wait()
