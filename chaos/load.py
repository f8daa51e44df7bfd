"""Callers in a process of their own: they ask without end, check the value of every answer, and note what they get.

``python -m chaos.load`` reads a `Load` from stdin, and a line when it is to stop; it writes a line when every stream
has had a reply, and then what each stream heard, as MessagePack behind its length in 8 bytes. Times are those of the
system's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, Final

import msgspec
import uvloop
from msgspec import Struct

BROKEN: Final = 0
"""Status of a request whose connection broke before there was an answer."""
REFUSED: Final = -1
"""Status where no connection could be made."""
SILENT: Final = -2
"""Status where nothing came for as long as a caller waits."""

_RECONNECT_S: Final = 0.02
_GRACE_S: Final = 30.0
_READY_S: Final = 60.0
_MOST_OPEN: Final = 4000
"""Connections of a stream that asks at a rate: beyond it callers wait for one another."""

Answer = tuple[float, ...]


class Stream(Struct, frozen=True):
    """Callers of one kind: ``connections`` that each ask again ``pause_s`` after an answer.

    With ``rate`` they ask so often a second, all together, whatever the answers (an open loop), over as many
    connections as that takes; latencies then count from when a request was due.
    """

    name: str
    path: str
    bodies: tuple[bytes, ...]
    accepted: tuple[tuple[Answer, ...], ...]
    """The right answers to each body: the values of its first output."""
    connections: int = 2
    pause_s: float = 0.002
    rate: float = 0.0
    headers: tuple[str, ...] = ()
    patience_s: float = 20.0
    """Time after which a caller gives up, and connects anew."""


class Load(Struct, frozen=True):
    """Whom to ask what."""

    port: int
    streams: tuple[Stream, ...]


class Noted(Struct, frozen=True, array_like=True):
    """One request and what became of it."""

    began: float
    ended: float
    status: int
    code: str
    """Of an error, as its body says; for 200 "" or "wrong"."""
    connection: int
    retry_after: bool = False
    answer: int = -1
    """Number of the accepted answer that it was."""


class Heard(Struct, frozen=True):
    """What the callers of one stream got."""

    name: str
    noted: tuple[Noted, ...]
    complaint: str = ""
    """Its first wrong answer, in words."""
    began: float = 0.0
    ended: float = 0.0

    @property
    def good(self) -> list[Noted]:
        """Right answers, in the order in which they came."""
        return [noted for noted in self.noted if noted.status == 200 and not noted.code]

    @property
    def wrong(self) -> int:
        """Answers with another value than the right one."""
        return sum(noted.code == "wrong" for noted in self.noted)

    @property
    def failed(self) -> list[Noted]:
        """What was not answered with 200."""
        return [noted for noted in self.noted if noted.status != 200]

    def reasons(self) -> dict[str, int]:
        """Failures, counted by what the caller was told."""
        counted: dict[str, int] = {}
        for noted in self.failed:
            name = reason(noted)
            counted[name] = counted.get(name, 0) + 1
        return counted

    def but(self, *codes: str) -> list[Noted]:
        """Failures for other reasons than these codes."""
        return [noted for noted in self.failed if noted.code not in codes]

    def outage_ms(self) -> float:
        """Longest time without a right answer, from the first request to the last."""
        return silence_ms([self])

    def latencies_ms(self) -> list[float]:
        """Of the right answers, in ascending order."""
        return sorted((noted.ended - noted.began) * 1e3 for noted in self.good)


def silence_ms(everybody: Sequence[Heard]) -> float:
    """Longest time in which none of these had a right answer."""
    times = sorted(noted.ended for heard in everybody for noted in heard.good)
    began, ended = min(heard.began for heard in everybody), max(heard.ended for heard in everybody)
    # Answers to the last requests come after the end.
    return max(b - a for a, b in pairwise([began, *times, max([ended, *times])])) * 1e3


def reason(noted: Noted) -> str:
    """What became of a failed request: ``503 runner_down``, or what happened to its connection."""
    words = {BROKEN: "connection broken", REFUSED: "connection refused", SILENT: "no answer"}
    return words.get(noted.status) or f"{noted.status} {noted.code}".rstrip()


class Calls:
    """Callers at work; once the block of `calling` has ended, what they heard."""

    def __init__(self) -> None:
        self.heard: dict[str, Heard] = {}

    def __getitem__(self, name: str) -> Heard:
        return self.heard[name]


@contextmanager
def calling(port: int, *streams: Stream) -> Iterator[Calls]:
    """Have callers ask until the block ends. Raises RuntimeError where none of a stream's requests comes back."""
    process = subprocess.Popen(
        [sys.executable, "-m", "chaos.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    calls = Calls()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        load = msgspec.msgpack.encode(Load(port, streams))
        process.stdin.write(len(load).to_bytes(8, "big") + load)
        process.stdin.flush()
        if process.stdout.readline() != b"asking\n":
            raise RuntimeError("the callers got no reply")
        yield calls
        process.stdin.write(b"\n")
        process.stdin.close()
        told = process.stdout.read()
        if process.wait(_GRACE_S) or len(told) < 8 or int.from_bytes(told[:8], "big") != len(told) - 8:
            raise RuntimeError(
                f"the callers ended with {process.returncode} after {len(told)} bytes: {told[:20]!r}"
            )
        found = msgspec.msgpack.decode(told[8:], type=list[Heard])
        calls.heard = {heard.name: heard for heard in found}
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class _Stream:
    """What the connections of one stream share."""

    def __init__(self, port: int, asked: Stream) -> None:
        self.port = port
        self.asked = asked
        more = "".join(f"{line}\r\n" for line in asked.headers)
        head = f"POST {asked.path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{more}content-type: application/json\r\n"
        self.requests = [
            f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in asked.bodies
        ]
        self.right: list[dict[bytes, int]] = [{} for _ in asked.bodies]
        """Replies to each body that were right, and which answer they are: the same bytes need no second look."""
        self.noted: list[Noted] = []
        self.free: list[_Connection] = []
        self.open = 0
        self.complaint = ""
        self.stopping = False
        self.number = 0
        self.heard_first = asyncio.Event()

    def next(self) -> int:
        """The number of the next body."""
        self.number += 1
        return self.number % len(self.requests)

    def note(
        self, began: float, status: int, code: str, connection: int, retry: bool = False, answer: int = -1
    ) -> None:
        """Keep what became of a request."""
        self.noted.append(Noted(began, time.monotonic(), status, code, connection, retry, answer))
        self.heard_first.set()

    def check(self, body: int, payload: bytes) -> int:
        """Which of the accepted answers this is; -1 for none of them."""
        known = self.right[body].get(payload)
        if known is not None:
            return known
        try:
            got = tuple(map(float, msgspec.json.decode(payload)["outputs"][0]["data"]))
        except (msgspec.DecodeError, LookupError, TypeError, ValueError):
            got = ()
        if got in self.asked.accepted[body]:
            found = self.right[body][payload] = self.asked.accepted[body].index(got)
            return found
        self.complaint = self.complaint or (
            f"wrong: {self.asked.bodies[body][:200]!r} was answered {payload[:200]!r}, "
            f"right is one of {self.asked.accepted[body]}"
        )
        return -1


class _Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self, stream: _Stream, number: int) -> None:
        self._stream = stream
        self._number = number
        self._buffer = b""
        self._body = -1
        self._began = 0.0
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream transport

    def ask(self, began: float) -> asyncio.Future[None]:
        """Send a request; the future is done when it is answered or broken."""
        assert self._transport is not None
        self._body = self._stream.next()
        self._began = began
        self.done = asyncio.get_running_loop().create_future()
        self._transport.write(self._stream.requests[self._body])
        return self.done

    def give_up(self) -> None:
        """Nobody waits for the answer any more."""
        self._finish(SILENT, "")
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        head, separator, rest = data.partition(b"\r\n\r\n")
        if not separator:
            self._buffer = data
            return
        status, length, retry, closes = _read_head(head)
        if len(rest) < length:
            self._buffer = data
            return
        self._buffer = b""
        payload = rest[:length]
        answer = self._stream.check(self._body, payload) if status == 200 else -1
        code = _code(payload) if status != 200 else "" if answer >= 0 else "wrong"
        if closes:
            self.lost = True
        self._finish(status, code, retry, answer)
        if closes:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._finish(BROKEN, "")

    def _finish(self, status: int, code: str, retry: bool = False, answer: int = -1) -> None:
        done, self.done = self.done, None
        if done is not None:
            self._stream.note(self._began, status, code, self._number, retry, answer)
            if not done.done():
                done.set_result(None)


def _read_head(head: bytes) -> tuple[int, int, bool, bool]:
    """Status, length, whether it has Retry-After, and whether the connection ends with it."""
    first, *lines = head.split(b"\r\n")
    length, retry, closes = 0, False, False
    for line in lines:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-length":
            length = int(value)
        elif name == b"retry-after":
            retry = int(value) >= 1
        elif name == b"connection":
            closes = value.strip().lower() == b"close"
    return int(first.split(b" ", 2)[1]), length, retry, closes


def _code(payload: bytes) -> str:
    try:
        return str(msgspec.json.decode(payload)["code"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return ""


async def _connect(stream: _Stream, number: int, began: float) -> _Connection | None:
    """A new connection, or None where there was none to be had, which is noted."""
    loop = asyncio.get_running_loop()
    try:
        _, connection = await asyncio.wait_for(
            loop.create_connection(lambda: _Connection(stream, number), "127.0.0.1", stream.port),
            stream.asked.patience_s,
        )
    except TimeoutError:
        stream.note(began, SILENT, "", number)
        return None
    except OSError:
        stream.note(began, REFUSED, "", number)
        return None
    return connection


async def _ask(connection: _Connection, began: float, patience_s: float) -> None:
    done = connection.ask(began)
    finished, _ = await asyncio.wait((done,), timeout=patience_s)
    if not finished:
        connection.give_up()


async def _closed_loop(stream: _Stream, number: int) -> None:
    """One caller: the next request a moment after the answer to the last."""
    connection: _Connection | None = None
    while not stream.stopping:
        if connection is None or connection.lost:
            connection = await _connect(stream, number, time.monotonic())
            if connection is None:
                await asyncio.sleep(_RECONNECT_S)
                continue
        await _ask(connection, time.monotonic(), stream.asked.patience_s)
        await asyncio.sleep(stream.asked.pause_s)
    if connection is not None:
        connection.close()


async def _open_loop(stream: _Stream) -> None:
    """As many requests a second as there shall be, each on a connection that is free."""
    every_s = 1 / stream.asked.rate
    due = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    while not stream.stopping:
        now = time.monotonic()
        while due <= now:
            task = asyncio.create_task(_one(stream, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += every_s
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
    if tasks:
        await asyncio.wait(tasks)
    for connection in stream.free:
        connection.close()


async def _one(stream: _Stream, due: float) -> None:
    while True:
        while stream.free:
            connection: _Connection | None = stream.free.pop()
            if connection is not None and not connection.lost:
                break
        else:
            if stream.open >= _MOST_OPEN:
                await asyncio.sleep(0.005)
                continue
            stream.open += 1
            connection = await _connect(stream, stream.open, due)
        break
    if connection is None:
        stream.open -= 1
        return
    await _ask(connection, due, stream.asked.patience_s)
    if connection.lost:
        stream.open -= 1
    else:
        stream.free.append(connection)


async def _drive(load: Load) -> list[Heard]:
    began = time.monotonic()
    streams = [_Stream(load.port, asked) for asked in load.streams]
    works: list[asyncio.Task[None]] = []
    for stream in streams:
        if stream.asked.rate:
            works.append(asyncio.create_task(_open_loop(stream)))
        else:
            works += [
                asyncio.create_task(_closed_loop(stream, number))
                for number in range(stream.asked.connections)
            ]
    await asyncio.wait_for(asyncio.gather(*(stream.heard_first.wait() for stream in streams)), _READY_S)
    sys.stdout.buffer.write(b"asking\n")
    sys.stdout.buffer.flush()
    await asyncio.to_thread(sys.stdin.buffer.readline)
    ended = time.monotonic()
    for stream in streams:
        stream.stopping = True
    await asyncio.wait(works, timeout=_GRACE_S)
    for work in works:
        work.cancel()
    return [Heard(s.asked.name, tuple(s.noted), s.complaint, began, ended) for s in streams]


def main() -> None:
    """Entry point of the process."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    load: Any = msgspec.msgpack.decode(sys.stdin.buffer.read(size), type=Load)
    told = msgspec.msgpack.encode(uvloop.run(_drive(load)))
    # With PYTHONUNBUFFERED a write to stdout itself may end in the middle.
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:
        out.write(len(told).to_bytes(8, "big") + told)


if __name__ == "__main__":
    main()
