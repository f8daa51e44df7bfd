"""A client that sends the bytes it is told, and reads replies one after another."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)


class Client:
    """One connection. What takes longer than ``timeout_s`` raises TimeoutError."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._buffer = b""

    def send(self, *data: bytes) -> Client:
        """Send all of it."""
        self.socket.sendall(b"".join(data))
        return self

    def reply(self, *, to_head: bool = False) -> Reply:
        """The next reply. Raises EOFError where the connection ends before it is whole."""
        while b"\r\n\r\n" not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = 0 if to_head or int(status) < 200 else int(headers["content-length"])
        while len(self._buffer) < size:
            self._more()
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        return Reply(int(status), headers, body)

    def ends(self) -> bool:
        """Wait for the end of the connection; False where there are more bytes before it."""
        if self._buffer:
            return False
        try:
            return not self.socket.recv(1)
        except (ConnectionResetError, ssl.SSLEOFError):
            return True

    def _more(self) -> None:
        chunk = self.socket.recv(1 << 16)
        if not chunk:
            raise EOFError(f"the connection ended after {self._buffer[:200]!r}")
        self._buffer += chunk


@contextmanager
def connected(port: int, *, tls: ssl.SSLContext | None = None, timeout_s: float = 20) -> Iterator[Client]:
    """A connection to a port of this machine."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as plain:
        if tls is None:
            yield Client(plain)
        else:
            with tls.wrap_socket(plain, server_hostname="localhost") as wrapped:
                yield Client(wrapped)


def request(
    path: str = "/",
    body: bytes = b"",
    *headers: str,
    method: str = "POST",
    version: str = "1.1",
    length: bool = True,
) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {path} HTTP/{version}", "host: localhost", *headers]
    if length:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*pieces: bytes, trailer: bytes = b"") -> bytes:
    """A body in chunks."""
    return (
        b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b"") if piece)
        + b"0\r\n"
        + trailer
        + b"\r\n"
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
