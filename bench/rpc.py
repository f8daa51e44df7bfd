"""Put load on a gRPC server from a process of its own: a closed loop of unary calls, frames written by hand on uvloop.

gRPC's own client for Python takes more CPU than the servers it would measure. Here a connection has one call under
way; every answer is decoded once and compared, the same bytes again need no second look.
``python -m bench.rpc`` reads a `Calls` from stdin and writes `bench.load.Measured` to stdout, both as MessagePack.
"""

from __future__ import annotations

import asyncio
import math
import struct
import sys
import time
from typing import Any, Final

import msgspec
import numpy as np
import uvloop
from msgspec import Struct

from bench.load import ClosedLoop, Measured, run_apart
from parbake.contract.datatypes import NUMPY
from parbake.contract.tensors import from_raw
from parbake.transports.grpc.messages import INFERENCE, message

METHOD: Final = f"/{INFERENCE}/ModelInfer"
_GRACE_S: Final = 30.0
_LARGEST_WINDOW: Final = 2**31 - 1

# HTTP/2, RFC 9113: types and flags of frames.
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_INITIAL_WINDOW: Final = 4
_OWN_WINDOW: Final = 65_535
_FRAME: Final = struct.Struct(">I")

# The header block of every call but a connection's first (RFC 7541): POST, http, and what the first has entered.
_AGAIN: Final = bytes([0x83, 0x86, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62])


class Calls(Struct, frozen=True):
    """What to call where. The messages are sent in turn."""

    port: int
    messages: tuple[bytes, ...]
    """``ModelInferRequest``, serialized."""
    connections: int
    seconds: float
    expected: tuple[list[float], ...]
    """The values of the one output, for each message."""
    tolerance: float
    """Largest relative difference."""
    warm_up_s: float = 0.3


def call(calls: Calls) -> Measured:
    """Run the calls in a process of its own. Raises RuntimeError with its words where it ends without a result."""
    return run_apart("bench.rpc", calls, calls.warm_up_s + calls.seconds)


def values(reply: bytes) -> list[float]:
    """The values of the one output of a ``ModelInferResponse``."""
    decoded: Any = message("ModelInferResponse").FromString(reply)
    (output,) = decoded.outputs
    if decoded.raw_output_contents:
        datatype = output.datatype
        found = from_raw(decoded.raw_output_contents[0], datatype, tuple(output.shape))
        return [float(value) for value in np.asarray(found, NUMPY[datatype]).reshape(-1)]
    contents = output.contents
    return list(contents.fp32_contents or contents.fp64_contents)


def close(got: list[float], wanted: list[float], tolerance: float) -> bool:
    """Whether values are the same but for a relative difference; anything is where that is infinite."""
    if math.isinf(tolerance):
        return True
    return len(got) == len(wanted) and all(
        abs(a - b) <= tolerance * max(abs(b), 1e-6) for a, b in zip(got, wanted, strict=True)
    )


class _Run(ClosedLoop):
    """Messages, and the answers to them."""

    def __init__(self, calls: Calls) -> None:
        self.authority = f"127.0.0.1:{calls.port}".encode()
        self._frames = [_data_frame(message) for message in calls.messages]
        self._expected = calls.expected
        self._tolerance = calls.tolerance
        super().__init__(range(len(calls.messages)), len(calls.messages))

    def next(self) -> tuple[int, tuple[bytes, bytes]]:
        """Number of a message, and its frame without the stream's number: what is before and behind that."""
        number = next(self._order)
        return number, self._frames[number]

    def take(self, number: int, reply: bytes) -> None:
        """Check a reply."""
        if reply == self._seen[number]:
            self.right += 1
            return
        # One byte for compression and four for the length stand before the message.
        got = values(reply[5:]) if len(reply) > 5 else []
        if close(got, self._expected[number], self._tolerance):
            self.right += 1
            self._seen[number] = reply
        elif got:
            self.wrong += 1
            self._complain(f"message {number}: expected {self._expected[number]}, got {got}")
        else:
            self.fail(f"message {number}: an error for an answer")


class _Connection(asyncio.Protocol):
    """One connection with one call under way."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._buffer = b""
        self._stream = -1
        self._number = -1
        self._reply = b""
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # a stream transport
        self._run.connected += 1
        settings = struct.pack(">HI", _INITIAL_WINDOW, _LARGEST_WINDOW)
        window = struct.pack(">I", _LARGEST_WINDOW - _OWN_WINDOW)
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, window))
        self._send()

    def _send(self) -> None:
        self._number, (before, behind) = self._run.next()
        first = self._stream < 0
        self._stream += 2
        stream = _FRAME.pack(self._stream)
        block = _first_headers(self._run.authority) if first else _AGAIN
        self._started = time.perf_counter()
        self._transport.write(
            b"".join(
                (_FRAME.pack(len(block) << 8 | _HEADERS), b"\x04", stream, block, before, stream, behind)
            )
        )

    def data_received(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
        at = 0
        while len(data) - at >= 9:
            (head,) = _FRAME.unpack_from(data, at)
            end = at + 9 + (head >> 8)
            if len(data) < end:
                break
            kind, flags = head & 0xFF, data[at + 4]
            if kind == _DATA:
                self._reply += data[at + 9 : end]
                if flags & _END_STREAM:
                    self._answered()
            elif kind == _HEADERS:
                if flags & _END_STREAM:
                    self._answered()
            elif kind == _PING and not flags & _ACK:
                self._transport.write(_frame(_PING, _ACK, 0, data[at + 9 : end]))
            elif kind == _SETTINGS and not flags & _ACK:
                self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind in (_RESET, _GO_AWAY):
                self._run.fail(f"message {self._number}: frame of type {kind}: {data[at + 9 : end]!r}")
                self._number = -1
                self._transport.abort()
                return
            at = end
        self._buffer = data[at:]

    def _answered(self) -> None:
        run = self._run
        run.latencies.append(time.perf_counter() - self._started)
        run.take(self._number, self._reply)
        self._number = -1
        self._reply = b""
        if run.stopping:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.lost += 1
        if self._number >= 0:
            self._run.fail(f"message {self._number}: the connection was closed before the answer ({exc})")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def _data_frame(payload: bytes) -> tuple[bytes, bytes]:
    """A DATA frame that ends its stream, before and behind the stream's number."""
    body = b"\x00" + struct.pack(">I", len(payload)) + payload
    return struct.pack(">IB", len(body) << 8 | _DATA, _END_STREAM), body


def _first_headers(authority: bytes) -> bytes:
    """The header block of a connection's first call, which enters four fields into the server's table."""

    def entry(index: bytes, value: bytes) -> bytes:
        assert len(value) < 127
        return index + bytes([len(value)]) + value

    return b"".join(
        (
            b"\x83\x86",
            entry(b"\x44", METHOD.encode()),
            entry(b"\x41", authority),
            entry(b"\x40\x02te", b"trailers"),
            entry(b"\x5f", b"application/grpc"),
        )
    )


async def _drive(calls: Calls) -> Measured:
    run = _Run(calls)
    loop = asyncio.get_running_loop()
    for _ in range(calls.connections):
        await loop.create_connection(lambda: _Connection(run), "127.0.0.1", calls.port)
    return await run.measure(calls.warm_up_s, calls.seconds)


def main() -> None:
    """Entry point of the process."""
    calls = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Calls)
    sys.stdout.buffer.write(msgspec.msgpack.encode(uvloop.run(_drive(calls))))


if __name__ == "__main__":
    main()
