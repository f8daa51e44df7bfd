"""Read an input once from start to end, and know its digest afterwards."""

from __future__ import annotations

import io
import sys
from typing import BinaryIO

from parbake.contract.digest import named, new_hash

_DRAIN_BYTES = 1 << 20


class DigestReader(io.RawIOBase):
    """A binary stream that hashes what is read through it. ``head`` is what was read from it before."""

    def __init__(self, stream: BinaryIO, head: bytes = b"") -> None:
        self._stream = stream
        self._head = head
        self._taken = new_hash()
        self.bytes_read = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Exactly ``size`` bytes, or fewer at the end; all that is left where ``size`` is negative."""
        if size is None or size < 0:
            data = self._head + self._stream.read()
            self._head = b""
        else:
            data, self._head = self._head[:size], self._head[size:]
            # A pipe gives what it has, which may be less.
            while len(data) < size and (more := self._stream.read(size - len(data))):
                data = data + more if data else more
        self._taken.update(data)
        self.bytes_read += len(data)
        return data

    def finish(self) -> tuple[str, int]:
        """Read what is left; gives digest (``blake2b:...``) and size of the whole."""
        while self.read(_DRAIN_BYTES):
            pass
        return named(self._taken), self.bytes_read

    def close(self) -> None:
        """Close the stream, unless it is the standard input."""
        if not self.closed and self._stream is not sys.stdin.buffer:
            self._stream.close()
        super().close()
