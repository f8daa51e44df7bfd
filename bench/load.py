"""Put load on a server from a process of its own, and check every answer: a closed loop over HTTP/1.1 on uvloop.

Each connection sends its next request when the reply to the last one is here, so the number of connections is the
number of requests under way. A request's latency is the time from writing it to having read the whole reply.
``python -m bench.load`` reads a `Load` from stdin and writes `Measured` to stdout, both as MessagePack.
"""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import Any, Final, TypeAlias

import msgspec
import uvloop
from msgspec import Struct

Outputs: TypeAlias = list[list[Any]]
"""The values of one prediction: the ``data`` of each output of the Open Inference Protocol, in order."""

JSON: Final = {"content-type": "application/json"}
_MOST_HEADS: Final = 1024
_GRACE_S: Final = 30.0


class Load(Struct, frozen=True):
    """What to send where. The body number ``order[i]`` is sent as request ``i``; the order begins again at its end."""

    port: int
    path: str
    bodies: tuple[bytes, ...]
    order: tuple[int, ...]
    connections: int
    seconds: float
    """Length of the measured window, at most."""
    once: bool = False
    """Whether the window ends when all of the order has been sent."""
    mark: int = 0
    """Number of a request; the time is noted at which it is sent."""
    warm_up_s: float = 0.5
    """Time under the same load before the window begins; its answers are checked too."""
    expected: tuple[Outputs, ...] = ()
    """The right answer to each body; without them a 200 is all that is asked for."""
    host: str = "127.0.0.1"
    headers: dict[str, str] = msgspec.field(default_factory=lambda: dict(JSON))


class Measured(Struct, frozen=True):
    """What came back. ``requests``, ``seconds``, ``busy`` and latencies are of the window, the rest is of all."""

    requests: int
    """Replies of any kind in the window."""
    seconds: float
    p50_ms: float
    p99_ms: float
    busy: float
    """Share of the window in which this load generator was on a CPU: near 1 it may have been the limit."""
    right: int = 0
    """Predictions equal to the expected one."""
    wrong: int = 0
    """Predictions that differ from it."""
    unknown: int = 0
    """404 because the row is not in the prediction table."""
    failed: int = 0
    """Anything else."""
    whole: bool = False
    """Whether all of an order that was to be sent once has been."""
    marked_s: float = 0.0
    """From the beginning of the window until the request was sent that was to be marked; 0 where it was not."""
    complaint: str = ""
    """The first wrong or failed reply, in words."""
    bodies_answered: tuple[int, ...] = ()
    """Numbers of the bodies that got a prediction."""
    bodies_unknown: tuple[int, ...] = ()
    """Numbers of the bodies that got that 404."""

    @property
    def requests_per_s(self) -> float:
        """Replies per second in the window."""
        return self.requests / self.seconds


@contextmanager
def pouring(load: Load) -> Iterator[None]:
    """Keep a load on while the block runs, ``load.seconds`` at most. Raises RuntimeError where a request failed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.msgpack.encode(load))
        process.stdin.close()
        yield
        process.terminate()
        assert process.stdout is not None
        found = msgspec.msgpack.decode(process.stdout.read(), type=Measured)
        if found.failed or found.wrong:
            raise RuntimeError(f"{found.failed + found.wrong} failures; first: {found.complaint}")
    finally:
        process.kill()
        process.wait()


def put(load: Load) -> Measured:
    """Run the load in a process of its own. Raises RuntimeError with its words where it ends without a result."""
    return run_apart("bench.load", load, load.warm_up_s + load.seconds)


def run_apart(module: str, load: Struct, seconds: float) -> Measured:
    """Run a load generator's module for a load that takes so long. Raises RuntimeError where it has no result."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=msgspec.msgpack.encode(load),
        capture_output=True,
        timeout=seconds + 2 * _GRACE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    return msgspec.msgpack.decode(done.stdout, type=Measured)


class ClosedLoop:
    """What all connections of one load share: what is to be sent next, and what came of it."""

    def __init__(self, order: Iterable[int], bodies: int, *, once: bool = False, mark: int = 0) -> None:
        self._over = asyncio.Event()
        self._mark, self._marked, self._whole = mark, 0.0, False
        self._order: Iterator[int] = self._through(tuple(order)) if once else cycle(order)
        self._seen: list[bytes | None] = [None] * bodies
        """The last reply to each body that was in order: the same bytes need no second look."""
        self.latencies: list[float] = []
        self.connected = self.lost = 0
        self.stopping = False
        self.right = self.wrong = self.failed = self.unknown = 0
        self.complaint = ""

    def _through(self, order: Sequence[int]) -> Iterator[int]:
        for at, number in enumerate(order):
            if at == self._mark:
                self._marked = time.perf_counter()
            yield number
        self._whole = True
        self._over.set()
        # What is answered before that is seen asks for one more.
        yield from cycle(order)

    def fail(self, words: str) -> None:
        """Count a request that got no reply."""
        self.failed += 1
        self._complain(words)

    def _complain(self, words: str) -> None:
        self.complaint = self.complaint or words

    async def measure(self, warm_up_s: float, seconds: float) -> Measured:
        """Look on for so long, or until SIGTERM or the order's end; then wait for the last replies.

        Connections have been made.
        """
        await asyncio.sleep(warm_up_s)
        self.latencies.clear()
        started, busy = time.perf_counter(), time.process_time()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._over.set)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        latencies, self.latencies = self.latencies, []
        self.stopping = True
        limit = time.perf_counter() + _GRACE_S
        while self.lost < self.connected:
            if time.perf_counter() > limit:
                self.fail(f"{self.connected - self.lost} requests were not answered within {_GRACE_S:g} s")
                break
            await asyncio.sleep(0.005)
        latencies.sort()
        return Measured(
            requests=len(latencies),
            seconds=seconds,
            p50_ms=percentile_ms(latencies, 0.50),
            p99_ms=percentile_ms(latencies, 0.99),
            busy=busy / seconds,
            right=self.right,
            wrong=self.wrong,
            unknown=self.unknown,
            failed=self.failed,
            whole=self._whole,
            marked_s=max(self._marked - started, 0.0),
            complaint=self.complaint,
        )


class _Run(ClosedLoop):
    """Bodies, and the replies to them."""

    def __init__(self, load: Load) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
        head = f"POST {load.path} HTTP/1.1\r\nhost: {load.host}:{load.port}\r\n{lines}"
        self._requests = [
            f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in load.bodies
        ]
        self._expected = load.expected
        super().__init__(load.order, len(load.bodies), once=load.once, mark=load.mark)
        self.heads: dict[bytes, tuple[int, int]] = {}
        self.bodies_answered: set[int] = set()
        self.bodies_unknown: set[int] = set()

    def next(self) -> tuple[int, bytes]:
        """Number and bytes of the next request."""
        number = next(self._order)
        return number, self._requests[number]

    def take(self, number: int, status: int, payload: bytes) -> None:
        """Check a reply."""
        if payload == self._seen[number]:
            if status == 200:
                self.right += 1
            else:
                self.unknown += 1
        else:
            self._look(number, status, payload)

    def _look(self, number: int, status: int, payload: bytes) -> None:
        if status == 200:
            got = None
            if self._expected:
                reply = msgspec.json.decode(payload)
                got = [output["data"] for output in reply["outputs"]]
            if got is None or got == self._expected[number]:
                self.right += 1
                self.bodies_answered.add(number)
                self._seen[number] = payload
            else:
                self.wrong += 1
                self._complain(f"body {number}: expected {self._expected[number]}, got {got}")
        elif status == 404 and msgspec.json.decode(payload).get("code") == "key_not_baked":
            self.unknown += 1
            self.bodies_unknown.add(number)
            self._seen[number] = payload
        else:
            self.failed += 1
            self._complain(f"body {number}: status {status}, {payload[:500].decode(errors='replace')}")


class _Connection(asyncio.Protocol):
    """One connection with one request under way."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._buffer = b""
        self._number = -1
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # a stream transport
        self._run.connected += 1
        self._send()

    def _send(self) -> None:
        self._number, request = self._run.next()
        self._started = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._buffer = data
            return
        heads = self._run.heads
        head = data[:end]
        known = heads.get(head)
        if known is None:
            if len(heads) >= _MOST_HEADS:
                heads.clear()
            known = heads[head] = _read_head(head)
        status, length = known
        size = end + 4 + length
        if len(data) < size:
            self._buffer = data
            return
        ended = time.perf_counter()
        run = self._run
        if len(data) > size:
            run.fail(f"{len(data) - size} bytes more than the reply's content-length")
            self._transport.abort()
            return
        self._buffer = b""
        run.latencies.append(ended - self._started)
        run.take(self._number, status, data[end + 4 :])
        self._number = -1
        if run.stopping:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.lost += 1
        if self._number >= 0:
            self._run.fail(f"body {self._number}: the connection was closed before the reply ({exc})")


def _read_head(head: bytes) -> tuple[int, int]:
    """Status and content-length of a reply. Raises ValueError where it has no content-length."""
    status_line, *lines = head.split(b"\r\n")
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(status_line.split(b" ", 2)[1]), int(value)
    raise ValueError(f"a reply without content-length: {head!r}")


async def _drive(load: Load) -> Measured:
    run = _Run(load)
    loop = asyncio.get_running_loop()
    for _ in range(load.connections):
        await loop.create_connection(lambda: _Connection(run), load.host, load.port)
    found = await run.measure(load.warm_up_s, load.seconds)
    return msgspec.structs.replace(
        found,
        bodies_answered=tuple(sorted(run.bodies_answered)),
        bodies_unknown=tuple(sorted(run.bodies_unknown)),
    )


def percentile_ms(ordered: list[float], share: float) -> float:
    """The smallest of some seconds that at least this share of them does not exceed, in milliseconds (nearest rank)."""
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] * 1e3 if ordered else math.nan


def main() -> None:
    """Entry point of the process."""
    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Load)
    sys.stdout.buffer.write(msgspec.msgpack.encode(uvloop.run(_drive(load))))


if __name__ == "__main__":
    main()
