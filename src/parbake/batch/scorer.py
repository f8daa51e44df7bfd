"""Score pieces of the input in this process: rows to tensors, model, keys and records, into segments."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from parbake.batch import segments
from parbake.batch.columns import to_tensors
from parbake.batch.convert import Faults
from parbake.batch.model import BadRow, FileLayout, OnBad, Piece, Tally
from parbake.batch.ports import Reader, Rows, Task, where_of
from parbake.batch.segments import Segment
from parbake.contract.bundle import read_bundle
from parbake.contract.datatypes import NUMPY
from parbake.contract.key import KEY_BYTES, Keys
from parbake.contract.model import Contract
from parbake.contract.record import Records
from parbake.contract.rounding import round_inputs
from parbake.contract.tensors import Tensor, row_slices, to_raw
from parbake.errors import InputFileError, ModelFailed, RowRejected
from parbake.runtime.session import Session, check_goldens

_MICRO_ROWS: Final = 4096
_MICRO_BYTES: Final = 4 << 20
_OPEN_ROWS: Final = 1024


class ScoringJob(Struct, frozen=True):
    """What a process needs to know to score pieces."""

    bundle: str
    layout: FileLayout
    folder: str
    """Where segments go."""
    name: str
    """How this process's segments are called."""
    threads: int = 1
    allow_pickle: bool = False
    allow_mismatch: bool = False
    on_bad: OnBad = "error"
    segment_bytes: int = 16 << 20
    segment_s: float = 3.0


class Scorer:
    """Scores pieces and collects their entries, which become a segment when they are many or old.

    Opens the bundle's session and proves it on the goldens. Raises `BundleError`, `InputFileError`.
    """

    def __init__(self, job: ScoringJob) -> None:
        # Whoever started the bake has verified the digest.
        bundle = read_bundle(job.bundle, verify=False)
        if bundle.environment.required:
            # Only a bundle with code of its own is worth what this takes to import.
            from parbake.runtime.runner import check_environment

            check_environment(bundle.environment, job.allow_mismatch)
        contract = bundle.contract
        self._job = job
        self._contract = contract
        self._session = Session(bundle, threads=job.threads, allow_pickle=job.allow_pickle)
        check_goldens(self._session, bundle)
        self._keys = Keys(contract)
        self._records = Records(contract)
        self._reader = _reader(job.layout, contract)
        self._word = "line" if job.layout.format in ("csv", "jsonl") else "row"
        self._micro = _micro_rows(contract)
        self._folder = Path(job.folder)
        self._written = 0
        self._writing: Future[Segment] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="segment")
        self._entries: list[tuple[bytes, npt.NDArray[np.int64], segments.Records]] = []
        self._pieces: list[Piece] = []
        self._tally = Tally()
        self._bytes = 0
        self._since = time.monotonic()
        self._unsynced: list[Path] = []
        self._synced = time.monotonic()

    def score(self, task: Task) -> Tally:
        """Score one piece. Raises `InputFileError` for a bad row, unless those are skipped; `ModelFailed`."""
        tally = Tally()
        for rows in self._reader.rows(task):
            tally = tally.plus(self._score(rows))
        self._pieces.append(task.piece)
        self._tally = self._tally.plus(tally)
        return tally

    def due(self) -> bool:
        """Whether what was scored should become a segment now."""
        if not self._pieces:
            return False
        return self._bytes >= self._job.segment_bytes or time.monotonic() - self._since >= self._job.segment_s

    def flush(self, *, last: bool = False) -> list[Segment]:
        """Write what was scored as a segment, in the background; gives those finished before.

        A segment outlives this process at once, and the machine some ``segment_s`` seconds later: to sync the
        files of a short bake, which removes them again, costs more than to write them. The ``last`` call
        waits until all is written, and leaves syncing to the system: the merge begins.
        """
        done = [self._writing.result()] if self._writing is not None else []
        self._writing = None
        if self._pieces:
            self._writing = self._pool.submit(
                self._write, self._entries, tuple(self._pieces), self._tally, self._written, last
            )
            self._written += 1
        self._entries, self._pieces, self._tally = [], [], Tally()
        self._bytes, self._since = 0, time.monotonic()
        if last:
            done += [self._writing.result()] if self._writing is not None else []
            self._writing = None
            self._pool.shutdown()
        return done

    def _write(
        self,
        entries: list[tuple[bytes, npt.NDArray[np.int64], segments.Records]],
        pieces: tuple[Piece, ...],
        tally: Tally,
        number: int,
        last: bool,
    ) -> Segment:
        keys = np.frombuffer(b"".join([keys for keys, _, _ in entries]), np.uint8).reshape(-1, KEY_BYTES)
        numbers = np.concatenate([numbers for _, numbers, _ in entries] or [np.empty(0, np.int64)])
        records: segments.Records
        if self._records.sizes is None:
            records = [record for _, _, some in entries for record in some]
        else:
            empty = np.empty((0, sum(self._records.sizes)), np.uint8)
            records = np.concatenate([empty, *(np.asarray(some) for _, _, some in entries)])
        part, duplicates = segments.sort(keys, numbers, records, self._job.layout.name, self._word)
        tally = tally.plus(Tally(duplicates=duplicates))
        segment = segments.write(self._folder, f"{self._job.name}-{number:06d}", part, pieces, tally)
        self._unsynced.append(segment.path)
        if not last and time.monotonic() - self._synced >= self._job.segment_s:
            segments.sync(self._folder, self._unsynced)
            self._unsynced, self._synced = [], time.monotonic()
        return segment

    def _score(self, rows: Rows) -> Tally:
        bad = list(rows.bad)
        if bad:
            self._refuse(bad)
        faults = Faults()
        try:
            tensors = to_tensors(self._contract, self._job.layout, rows.batch, faults)
        except InputFileError as error:
            raise InputFileError(
                error.message, path=error.path or self._job.layout.name, hint=error.hint
            ) from error
        numbers = rows.numbers
        if faults.found:
            found = [self._bad_row(int(numbers[at]), *faults.found[at]) for at in sorted(faults.found)]
            self._refuse(found)
            bad += found
            good = np.ones(len(numbers), bool)
            good[list(faults.found)] = False
            numbers = numbers[good]
            tensors = [
                t[good] if isinstance(t, np.ndarray) else [row for row, ok in zip(t, good, strict=True) if ok]
                for t in tensors
            ]
        scored = 0
        for group, which in _by_shape(tensors, len(numbers)):
            scored += self._group(group, numbers if which is None else numbers[which], bad)
        return Tally(scored, len(bad), 0, tuple(sorted(bad)[:10]))

    def _group(self, tensors: list[Tensor], numbers: npt.NDArray[np.int64], bad: list[BadRow]) -> int:
        """Score rows of one shape; those that the model refuses are added to ``bad``."""
        specs = self._contract.inputs
        if self._contract.key.rounding:
            named = {spec.name: array for spec, array in zip(specs, tensors, strict=True)}
            rounded = round_inputs(self._contract, named)
            tensors = [rounded[spec.name] for spec in specs]
        scored = 0
        for start in range(0, len(numbers), self._micro):
            cut = slice(start, start + self._micro)
            scored += self._answer([array[cut] for array in tensors], numbers[cut], bad)
        return scored

    def _answer(self, tensors: list[Tensor], numbers: npt.NDArray[np.int64], bad: list[BadRow]) -> int:
        rows = len(numbers)
        if not rows:
            return 0
        try:
            outputs = self._session.run(
                {spec.name: array for spec, array in zip(self._contract.inputs, tensors, strict=True)}
            )
        except RowRejected as error:
            if rows == 1:
                found = self._bad_row(int(numbers[0]), "", error.message, "")
                self._refuse([found])
                bad.append(found)
                return 0
            # Which row it was is not said: halve until it stands alone.
            half = rows // 2
            return self._answer([array[:half] for array in tensors], numbers[:half], bad) + self._answer(
                [array[half:] for array in tensors], numbers[half:], bad
            )
        records = self._records_of(outputs, rows)
        keys = self._keys.of_tensors(tensors, rows)
        self._entries.append((keys, numbers, records))
        size = records.nbytes if isinstance(records, np.ndarray) else sum(map(len, records))
        self._bytes += len(keys) + numbers.nbytes + size
        return rows

    def _records_of(self, outputs: dict[str, Tensor], rows: int) -> segments.Records:
        """The records of some rows (`parbake.contract.record`), as arrays where all have one size."""
        if self._records.sizes is not None:
            columns: list[npt.NDArray[np.uint8]] = []
            for spec, size in zip(self._contract.outputs, self._records.sizes, strict=True):
                array = np.ascontiguousarray(outputs[spec.name], dtype=NUMPY[spec.datatype])
                if array.shape != (rows, *spec.shape):
                    raise ModelFailed(
                        f"output {spec.name!r} has shape {list(array.shape)}, the contract says {[rows, *spec.shape]}",
                        hint="pack the model again",
                    )
                columns.append(array.reshape(-1).view(np.uint8).reshape(rows, size))
            return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        slices: list[list[bytes]] = []
        shapes: list[Sequence[int]] = []
        for spec in self._contract.outputs:
            array = outputs[spec.name]
            shape = array.shape[1:]
            elements = int(np.prod(shape, dtype=np.int64))
            slices.append(row_slices(to_raw(array, spec.datatype), spec.datatype, rows, elements))
            shapes.append(shape)
        return [self._records.join(raws, shapes) for raws in zip(*slices, strict=True)]

    def _bad_row(self, number: int, column: str, reason: str, hint: str) -> BadRow:
        where = where_of(self._job.layout, number)
        return BadRow(number, f"{where}, column {column!r}" if column else where, reason, hint)

    def _refuse(self, bad: Sequence[BadRow]) -> None:
        """Raises `InputFileError` for the first of them, unless bad rows are skipped."""
        if self._job.on_bad == "error" and bad:
            first = min(bad)
            hint = "--on-bad skip leaves such rows out"
            raise InputFileError(
                first.reason, path=first.where, hint=f"{first.hint}; {hint}" if first.hint else hint
            )


def _reader(layout: FileLayout, contract: Contract) -> Reader:
    if layout.format == "parquet":
        from parbake.batch.parquet import ParquetReader

        return ParquetReader(layout)
    if layout.format == "arrow":
        from parbake.batch.arrow import ArrowReader

        return ArrowReader()
    from parbake.batch.text import CsvReader, JsonReader

    return CsvReader(layout) if layout.format == "csv" else JsonReader(layout, contract)


def _micro_rows(contract: Contract) -> int:
    """Rows per call of the model: as many as a request may have, and not more than some megabytes of input."""
    sizes = [spec.row_bytes for spec in contract.inputs]
    known = [size for size in sizes if size is not None]
    most = _MICRO_ROWS if len(known) == len(sizes) else _OPEN_ROWS
    return max(1, min(most, contract.batch.max_rows, _MICRO_BYTES // max(sum(known), 1)))


def _by_shape(
    tensors: Sequence[Tensor | list[Tensor]], rows: int
) -> list[tuple[list[Tensor], npt.NDArray[np.intp] | None]]:
    """Rows in groups that have one shape, each with the positions of its rows (None: all rows)."""
    if not any(isinstance(t, list) for t in tensors):
        return [([t for t in tensors if isinstance(t, np.ndarray)], None)] if rows else []
    groups: dict[Any, list[int]] = {}
    for at in range(rows):
        groups.setdefault(tuple(t[at].shape for t in tensors if isinstance(t, list)), []).append(at)
    found: list[tuple[list[Tensor], npt.NDArray[np.intp] | None]] = []
    for positions in groups.values():
        which = np.array(positions, dtype=np.intp)
        found.append(
            (
                [
                    t[which] if isinstance(t, np.ndarray) else np.stack([t[at] for at in positions])
                    for t in tensors
                ],
                which,
            )
        )
    return found
