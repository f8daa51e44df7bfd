"""Keep runner processes alive: start, watch, start again with back-off, end.

One more runner than needed may stand by (`RunnerPool.keep_spare`), its libraries already imported: it takes
over from one that died within milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from parbake.errors import RunnerDown, by_code
from parbake.logs import log
from parbake.runtime import cpu, memory
from parbake.runtime.confine import Confinement, find_user
from parbake.runtime.runner import AWAKE, Assignment, Loaded, Refused, Report

_BACK_OFF_S: Final = (0.0, 0.1, 0.3, 0.5)
"""Delays before a runner that ended is started again: callers are told less than a second."""
_REFUSED_S: Final = (0.3, 1.0, 3.0, 10.0)
"""Delays after it could not be started: what is wrong then does not mend itself in a moment."""
_STEADY_S: Final = 5.0
"""A runner that lived this long starts again without delay."""
_END_S: Final = 5.0
_AWAKE_S: Final = 0.25
"""Longest that a spare with all its libraries is waited for: by then a new process is the quicker way."""
_NEXT_SPARE_S: Final = 0.5
"""Time from taking the spare for something else than a runner to starting the next one."""
_IMPORTS_S: Final = 10.0
"""Longest that one without them is waited for."""
_SECRETS: Final = frozenset(("PARBAKE_ADMIN_TOKEN", "PARBAKE_SIGNING_KEY"))
"""Variables that runners do not inherit."""
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
    first_bytes: int = 0
    """Memory that the process had when its model was loaded."""
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
class StartedProcess:
    """A process that waits to be told what it is to be, and the line to it."""

    process: asyncio.subprocess.Process
    control: socket.socket


class RunnerPool:
    """All runners of one server. ``folder`` holds their sockets; ``confinement`` is what they may keep.

    Raises `SettingsError` where they cannot be the user that they shall be.
    """

    def __init__(self, folder: Path, confinement: Confinement | None = None) -> None:
        self._confinement = confinement or Confinement()
        self._folder = _folder_of(folder, self._confinement.user)
        self._told_kept = False
        """Whether the log says what runners could not give up."""
        self._numbers = itertools.count(1)
        self._spare: asyncio.Task[StartedProcess] | None = None
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
            self._spare = asyncio.create_task(_spawn(self._confinement))

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
        verify: bool = False,
        prove: bool = True,
    ) -> Runner:
        """Start a runner and wait until it has proved the goldens. Raises the error that made it refuse.

        ``digest``, where given, is that of the bundle: another one under the same path is refused, now and
        whenever the runner is started again. ``verify`` has the runner hold every file against the digest; without
        ``prove`` it is for others to judge the goldens.
        """
        path = str(self._folder / f"runner-{next(self._numbers)}.sock")
        assignment = Assignment(bundle, path, threads, allow_pickle, allow_mismatch, digest, verify, prove)
        runner = Runner(assignment)
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

    async def renew(self, runner: Runner) -> None:
        """Put a new process in the place of one that works, which ends when the new one is there.

        Raises what starting raises, and then the old one stays.
        """
        started, loaded = await self._launch(runner.assignment)
        old, watcher = runner.process, runner.watcher
        if runner.stopping or old is None or old.returncode is not None:
            # It ended meanwhile, or nobody wants it any more.
            await _end(started)
            return
        if watcher is not None:
            # It closes the line to the old one, which ends after the batch that it runs.
            watcher.cancel()
        runner.process, runner.loaded, runner.started = started.process, loaded, time.monotonic()
        runner.first_bytes = memory.resident(started.process.pid)
        runner.restarts += 1
        runner.watcher = asyncio.create_task(self._watch(runner, started.control))
        with suppress(TimeoutError):
            await asyncio.wait_for(old.wait(), _END_S)
        await end_process(old)

    def kill(self, path: str, asked_at: float) -> None:
        """Kill the runner behind a socket, which has not answered since. It will be started again.

        One that was started after ``asked_at`` is another process: each front finds out by itself that one hangs, and
        the second may say so when the first has had it replaced.
        """
        for runner in self.runners:
            if runner.started > asked_at:
                continue
            if runner.socket == path and runner.process and runner.process.returncode is None:
                log().error("runner.killed", pid=runner.process.pid, bundle=runner.assignment.bundle)
                runner.process.kill()

    @property
    def folder(self) -> Path:
        """Where runners may make their sockets."""
        return self._folder

    async def take(self) -> StartedProcess:
        """A process that waits to be told what it is to be, the spare if there is one; the caller ends it."""
        started = await self._take_spare() or await _spawn(self._confinement)
        if self._keep_spare:
            # Whoever wants this one wants it now: the next may take the processor a moment later.
            asyncio.get_running_loop().call_later(_NEXT_SPARE_S, self._renew_spare)
        return started

    def _renew_spare(self) -> None:
        if self._keep_spare:
            self.keep_spare()

    def tell_kept(self, kept: Sequence[str]) -> None:
        """Have the log say, once, what runners could not give up."""
        if not self._told_kept:
            self._told_kept = True
            log().warning("runner.not_confined", kept=list(kept), hint="docs/concepts/security.md")

    async def _fill(self, runner: Runner) -> socket.socket:
        """Give the place a process, the spare if there is one."""
        started, runner.loaded = await self._launch(runner.assignment, runner)
        runner.first_bytes = memory.resident(started.process.pid)
        return started.control

    async def _launch(
        self, assignment: Assignment, runner: Runner | None = None
    ) -> tuple[StartedProcess, Loaded]:
        """Start a process for an assignment; ``runner`` is the place that is its at once. Raises why it refused."""
        started = await self._take_spare() or await _spawn(self._confinement)
        loop = asyncio.get_running_loop()
        if runner is not None:
            runner.process = started.process
            runner.started = time.monotonic()
        try:
            await loop.sock_sendall(started.control, msgspec.json.encode(assignment) + b"\n")
            report = await asyncio.wait_for(_report(started.control), _LOAD_S)
        except TimeoutError as error:
            started.control.close()
            await end_process(started.process)
            raise RunnerDown(f"{assignment.bundle} was not loaded within {_LOAD_S:g} s") from error
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
        if report.kept:
            self.tell_kept(report.kept)
        return started, report

    async def _take_spare(self) -> StartedProcess | None:
        """The process that stands by, unless it has died meanwhile, or hangs."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        try:
            started = await spare
        except OSError:
            return None
        if await _is_awake(started):
            return started
        log().error("spare.lost", pid=started.process.pid)
        # One that hangs would not hear that it shall end.
        if started.process.returncode is None:
            started.process.kill()
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


def _folder_of(folder: Path, user: str) -> Path:
    """Where runners of a user may make their sockets."""
    if not user:
        return folder
    account = find_user(user)
    # The others' way leads through; what else lies there they can neither list nor read.
    folder.chmod(0o711)
    inner = folder / "runners"
    inner.mkdir(mode=0o700)
    os.chown(inner, account.uid, account.gid)
    return inner


async def _spawn(confinement: Confinement) -> StartedProcess:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "parbake.runtime.confine",
            str(theirs.fileno()),
            msgspec.json.encode(confinement).decode(),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            env=_environment(),
            # What a model prints belongs to the log: the server's stdout says where it serves.
            stdout=2,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return StartedProcess(process, ours)


def _environment() -> dict[str, str]:
    """What a runner inherits: not the token with which it could change the server."""
    return {name: value for name, value in {**_thread_limits(), **os.environ}.items() if name not in _SECRETS}


def _thread_limits() -> dict[str, str]:
    """For libraries that take as many threads as the host has cores, whatever the container may use."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return dict.fromkeys(names, str(cpu.quota()))


async def _is_awake(spare: StartedProcess) -> bool:
    """Whether a process that stands by answers, or will when it has its libraries."""
    loop = asyncio.get_running_loop()
    wait_s = _AWAKE_S
    try:
        try:
            spare.control.recv(1)
        except BlockingIOError:
            wait_s = _IMPORTS_S
        await loop.sock_sendall(spare.control, AWAKE)
        return await asyncio.wait_for(loop.sock_recv(spare.control, 1), wait_s) == AWAKE
    except (OSError, TimeoutError):
        return False


async def _report(control: socket.socket) -> Report:
    loop = asyncio.get_running_loop()
    data = b""
    while not data.endswith(b"\n"):
        chunk = await loop.sock_recv(control, 65536)
        if not chunk:
            raise RunnerDown(
                "the runner ended while it loaded the model", hint="its last words are in the log"
            )
        # Before the report it may have said that it is awake.
        data = (data + chunk).lstrip(AWAKE)
    report: Report = msgspec.json.decode(data, type=Loaded | Refused)
    return report


async def _end(started: StartedProcess) -> None:
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
