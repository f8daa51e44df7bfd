"""What the bake and its worker processes say to each other over a socket pair."""

from __future__ import annotations

import socket
import struct
from typing import Final

import msgspec
from msgspec import Struct

from parbake.batch.model import Piece, Tally
from parbake.batch.ports import Task
from parbake.batch.scorer import ScoringJob
from parbake.errors import ParbakeError


class Begin(Struct, frozen=True, tag="begin"):
    """To a worker: what to score."""

    job: ScoringJob


class Score(Struct, frozen=True, tag="score"):
    """To a worker: one piece. Its content follows as a message of its own where the piece has a digest."""

    piece: Piece


class End(Struct, frozen=True, tag="end"):
    """To a worker: there is no more. From a worker: everything it scored is in segments."""


class Ready(Struct, frozen=True, tag="ready"):
    """From a worker: the model is loaded."""


class Done(Struct, frozen=True, tag="done"):
    """From a worker: one piece is scored."""

    tally: Tally
    seconds: float


class Written(Struct, frozen=True, tag="written"):
    """From a worker: a segment is finished."""

    path: str


class Failed(Struct, frozen=True, tag="failed"):
    """From a worker: it cannot go on, and ends."""

    code: str
    message: str
    hint: str
    path: str


Order = Begin | Score | End
Reply = Ready | Done | Written | End | Failed

_LENGTH: Final = struct.Struct("<Q")

_orders: Final = msgspec.msgpack.Decoder(Order)
_replies: Final = msgspec.msgpack.Decoder(Reply)


class Connection:
    """Messages over one end of a socket pair, each behind its length."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """The descriptor to wait for."""
        return self._socket.fileno()

    def send(self, message: Order | Reply, payload: bytes = b"") -> None:
        """Send a message, and what follows it. Raises OSError where the other side is gone."""
        data = msgspec.msgpack.encode(message)
        head = _LENGTH.pack(len(data)) + data
        self._socket.sendall(head + _LENGTH.pack(len(payload)) + payload if payload else head)

    def order(self) -> Begin | Task | End:
        """The next order, complete. Raises EOFError or OSError where the other side is gone."""
        order: Order = _orders.decode(self._receive())
        if isinstance(order, Score):
            return Task(order.piece, self._receive() if order.piece.digest else b"")
        return order

    def reply(self) -> Reply:
        """The next reply. Raises EOFError or OSError where the other side is gone."""
        reply: Reply = _replies.decode(self._receive())
        return reply

    def _receive(self) -> bytes:
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return bytes(data)


def failure(error: ParbakeError) -> Failed:
    """An error to be raised on the other side."""
    return Failed(error.code, error.message, error.hint, error.path)


def raised(failed: Failed) -> ParbakeError:
    """The error that a worker met, of the class it had there."""
    found: list[type[ParbakeError]] = [ParbakeError]
    for kind in found:
        if kind.code == failed.code:
            break
        found += kind.__subclasses__()
    else:
        kind = ParbakeError
    error = kind.__new__(kind)
    # Some classes take other arguments than their message.
    ParbakeError.__init__(error, failed.message, hint=failed.hint, path=failed.path)
    return error
