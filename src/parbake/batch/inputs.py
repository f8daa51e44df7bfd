"""Open a file of rows or the standard input, and find out which format it has."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal

from parbake.batch.model import FORMATS, FileLayout, Format, Piece
from parbake.batch.ports import Source
from parbake.batch.stream import DigestReader
from parbake.contract.digest import digest_of_file, named, new_hash
from parbake.contract.model import Contract
from parbake.errors import InputFileError

STANDARD_INPUT: Final = "-"
_HEAD_BYTES: Final = 4096
_COPY_BYTES: Final = 1 << 20
_ARROW_STREAM: Final = b"\xff\xff\xff\xff"
_OTHERS: Final = {
    b"\x1f\x8b": ("gzip", "zcat FILE | parbake bake ... --input -"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstdcat FILE | parbake bake ... --input -"),
    b"PK\x03\x04": ("zip", "unzip -p FILE | parbake bake ... --input -"),
    b"\xff\xfe": ("UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "save it as UTF-8"),
}


class Input:
    """A file of rows, or the standard input, of known format.

    Raises `InputFileError` where there is nothing to read, or the format is none of ours.
    """

    def __init__(self, name: str, *, kind: Format | None = None) -> None:
        if kind is not None and kind not in FORMATS:
            raise InputFileError(f"format {kind!r} is not known", hint=f"formats are {', '.join(FORMATS)}")
        self.name = "standard input" if name == STANDARD_INPUT else name
        try:
            stream = _opened(name)
            # A pipe, under whatever name, is read once.
            whole = name != STANDARD_INPUT and stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            self.path: Path | None = Path(name) if whole else None
            """Where it can be read again; None for what can be read once."""
            self._head = _first(stream)
        except OSError as error:
            raise InputFileError(
                f"cannot be read: {error.strerror}",
                path=self.name,
                hint="name one file, or - for the standard input",
            ) from error
        self._stream: BinaryIO | None = stream
        try:
            if not self._head:
                raise InputFileError("is empty", path=self.name, hint="it needs at least one row")
            self.format: Format = kind or _sniff(self._head, self.name)
        except InputFileError:
            self.close()
            raise
        self._arrow_file = self._head.startswith(b"ARROW1")

    def __enter__(self) -> Input:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int | None:
        """Bytes, where they are known."""
        return self.path.stat().st_size if self.path is not None else None

    @property
    def identity(self) -> str:
        """What tells, without reading it all, that a file is the same as before; empty where only content does."""
        if self.format != "parquet" or self.path is None:
            return ""
        now = self.path.stat()
        return f"{now.st_size} {now.st_mtime_ns} {now.st_ctime_ns} {now.st_dev} {now.st_ino}"

    def keep(self, spool: Path) -> str:
        """Copy what can be read once to a file, so that it can be read again; gives its digest. Raises OSError."""
        if self._stream is None:
            raise RuntimeError("it was read already")
        taken = new_hash()
        with spool.open("wb") as out:
            chunk = self._head
            while chunk:
                taken.update(chunk)
                out.write(chunk)
                chunk = self._stream.read(_COPY_BYTES)
        self.close()
        self.path = spool
        return named(taken)

    def source(self, contract: Contract, done: Collection[Piece], workers: int) -> Source:
        """The input as pieces, those not handed out that are ``done``. Raises `InputFileError`."""
        if self.format == "parquet":
            from parbake.batch.parquet import ParquetSource

            if self.path is None:
                raise RuntimeError("Parquet is read from a file")
            self.close()
            return ParquetSource(self.path, self.name, contract, list(done), workers)
        known = {(piece.start, piece.digest) for piece in done}
        return self._fed(contract, lambda piece: (piece.start, piece.digest) in known)

    def pieces(self, contract: Contract) -> set[tuple[int, bytes]]:
        """Start and digest of all pieces, by reading the whole file (not for Parquet)."""
        found: set[tuple[int, bytes]] = set()

        def note(piece: Piece) -> bool:
            found.add((piece.start, piece.digest))
            return True

        source = self._fed(contract, note)
        while source.next(0, 0.0) is not None:
            pass
        source.close()
        return found

    def close(self) -> None:
        """Let go of what no source took over."""
        if self._stream is not None and self._stream is not sys.stdin.buffer:
            self._stream.close()
        self._stream = None

    def _fed(self, contract: Contract, done: Callable[[Piece], bool]) -> Source:
        if self._stream is not None:
            stream = DigestReader(self._stream, self._head)
            self._stream = None
        elif self.path is not None:
            stream = DigestReader(self.path.open("rb", buffering=0))
        else:
            raise RuntimeError("it was read already")
        try:
            if self.format == "arrow":
                from parbake.batch.arrow import ArrowSource

                return ArrowSource(
                    stream, self.name, contract, is_file=self._arrow_file, size=self.size, done=done
                )
            from parbake.batch.text import TextSource

            kind: Literal["csv", "jsonl"] = "csv" if self.format == "csv" else "jsonl"
            return TextSource(stream, self.name, contract, kind=kind, size=self.size, done=done)
        except BaseException:
            stream.close()
            raise


def word_of(layout: FileLayout) -> str:
    """What numbers of rows count in this format."""
    return "line" if layout.format in ("csv", "jsonl") else "row"


def digest_of(path: Path) -> str:
    """``blake2b:...`` of a file. Raises `InputFileError`."""
    try:
        with path.open("rb") as handle:
            return digest_of_file(handle)
    except OSError as error:
        raise InputFileError(f"cannot be read: {error.strerror}", path=str(path)) from error


def _opened(name: str) -> BinaryIO:
    return sys.stdin.buffer if name == STANDARD_INPUT else Path(name).open("rb", buffering=0)


def _first(stream: BinaryIO) -> bytes:
    head = b""
    while len(head) < _HEAD_BYTES and (more := stream.read(_HEAD_BYTES - len(head))):
        head += more
    return head


def _sniff(head: bytes, name: str) -> Format:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", _ARROW_STREAM)):
        return "arrow"
    for magic, (what, hint) in _OTHERS.items():
        if head.startswith(magic):
            raise InputFileError(f"is {what}", path=name, hint=hint)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        return "jsonl"
    if text.startswith(b"["):
        raise InputFileError("is one JSON array", path=name, hint="write one object per line (JSON lines)")
    if b"\0" in head:
        raise InputFileError(
            "is neither Parquet, Arrow, CSV nor JSON lines", path=name, hint=f"it starts with {head[:8]!r}"
        )
    return "csv"
