"""The files of a prediction log: their names, and the open file that can be read however its writer ended.

A file that is being written (``.arrows``) is a sequence of frames: 4 bytes ``PBL1``, length and CRC-32 of what
follows (both uint32, little-endian), and that many bytes, a complete Arrow IPC stream. A frame stands by itself, so
that a file cut short anywhere gives all rows up to its last whole frame. Parquet has its index at the end and gives
nothing in that case, and so a file becomes Parquet only when it is finished. A writer holds a lock
(flock) on the file that it writes, which the system takes back when the process ends, so that others know whose
file is orphaned.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

OPEN_SUFFIX: Final = ".arrows"
DONE_SUFFIX: Final = ".parquet"
_TMP_SUFFIX: Final = ".parquet.tmp"

_NAME: Final = re.compile(
    r"predictions-(\d{8}T\d{12}Z)-f\d{1,6}-p\d{1,10}-[0-9a-f]{8}(\.arrows|\.parquet)", re.ASCII
)
_FRAME: Final = struct.Struct("<4sII")
_MAGIC: Final = b"PBL1"
_MOST_FRAME: Final = 512 * 1024 * 1024
_NEW_S: Final = 60.0
_GROUP_ROWS: Final = 128 * 1024

_NAMES: Final = pa.dictionary(pa.int32(), pa.string())

SCHEMA: Final = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("deployment", _NAMES),
        pa.field("version", _NAMES),
        pa.field("mode", _NAMES),
        pa.field("digest", _NAMES),
        pa.field("key", pa.binary(16)),
        pa.field("where", _NAMES),
        pa.field("milliseconds", pa.float32()),
        pa.field("status", _NAMES),
        pa.field("inputs", pa.list_(pa.binary())),
        pa.field("outputs", pa.binary()),
    ]
)
"""Columns of the log. ``key`` is null where a request was refused before it had one; ``inputs`` has an element per
input of the contract, ``outputs`` the record of `parbake.contract.record`; both are null where they are not kept."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file of a log; ``stamp`` orders files by the time of their first row."""

    path: Path
    stamp: str
    bytes: int
    modified_s: float

    @property
    def finished(self) -> bool:
        """Whether it is Parquet."""
        return self.path.suffix == DONE_SUFFIX


def file_name(time_s: float, front: int) -> str:
    """A new name, without suffix: no other front, process or restart makes the same."""
    stamp = datetime.fromtimestamp(time_s, UTC).strftime("%Y%m%dT%H%M%S%f")
    return f"predictions-{stamp}Z-f{front}-p{os.getpid()}-{os.urandom(4).hex()}"


def log_files(folder: Path) -> list[LogFile]:
    """The log's files by the time of their first row. Whatever has another name is not the log's."""
    found: dict[str, LogFile] = {}
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return []
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if not match or not entry.is_file(follow_symlinks=False):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        stem = entry.name.removesuffix(match[2])
        # Both are there for a moment when a file is finished: the Parquet file is whole by then.
        if stem not in found or match[2] == DONE_SUFFIX:
            found[stem] = LogFile(Path(entry.path), match[1], status.st_size, status.st_mtime)
    return sorted(found.values(), key=lambda file: (file.stamp, file.path.name))


class OpenFile:
    """The file that one writer appends to. Every method may raise OSError, and leaves whole frames."""

    def __init__(self, folder: Path, time_s: float, front: int) -> None:
        self.path = folder / (file_name(time_s, front) + OPEN_SUFFIX)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        # What people asked and were told is nobody else's business.
        self._file = os.open(self.path, flags, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.bytes = 0
        self.rows = 0

    def append(self, batch: pa.RecordBatch) -> None:
        """Add a frame; if it cannot be written whole, what was written of it is cut off again."""
        frame = _frame(batch)
        try:
            rest = memoryview(frame)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self.bytes)
            raise
        self.bytes += len(frame)
        self.rows += batch.num_rows

    def finish(self) -> None:
        """Make it a Parquet file. If that fails it stays as it is, readable, for `recover` to try again."""
        try:
            if self.rows:
                _to_parquet(self.path)
            else:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._file)


def recover(folder: Path) -> int:
    """Finish what writers left that are no more; returns how many files that were. Raises OSError."""
    done = 0
    for file in log_files(folder):
        if file.finished or is_new(file):
            continue
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody else may have finished it between the look and the lock.
            if file.path.exists():
                _to_parquet(file.path)
                done += 1
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return done


def is_new(file: LogFile) -> bool:
    """Whether its writer may be between making it and locking it, and must not find it locked by somebody else."""
    return file.bytes == 0 and time() - file.modified_s < _NEW_S


def is_written(path: Path) -> bool:
    """Whether a living writer holds that file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def read_frames(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The batches of an open file. Raises ValueError, after the last whole one, where the file goes on but is torn."""
    while True:
        head = file.read(_FRAME.size)
        if not head:
            return
        if len(head) < _FRAME.size:
            raise ValueError("the last rows are cut short")
        magic, size, check = _FRAME.unpack(head)
        if magic != _MAGIC or size > _MOST_FRAME:
            raise ValueError("these are not rows of a prediction log")
        body = file.read(size)
        if len(body) < size:
            raise ValueError("the last rows are cut short")
        if zlib.crc32(body) != check:
            raise ValueError("rows are altered")
        try:
            with pa.ipc.open_stream(body) as stream:
                batches = list(stream)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"rows cannot be read: {error}") from error
        yield from batches


def as_table(batches: list[pa.RecordBatch]) -> pa.Table:
    """Batches as one table, whose batches share one dictionary per column."""
    return pa.Table.from_batches(batches, SCHEMA).unify_dictionaries().combine_chunks()


def _frame(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    # To wake a thread for each column costs several times what is to be done.
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as stream:
        stream.write_batch(batch)
    body: bytes = sink.getvalue().to_pybytes()
    return _FRAME.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def _to_parquet(path: Path) -> None:
    stem = path.name.removesuffix(OPEN_SUFFIX)
    draft, final = path.with_name(stem + _TMP_SUFFIX), path.with_name(stem + DONE_SUFFIX)
    named = [field.name for field in SCHEMA if field.type == _NAMES]
    rows = 0
    try:
        descriptor = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with path.open("rb") as source, os.fdopen(descriptor, "wb") as sink:
            with _parquet_writer(sink, named) as writer:
                waiting: list[pa.RecordBatch] = []
                # A torn end is what a killed writer leaves; all before it counts.
                with suppress(ValueError):
                    for batch in read_frames(source):
                        waiting.append(batch)
                        rows += batch.num_rows
                        if sum(one.num_rows for one in waiting) >= _GROUP_ROWS:
                            writer.write_table(as_table(waiting))
                            waiting = []
                if waiting:
                    writer.write_table(as_table(waiting))
            sink.flush()
            os.fsync(sink.fileno())
        if rows:
            draft.rename(final)
    finally:
        draft.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _parquet_writer(sink: BinaryIO, named: list[str]) -> Any:
    return pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=[*named, "key"], version="2.6")
