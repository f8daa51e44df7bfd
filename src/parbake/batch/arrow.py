"""Arrow IPC files and streams: read once, from start to end, and handed over in pieces.

A file is the stream's bytes between a magic word and an index, so one way of reading serves for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import pyarrow as pa

from parbake.batch.columns import bind
from parbake.batch.model import FileLayout, Piece
from parbake.batch.ports import Rows, Task
from parbake.batch.stream import DigestReader
from parbake.contract.model import Contract
from parbake.errors import InputFileError

_PIECE_BYTES: Final = 1 << 20
_LEAST_PIECE_BYTES: Final = 1 << 14
_PIECE_ROWS: Final = 65_536
_SMALL_BYTES: Final = 2 << 20


class ArrowSource:
    """Hands out slices of record batches, leaving out those that ``done`` names with the same content."""

    def __init__(
        self,
        stream: DigestReader,
        name: str,
        contract: Contract,
        *,
        is_file: bool,
        size: int | None,
        done: Callable[[Piece], bool],
    ) -> None:
        self._stream = stream
        self._done = done
        self._name = name
        try:
            if is_file:
                stream.read(8)
            self._batches = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"))
        except (pa.ArrowInvalid, OSError) as error:
            raise _unreadable(name, error) from error
        bindings, extra = bind(contract, self._batches.schema.names, name)
        self.layout = FileLayout(name, "arrow", bindings, extra)
        self.total: int | None = None
        self.drained = False
        self.small = size is not None and size < _SMALL_BYTES
        self._tasks = self._cut()

    def next(self, worker: int, rows_per_s: float) -> Task | None:
        """The next slice."""
        task = next(self._tasks, None)
        self.drained = task is None
        return task

    def finish(self) -> tuple[str, int]:
        """Digest and size."""
        return self._stream.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def _cut(self) -> Iterator[Task]:
        start = 0
        needed = list(self.layout.needed)
        while True:
            try:
                batch = self._batches.read_next_batch().select(needed)
            except StopIteration:
                return
            except (pa.ArrowInvalid, OSError) as error:
                raise _unreadable(self._name, error) from error
            # A slice of a dictionary column would carry its whole dictionary each time.
            columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
            batch = pa.record_batch(columns, names=needed)
            row_bytes = max(1, batch.nbytes // max(batch.num_rows, 1))
            at = 0
            while at < batch.num_rows:
                # Small at first, so that small inputs too are shared by several processes.
                size = max(_LEAST_PIECE_BYTES, min(_PIECE_BYTES, start * row_bytes // 32))
                part = batch.slice(at, max(1, min(_PIECE_ROWS, size // row_bytes)))
                at += part.num_rows
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                payload = sink.getvalue().to_pybytes()
                digest = blake2b(payload, digest_size=16).digest()
                piece = Piece(start, start + part.num_rows, digest=digest)
                start = piece.stop
                if not self._done(piece):
                    yield Task(piece, payload)


class ArrowReader:
    """Reads what `ArrowSource` handed over."""

    def rows(self, task: Task) -> Iterator[Rows]:
        """The rows of a task."""
        at = task.piece.start
        for batch in pa.ipc.open_stream(task.payload):
            yield Rows(batch, np.arange(at + 1, at + 1 + batch.num_rows, dtype=np.int64))
            at += batch.num_rows


def _unreadable(name: str, error: Exception) -> InputFileError:
    line: Any = (str(error).splitlines() or [""])[0]
    return InputFileError(f"cannot be read as Arrow IPC: {line}", path=name, hint="is the file complete?")
