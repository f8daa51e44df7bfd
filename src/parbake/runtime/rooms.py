"""A room as the supervisor holds it: start the process when a model is wanted, load, put away, notice its end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from parbake.errors import ParbakeError, RunnerDown, by_code
from parbake.logs import log
from parbake.runtime import cpu
from parbake.runtime.pool import RunnerPool, StartedProcess, end_process
from parbake.runtime.room import (
    Done,
    FromRoom,
    GetUses,
    LoadModel,
    ModelLoaded,
    ModelRefused,
    RoomAssignment,
    RoomReady,
    ToRoom,
    UnloadModel,
)
from parbake.runtime.runner import AWAKE, Assignment

_LOAD_S: Final = 240.0
_START_S: Final = 30.0
_UNLOAD_S: Final = 60.0
_ENDED_S: Final = 1.0
"""Time between a process closing its line and its end."""
_LEAST_THREADS: Final = 4
"""So many models may be slow before a quick one has to wait for them."""
_CAREFUL_S: Final = 10.0
_BACK_OFF_S: Final = (0.0, 0.1, 0.3, 0.5)
"""Delays before a room whose process ended is started again."""
_STEADY_S: Final = 5.0


class Room:
    """The place for the models of one isolation group; a process fills it while any of them is wanted.

    ``on_end`` is called when the process has ended, with none of its models loaded any more; ``on_uses`` with the
    batches of each model, by its socket, since it was called last.
    """

    def __init__(
        self,
        group: str,
        marks: Path,
        pool: RunnerPool,
        *,
        on_end: Callable[[Room], None],
        on_uses: Callable[[Mapping[str, int]], None],
    ) -> None:
        self.group = group
        self.marks = str(marks)
        self.restarts = 0
        self._pool = pool
        self._on_end = on_end
        self._on_uses = on_uses
        self._started: StartedProcess | None = None
        self._starting: asyncio.Task[StartedProcess] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[FromRoom]] = {}
        self._decoder = msgspec.json.Decoder(FromRoom)
        self._since = 0.0
        self._failures = 0
        self._closing = False
        self._resting = False

    @property
    def pid(self) -> int | None:
        """The process that fills the place now."""
        started = self._started
        return started.process.pid if started is not None and started.process.returncode is None else None

    async def load(self, assignment: Assignment, slot: int) -> ModelLoaded:
        """Load a model. Raises what made it refuse, or `RunnerDown` where the process ended over it."""
        began = time.monotonic()
        try:
            reply = await self._call(lambda number: LoadModel(number, slot, assignment), _LOAD_S)
        except RunnerDown:
            if time.monotonic() - began >= _LOAD_S:
                # It hangs over this one, and nobody else can be loaded.
                self.kill()
            raise
        if isinstance(reply, ModelRefused):
            raise by_code(reply.code, reply.message, hint=reply.hint)
        if not isinstance(reply, ModelLoaded):
            raise RunnerDown(f"the room of {self.group!r} answered {type(reply).__name__}")
        return reply

    async def unload(self, socket: str) -> None:
        """Put a model away when it has answered what it has read. Where the process has ended that is so already."""
        if self.pid is not None:
            try:
                await self._call(lambda number: UnloadModel(number, socket), _UNLOAD_S)
            except RunnerDown as error:
                if self.pid is not None:
                    log().warning("room.not_unloaded", group=self.group, error=error.message)

    async def ask_uses(self) -> None:
        """Have ``on_uses`` called with what is new."""
        if self.pid is not None:
            try:
                await self._call(GetUses, _START_S)
            except RunnerDown:
                return

    async def start(self) -> None:
        """Have the process there before anybody wants a model. Raises `RunnerDown`."""
        await self._process()

    def rest(self) -> None:
        """End the process, with nothing loaded in it, until a model is wanted again."""
        if self._started is not None and not self._waiting:
            self._resting = True
            self._started.process.terminate()

    def kill_silent(self, asked_at: float) -> None:
        """End the process at once if it was there when it was asked what it has not answered."""
        if self._since <= asked_at:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        if self._started is not None and self._started.process.returncode is None:
            log().error("room.killed", group=self.group, pid=self._started.process.pid)
            self._started.process.kill()

    async def close(self) -> None:
        """End the process for good."""
        self._closing = True
        if self._starting is not None:
            self._starting.cancel()
        if self._listening is not None:
            self._listening.cancel()
        if self._started is not None:
            await end_process(self._started.process)
            self._started.control.close()

    async def _call(self, message: Callable[[int], ToRoom], timeout_s: float) -> FromRoom:
        started = await self._process()
        listening = self._listening
        number = next(self._numbers)
        future: asyncio.Future[FromRoom] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            line = msgspec.json.encode(message(number)) + b"\n"
            await asyncio.get_running_loop().sock_sendall(started.control, line)
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError as error:
            raise RunnerDown(f"the room of {self.group!r} did not answer within {timeout_s:g} s") from error
        except OSError as error:
            # It has ended, and that is not known yet: whoever tries again at once would meet the same process.
            if listening is not None:
                await asyncio.wait([listening], timeout=2 * _ENDED_S)
            if not future.cancel():
                # It was told too, and asyncio complains of errors that nobody looks at.
                future.exception()
            raise self._down() from error
        finally:
            self._waiting.pop(number, None)

    def _down(self) -> RunnerDown:
        return RunnerDown(
            f"the process for the models of {self.group!r} ended and is being started again",
            hint="try again; the log has its last words",
            retry_after_s=1.0,
        )

    async def _process(self) -> StartedProcess:
        """The process, started if there is none."""
        if self.pid is not None and self._started is not None:
            return self._started
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> StartedProcess:
        if self._failures:
            await asyncio.sleep(_BACK_OFF_S[min(self._failures, len(_BACK_OFF_S)) - 1])
        if self._closing:
            raise self._down()
        started = await self._pool.take()
        again = bool(self._since)
        careful_s = _CAREFUL_S if again else 0.0
        assignment = RoomAssignment(self.marks, max(_LEAST_THREADS, cpu.quota()), careful_s)
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(started.control, msgspec.json.encode(assignment) + b"\n")
            ready: asyncio.Future[FromRoom] = loop.create_future()
            self._waiting[0] = ready
            self._listening = asyncio.create_task(self._listen(started))
            await asyncio.wait_for(ready, _START_S)
        except (TimeoutError, OSError) as error:
            started.process.kill()
            raise self._down() from error
        finally:
            self._waiting.pop(0, None)
        self._started = started
        self._since = time.monotonic()
        self.restarts += again
        log().info("room.started", group=self.group, pid=started.process.pid)
        return started

    async def _listen(self, started: StartedProcess) -> None:
        loop = asyncio.get_running_loop()
        heard = bytearray()
        try:
            while chunk := await loop.sock_recv(started.control, 1 << 16):
                heard += chunk
                *lines, rest = heard.split(b"\n")
                heard = bytearray(rest)
                for line in lines:
                    # Before anything else it may have said that it is awake.
                    if line.strip(AWAKE):
                        self._hear(self._decoder.decode(line))
        except OSError as error:
            log().debug("room.reset", group=self.group, error=str(error))
        except msgspec.DecodeError as error:
            log().error("room.out_of_step", group=self.group, error=str(error))
        finally:
            if not self._closing:
                try:
                    # It has ended mostly, and to kill it then would take its status from whoever waits for that.
                    status = await asyncio.wait_for(started.process.wait(), _ENDED_S)
                except TimeoutError:
                    # A process without its line is of no use to anybody.
                    started.process.kill()
                    status = await started.process.wait()
                started.control.close()
                self._ended(started, status)

    def _hear(self, message: FromRoom) -> None:
        if isinstance(message, RoomReady):
            number = 0
            if message.kept:
                self._pool.tell_kept(message.kept)
        else:
            number = message.number
            if isinstance(message, ModelLoaded | Done) and message.uses:
                self._on_uses(message.uses)
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_result(message)

    def _ended(self, started: StartedProcess, status: int) -> None:
        if self._resting:
            self._resting = False
            self._since = self._failures = 0
            self._lost(started)
            return
        lived_s = time.monotonic() - self._since if self._since else 0.0
        self._failures = 1 if lived_s > _STEADY_S else self._failures + 1
        log().error("room.ended", group=self.group, status=status, lived_s=round(lived_s, 1))
        self._lost(started)

    def _lost(self, started: StartedProcess) -> None:
        if self._started is started:
            self._started = None
        error: ParbakeError = self._down()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._on_end(self)
