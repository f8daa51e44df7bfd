"""Parquet files: handed out as ranges of rows, which each worker reads for itself."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parbake.batch.columns import bind
from parbake.batch.model import FileLayout, Piece
from parbake.batch.ports import Rows, Task
from parbake.contract.digest import named, new_hash
from parbake.contract.model import Contract
from parbake.errors import InputFileError

# Small batches: memory that is used again costs nothing, and fresh memory costs more than the work on it.
_BATCH_BYTES: Final = 2 << 20
_BATCH_ROWS: Final = 16_384
_TASK_ROWS: Final = 65_536
_BUFFER_BYTES: Final = 1 << 18
_SMALL_ROWS: Final = 20_000
_ALIGNED: Final = 4096
_DECODE_S: Final = 7e-9
"""Seconds to decode one value, roughly: 30 columns of random float32 took 0.2 us per row."""
_TASK_S: Final = 0.3
_FIRST_ROWS: Final = 256
_NICE: Final = 5


class ParquetSource:
    """Hands out ranges of rows that no earlier run has ``done``; ``workers`` share them.

    A worker stays in its row group as long as that has rows left, because it decodes a group from its
    start. Raises `InputFileError` where the file is not sound Parquet or lacks columns.
    """

    def __init__(
        self, path: Path, name: str, contract: Contract, done: Sequence[Piece] = (), workers: int = 1
    ) -> None:
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
                names = file.schema_arrow.names
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(name, error) from error
        bindings, extra = bind(contract, names, name)
        self.layout = FileLayout(name, "parquet", bindings, extra, path=str(path))
        self.total: int | None = metadata.num_rows
        self.small = metadata.num_rows < _SMALL_ROWS
        self._workers = workers
        self._starts: list[int] = []
        self._left: list[list[tuple[int, int]]] = []
        start = 0
        finished = sorted((piece.start, piece.stop) for piece in done)
        for group in range(metadata.num_row_groups):
            stop = start + metadata.row_group(group).num_rows
            self._starts.append(start)
            self._left.append(gaps(start, stop, finished))
            start = stop
        self._rows_left = sum(b - a for ranges in self._left for a, b in ranges)
        self._at: dict[int, int] = {}
        self._before = _identity(path)
        # The digest takes as long as reading does; it is computed while the rows are scored.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._stop = threading.Event()
        self._digest = self._pool.submit(_digest_of, path, self._stop)

    @property
    def drained(self) -> bool:
        """Whether all rows were handed out."""
        return not self._rows_left

    def next(self, worker: int, rows_per_s: float) -> Task | None:
        """The next range for a worker, smaller towards the end, where all should end together.

        None also for a worker that would be of no use any more.
        """
        group = self._at.get(worker)
        if group is None or not self._left[group]:
            group = self._choose(rows_per_s)
            if group is None:
                return None
            self._at[worker] = group
        share = -(-self._rows_left // (2 * self._workers))
        rows = int(rows_per_s * _TASK_S) or _FIRST_ROWS
        rows = max(1, min(rows, _TASK_ROWS, max(share, _ALIGNED)))
        if rows > _ALIGNED:
            rows -= rows % _ALIGNED
        start, stop = self._left[group][0]
        cut = min(start + rows, stop)
        if cut == stop:
            del self._left[group][0]
        else:
            self._left[group][0] = (cut, stop)
        self._rows_left -= cut - start
        return Task(Piece(start, cut, group=group, group_start=self._starts[group]))

    def finish(self) -> tuple[str, int]:
        """Digest and size. Raises `InputFileError` where the file changed meanwhile."""
        digest, size = self._digest.result()
        if _identity(self._path) != self._before:
            raise InputFileError(
                "the file changed while it was read",
                path=self.layout.name,
                hint="bake again when it is complete",
            )
        return digest, size

    def close(self) -> None:
        """Let go of the file."""
        self._stop.set()
        self._pool.shutdown(wait=True)

    def _choose(self, rows_per_s: float) -> int | None:
        """A row group that nobody reads, else the one with the most rows left, if joining it pays."""
        taken = set(self._at.values())
        left = {group: sum(b - a for a, b in ranges) for group, ranges in enumerate(self._left) if ranges}
        if not left:
            return None
        free = [group for group in left if group not in taken]
        if free:
            return free[0]
        group = max(left, key=lambda g: left[g])
        # A newcomer decodes the group up to where it is now, before it can be of use.
        skipped = self._left[group][0][0] - self._starts[group]
        skip_s = skipped * len(self.layout.needed) * _DECODE_S
        return group if skip_s * rows_per_s <= left[group] else None


class ParquetReader:
    """Reads ranges of rows; quickest where each range of a row group comes after the one before."""

    def __init__(self, layout: FileLayout) -> None:
        self._layout = layout
        try:
            # Without pre-buffering and with a bounded buffer, a row group of any size takes little memory.
            self._file = pq.ParquetFile(layout.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(layout.name, error) from error
        self._group = -1
        self._row = 0
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None

    def rows(self, task: Task) -> Iterator[Rows]:
        """The rows of a range. Raises `InputFileError` where the file is torn."""
        piece = task.piece
        if piece.group != self._group or piece.start < self._row:
            self._open(piece)
        while self._row < piece.stop:
            batch = self._take(piece.stop - self._row)
            start = self._row
            self._row += batch.num_rows
            if self._row <= piece.start:
                continue
            skip = max(0, piece.start - start)
            batch = batch.slice(skip)
            yield Rows(batch, np.arange(start + skip + 1, self._row + 1, dtype=np.int64))

    def _open(self, piece: Piece) -> None:
        columns = list(self._layout.needed)
        self._batches = self._file.iter_batches(
            batch_size=self._batch_rows(piece.group),
            row_groups=[piece.group],
            columns=columns,
            use_threads=False,
        )
        self._group, self._row, self._rest = piece.group, piece.group_start, None

    def _take(self, rows: int) -> Any:
        """At most so many of the next rows."""
        try:
            batch = next(self._batches) if self._rest is None else self._rest
        except StopIteration:
            raise InputFileError(
                "the file has fewer rows than its index says", path=self._layout.name
            ) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(self._layout.name, error) from error
        self._rest = batch.slice(rows) if batch.num_rows > rows else None
        return batch.slice(0, rows)

    def _batch_rows(self, group: int) -> int:
        """Rows that decode to about `_BATCH_BYTES`."""
        metadata = self._file.metadata.row_group(group)
        needed = set(self._layout.needed)
        size = 0
        for at in range(metadata.num_columns):
            column = metadata.column(at)
            if column.path_in_schema.partition(".")[0] in needed:
                size += column.total_uncompressed_size
        rows = _BATCH_BYTES * int(metadata.num_rows) // max(size, 1)
        return max(16, min(rows, _BATCH_ROWS))


def gaps(start: int, stop: int, done: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of [start, stop) that ``done`` (sorted) does not cover."""
    left: list[tuple[int, int]] = []
    at = start
    for a, b in done:
        if b <= at or a >= stop:
            continue
        if a > at:
            left.append((at, a))
        at = max(at, b)
    if at < stop:
        left.append((at, stop))
    return left


def _digest_of(path: Path, stop: threading.Event) -> tuple[str, int]:
    if sys.platform == "linux":
        # Scoring has the processors first; the digest may take what the merge at the end leaves idle.
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
    taken = new_hash()
    with path.open("rb", buffering=0) as handle:
        while not stop.is_set() and (chunk := handle.read(_BUFFER_BYTES)):
            taken.update(chunk)
        return named(taken), handle.tell()


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _unreadable(name: str, error: Exception) -> InputFileError:
    line = (str(error).splitlines() or [""])[0]
    return InputFileError(f"cannot be read as Parquet: {line}", path=name, hint="is the file complete?")
