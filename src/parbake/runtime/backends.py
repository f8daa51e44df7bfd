"""Where a batch runs: in this process, or in a runner process over a Unix-domain socket."""

from __future__ import annotations

import asyncio
import fcntl
import secrets
import struct
import termios
from collections.abc import Callable, Sequence
from time import monotonic, perf_counter
from typing import Final

from parbake.contract.tensors import Shape
from parbake.errors import DeadlineExceeded, ModelFailed, ParbakeError, RowRejected
from parbake.logs import log
from parbake.runtime import wire
from parbake.runtime.batcher import Outcome, runner_down
from parbake.runtime.session import Session

_RECONNECT_S: Final = 0.02
_SLOW_FROM: Final = 4
"""So many batches given up, and none answered yet: perhaps nothing hangs, and all rows are slower than goldens."""
_PROBE_S: Final = 1.0
"""How often a runner without a batch is asked whether it is still there."""
_LARGE_BYTES: Final = 1 << 24
"""A batch beyond this may end a process that only reads it."""
_INT: Final = struct.Struct("i")
_FIRST_ID_BITS: Final = 63
"""Ids of requests begin at random below this power of two: another front at the same process has others."""
_LATE_S: Final = 1.0
"""A probe that is not answered for this long, and four of the longest batches or rows, is a bad sign."""


class InlineBackend:
    """Runs batches in the caller's process: for models that take less time than the way to another one."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.up = self.answers = True

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        """Run now, and call ``done`` before returning."""
        started = perf_counter()
        try:
            out_raws, out_shapes = self._session.run_raw(raws, rows, shapes)
        except ParbakeError as error:
            done(Outcome(seconds=perf_counter() - started, error=error))
            return
        except (Exception, SystemExit) as error:
            # As in a runner: a model may answer anything, and who waits must be told.
            failed = ModelFailed(f"{type(error).__name__}: {error}")
            done(Outcome(seconds=perf_counter() - started, error=failed))
            return
        done(Outcome(out_raws, out_shapes, perf_counter() - started))


class RunnerBackend(asyncio.Protocol):
    """One connection to a runner, with at most one batch in flight.

    It connects again by itself whenever the runner comes back under the same path. A batch that takes longer
    than ``wedged_s`` fails, and ``on_wedged`` is called with when that was asked (of `time.monotonic`): the supervisor
    ends such a runner. One that has nothing to do is probed, so that a process that hangs is found before somebody
    needs it.
    """

    def __init__(
        self,
        name: str,
        path: str,
        loop: asyncio.AbstractEventLoop,
        *,
        wedged_s: float,
        on_wedged: Callable[[float], None],
        at_work: Callable[[int], bool] | None = None,
    ) -> None:
        self._name = name
        self._path = path
        self._loop = loop
        self._wedged_s = wedged_s
        self._on_up: Callable[[], None] = lambda: None
        self._on_down: Callable[[], None] = lambda: None
        self._on_wedged = on_wedged
        self._at_work = at_work
        """Whether the model is, or was in the end, at work on this request, where the process has other models too."""
        self._transport: asyncio.Transport | None = None
        self._greeted: asyncio.Transport | None = None
        """A connection whose other end has not said anything yet."""
        self._buffer = bytearray()
        self._done: Callable[[Outcome], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self._rows = 0
        self._bytes = 0
        """Of the batch that was sent last."""
        self._row_s = 0.0
        """Time of one row in the slowest of the last batches; before there was one, of a golden row."""
        self._given_up = 0
        """Batches that were given up before there was any reply to one."""
        self._said_up = False
        """Whether `_on_up` was called, and not yet `_on_down`."""
        self._closed = False
        self._bye = False
        """Whether the runner has said that it puts the model away."""
        self._next_id = secrets.randbits(_FIRST_ID_BITS)
        self._probe_id = 0
        """Of a probe that has not been answered; 0 for none."""
        self._probed_at = 0.0
        self._longest_s = 0.0
        """Time of the longest batch so far."""
        self._probing: asyncio.TimerHandle | None = None
        self._connecting: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether the runner is connected."""
        return self._transport is not None

    @property
    def answers(self) -> bool:
        """Whether the runner is connected, and was there when it was asked last."""
        late_s = _LATE_S + self._busy_s()
        return self._transport is not None and not (self._probe_id and monotonic() - self._probed_at > late_s)

    def watch(self, *, on_up: Callable[[], None], on_down: Callable[[], None]) -> None:
        """Call these whenever the runner has come, and when it has gone."""
        self._on_up = on_up
        self._on_down = on_down

    def connect(self) -> None:
        """Begin to connect, and go on until it works or `close` is called."""
        # A connection may be lost before the task that made it has noticed: that task goes on by itself.
        if self._connecting is None or self._connecting.done():
            self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        while not self._closed and self._transport is None and self._greeted is None:
            try:
                await self._loop.create_unix_connection(lambda: self, self._path)
            except OSError:
                # Not there yet: the supervisor is starting it.
                await asyncio.sleep(_RECONNECT_S)

    def close(self) -> None:
        """Close for good. A batch in flight fails."""
        self._closed = True
        if self._probing is not None:
            self._probing.cancel()
        for transport in (self._transport, self._greeted):
            if transport is not None:
                transport.close()
        if self._connecting is not None:
            self._connecting.cancel()

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        """Send a batch; ``done`` is called when the reply is here, the runner is gone, or time is up."""
        if self._transport is None or self._transport.is_closing():
            done(Outcome(error=runner_down(self._name), unread=True))
            return
        self._next_id += 1
        self._done = done
        # Many rows may take long without anything being wrong: as long as rows have taken before, with room.
        if self._row_s and self._given_up < _SLOW_FROM:
            expected_s = 4 * rows * self._row_s
        else:
            expected_s = self._wedged_s * min(rows - 1, 9)
        allowed_s = self._wedged_s + expected_s
        self._rows = rows
        self._bytes = sum(map(len, raws))
        self._sent_at = monotonic()
        self._timer = self._loop.call_later(allowed_s, self._late, allowed_s)
        self._transport.writelines(wire.request_frame(self._next_id, rows, raws, shapes))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The kernel accepted: also for a process that is about to end, or hangs. A probe tells."""
        self._greeted = transport  # type: ignore[assignment]  # a stream transport
        self._buffer.clear()
        self._send_probe(self._greeted)
        if self._probing is None:
            self._probing = self._loop.call_later(_PROBE_S, self._probe)

    def _send_probe(self, transport: asyncio.Transport | None) -> None:
        if transport is not None:
            self._next_id += 1
            self._probe_id, self._probed_at = self._next_id, monotonic()
            transport.writelines(wire.request_frame(self._probe_id, 0, (), ()))

    def _probe(self) -> None:
        """Ask a runner that has nothing to do whether it is still there."""
        self._probing = self._loop.call_later(_PROBE_S, self._probe)
        # A batch in flight has its own time limit.
        if self._done is not None or (self._transport is None and self._greeted is None):
            return
        if not self._probe_id:
            self._send_probe(self._transport)
            return
        waited_s = monotonic() - self._probed_at
        if waited_s > self._wedged_s + self._busy_s():
            self._wedged(waited_s, self._probed_at)

    def _busy_s(self) -> float:
        """How long the process may be busy with what another front has there, as far as is known here."""
        return 4 * max(self._longest_s, self._row_s)

    def data_received(self, data: bytes) -> None:
        """Bytes of a reply, or of two: one to a probe, and one to the batch that was sent after it."""
        if not self._buffer and wire.frame_length(data) == len(data):
            self._reply(data)
            return
        buffer = self._buffer
        buffer += data
        while (length := wire.frame_length(buffer)) is not None and len(buffer) >= length:
            frame = bytes(memoryview(buffer)[:length])
            del buffer[:length]
            self._reply(frame)

    def _reply(self, frame: bytes) -> None:
        request_id, status, seconds, raws, shapes = wire.read_reply(frame)
        if request_id == wire.BYE:
            # Put away: a batch that is under way was not read.
            self._bye = True
            if self._greeted is not None:
                self._greeted.close()
            if self._transport is not None:
                self._transport.close()
            return
        if request_id == self._probe_id:
            self._probe_id = 0
            # Before the first batch: of many rows one may hang, and must not be waited for as if all were slow.
            self._row_s = self._row_s or seconds
            if self._greeted is not None:
                self._transport, self._greeted = self._greeted, None
                self._said_up = True
                self._on_up()
            return
        if request_id != self._next_id or self._done is None:
            # A reply to nobody's question means that the two ends disagree: begin anew.
            log().error("runner.out_of_step", deployment=self._name, reply=request_id)
            if self._transport is not None:
                self._transport.abort()
            return
        if status == wire.OK:
            outcome = Outcome(raws, shapes, seconds)
            self._row_s = max(seconds / self._rows, 0.9 * self._row_s)
            self._given_up = 0
            self._longest_s = max(seconds, self._longest_s)
        elif status == wire.REJECTED:
            outcome = Outcome(seconds=seconds, error=RowRejected(raws[0].decode()))
        else:
            outcome = Outcome(seconds=seconds, error=ModelFailed(raws[0].decode()))
        self._finish(outcome)

    def connection_lost(self, exc: Exception | None) -> None:
        """The runner is gone."""
        was_up, self._said_up = self._said_up, False
        self._transport = self._greeted = None
        self._probe_id = 0
        unread, self._bye = self._bye, False
        if self._done is not None and not unread:
            unread = self._was_waiting(exc)
        # First the state, then the callers: whoever is told may ask again at once.
        if not self._closed:
            self.connect()
        self._finish(Outcome(error=runner_down(self._name), unread=unread))
        if was_up and not self._closed:
            self._on_down()

    def _was_waiting(self, exc: Exception | None) -> bool:
        """Whether the process ended before it began with the batch in flight; no where nobody can tell."""
        if self._bytes > _LARGE_BYTES:
            return False
        if self._at_work is not None:
            return not self._at_work(self._next_id)
        # Linux says "reset" where the other end of a Unix socket went without having read everything. A runner reads a
        # batch when it begins with it.
        return isinstance(exc, ConnectionError)

    def _is_at_work(self) -> bool:
        """Whether it is the batch in flight that the process is at work on; yes where nobody can tell."""
        transport = self._transport
        if transport is None:
            return False
        if self._at_work is not None:
            return self._at_work(self._next_id)
        if transport.get_write_buffer_size():
            return False
        try:
            # Of a Unix socket Linux gives what the other end has not read.
            waiting = fcntl.ioctl(transport.get_extra_info("socket"), termios.TIOCOUTQ, bytes(_INT.size))
        except OSError:
            return True
        return _INT.unpack(waiting) == (0,)

    def _finish(self, outcome: Outcome) -> None:
        done, self._done = self._done, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if done is not None:
            done(outcome)

    def _late(self, allowed_s: float) -> None:
        self._wedged(allowed_s, self._sent_at)

    def _wedged(self, allowed_s: float, asked_at: float) -> None:
        log().error("runner.wedged", deployment=self._name, after_s=round(allowed_s, 3))
        self._timer = None
        done, self._done = self._done, None
        # What another front has there may hold it up; then this batch has no part in it.
        unread = done is not None and not self._is_at_work()
        self._given_up += done is not None and not unread and not self._longest_s
        # Not up from now on: who asks next must not be sent to a process that is about to be killed.
        for transport in (self._transport, self._greeted):
            if transport is not None:
                transport.abort()
        self._transport = self._greeted = None
        self._on_wedged(asked_at)
        if done is not None:
            done(
                Outcome(
                    error=DeadlineExceeded(
                        f"model {self._name!r} did not answer within {allowed_s:.1f} s; its process is restarted"
                    ),
                    unread=unread,
                )
            )
