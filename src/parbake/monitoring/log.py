"""The prediction log: what was answered, as Parquet files that rotate and are removed when they are old.

Files lie flat in one folder, of all deployments and of all fronts; their names carry the time of the first row, the
front and the process. What has been written survives a killed process (not a power cut): see `monitoring.files`.
Other files in the folder are never touched.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from time import monotonic, time
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from parbake.contract.key import KEY_BYTES
from parbake.contract.where import NAMES, REFUSED
from parbake.logs import log
from parbake.monitoring.files import (
    SCHEMA,
    LogFile,
    OpenFile,
    as_table,
    is_new,
    is_written,
    log_files,
    read_frames,
    recover,
)
from parbake.monitoring.model import OK, LogCounts, LogOptions
from parbake.monitoring.recorder import Recorder, Rows

SECRET_NAME: Final = ".secret"  # noqa: S105  # the name of the file, not what is in it
"""File in the log's folder with which inputs and keys are hashed; for its owner's eyes only."""

_TIDY_S: Final = 30.0
"""How often the folder is looked at when no file was finished."""

_CLOCK_BACK_US: Final = 1_000_000
"""A clock that jumps back by more begins a new file, so that each file is in order of time."""

_READ_ROWS: Final = 16 * 1024

_MOST_NAMES: Final = 4096
"""Names of deployments, versions and so on for which a column is kept."""

_KNOWN_BYTES: Final = 16 * 1024 * 1024
"""What remembered hashes of one deployment may take."""
_KNOWN_OVERHEAD: Final = 200
"""Bytes that an entry takes besides the value."""


class PredictionLog:
    """Writes the rows of one process. For one thread; no method raises for what the disk does.

    Rows that cannot be written are dropped and counted, with one line in the server's log when that begins and one
    when it is over.
    """

    def __init__(self, folder: Path, options: LogOptions) -> None:
        """Finish what killed writers left. Raises OSError if the folder cannot be made."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self.options = options
        self._counts = LogCounts()
        self._file: OpenFile | None = None
        self._opened_s = 0.0
        self._last_us = 0
        self._failing = False
        self._untidy = False
        self._tidied_s = 0.0
        self._draw = np.random.default_rng()
        self._secret = _secret(folder) if options.inputs == "hashed" else b""
        self._secrets: dict[str, _Hidden] = {}
        self._constants = _Constants()
        self._where_names = pa.array(NAMES, pa.string())
        self._warm_up()
        self._tidy()

    @property
    def counts(self) -> LogCounts:
        """What became of the rows so far (without those that a full ring dropped: the recorder has them)."""
        return self._counts

    def write(self, drained: Sequence[tuple[Recorder, Rows]]) -> None:
        """Write what was drained together; a file that is large or old enough is finished."""
        rows = sum(len(one) for _, one in drained)
        batch = self._guarded(lambda: self._batch(drained), rows)
        if batch is not None and batch.num_rows:
            self._guarded(lambda: self._append(batch), batch.num_rows)
        if self._file is not None and (
            self._file.bytes >= self.options.file_bytes
            or monotonic() - self._opened_s >= self.options.file_age_s
        ):
            self.rotate()
        elif monotonic() - self._tidied_s >= _TIDY_S:
            self._tidy()

    def rotate(self) -> None:
        """Finish the open file, if there is one, and remove what is beyond the limits."""
        file, self._file = self._file, None
        if file is not None:
            self._guarded(file.finish, 0)
            self._tidy()

    close = rotate

    def _guarded(self, work: Any, rows: int) -> Any:
        try:
            done = work()
        except (OSError, pa.ArrowException, MemoryError) as error:
            self._counts = replace(self._counts, dropped_disk=self._counts.dropped_disk + rows)
            if not self._failing:
                self._failing = True
                log().error(
                    "log.failing",
                    folder=str(self.folder),
                    error=str(error),
                    hint="rows are dropped and counted",
                )
            return None
        return done

    def _append(self, batch: pa.RecordBatch) -> None:
        times = _times_us(batch.column("time"))
        first, last = int(times[0]), int(times[-1])
        if self._file is not None and first < self._last_us - _CLOCK_BACK_US:
            self.rotate()
        if self._file is None:
            self._file = OpenFile(self.folder, first / 1e6, self.options.front)
            self._opened_s = monotonic()
        try:
            self._file.append(batch)
        except OSError:
            # It may be this file that is the trouble (deleted folder, size limit): the next rows begin another.
            file, self._file = self._file, None
            with suppress(OSError, pa.ArrowException):
                file.finish()
            raise
        self._last_us = last
        self._counts = replace(self._counts, written=self._counts.written + batch.num_rows)
        if self._failing:
            self._failing = False
            log().info("log.writing_again", folder=str(self.folder), dropped=self._counts.dropped_disk)

    def _batch(self, drained: Sequence[tuple[Recorder, Rows]]) -> pa.RecordBatch | None:
        batches = [self._rows(recorder, rows) for recorder, rows in drained if len(rows)]
        kept = sum(batch.num_rows for batch in batches)
        out = sum(len(rows) for _, rows in drained) - kept
        self._counts = replace(self._counts, sampled_out=self._counts.sampled_out + out)
        if not kept:
            return None
        batches = [batch for batch in batches if batch.num_rows]
        # Most have one deployment.
        whole = batches[0] if len(batches) == 1 else as_table(batches).to_batches()[0]
        times = _times_us(whole.column("time"))
        if (times[1:] < times[:-1]).any():
            whole = whole.take(pa.array(np.argsort(times, kind="stable")))
        return whole

    def _rows(self, recorder: Recorder, rows: Rows) -> pa.RecordBatch:
        count = len(rows)
        where = np.frombuffer(rows.where, np.uint8)
        has_key: npt.NDArray[np.bool_] | None = None
        joined = rows.joined
        if len(joined) != count * KEY_BYTES:
            all_keys = rows.keys()
            has_key = np.fromiter((len(key) == KEY_BYTES for key in all_keys), np.bool_, count)
            joined = b"".join(key if len(key) == KEY_BYTES else bytes(KEY_BYTES) for key in all_keys)
        matrix = np.frombuffer(joined, np.uint8).reshape(count, KEY_BYTES)
        # The codes of errors, in the order in which they are met; a row that was answered has the first.
        codes: dict[str, int] = {OK: 0}
        status = np.zeros(count, np.int32)
        for i in np.flatnonzero(where == REFUSED):
            status[i] = codes.setdefault(str(rows.extras[i]), len(codes))
        extras, records = rows.extras, rows.records
        times, seconds = np.frombuffer(rows.times), np.frombuffer(rows.seconds)
        chosen: npt.NDArray[np.intp] | None = None
        if self.options.rate < 1:
            chosen = np.flatnonzero(self._sampled(matrix, has_key))
            matrix, where, status = matrix[chosen], where[chosen], status[chosen]
            has_key = None if has_key is None else has_key[chosen]
            extras, records = [extras[i] for i in chosen], [records[i] for i in chosen]
            times, seconds = times[chosen], seconds[chosen]
        kept = len(where)
        inputs: list[Sequence[bytes] | None] | None = None
        if self.options.inputs != "off" and recorder.wants_inputs:
            inputs = [None if isinstance(one, str) else one for one in extras]
        hidden = self._hidden(recorder.deployment) if self.options.inputs == "hashed" else None
        if hidden is not None:
            keys = rows.keys()
            if chosen is not None:
                keys = [keys[i] for i in chosen]
            matrix = np.frombuffer(b"".join(hidden.of(keys)), np.uint8).reshape(-1, KEY_BYTES)
        moments = pa.py_buffer((times * 1e6).astype(np.int64))
        same = self._constants.names
        columns = [
            pa.Array.from_buffers(SCHEMA.field("time").type, kept, [None, moments]),
            *(
                same(value, kept)
                for value in (recorder.deployment, recorder.version, recorder.mode, recorder.digest)
            ),
            _fixed(matrix, has_key),
            pa.DictionaryArray.from_arrays(pa.array(where.astype(np.int32)), self._where_names),
            pa.array((seconds * 1e3).astype(np.float32)),
            same(OK, kept)
            if len(codes) == 1
            else pa.DictionaryArray.from_arrays(pa.array(status), pa.array(tuple(codes), pa.string())),
            self._constants.nulls("inputs", kept) if inputs is None else _lists(inputs, hidden),
            _binaries(records) if self.options.outputs else self._constants.nulls("outputs", kept),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

    def _sampled(
        self, matrix: npt.NDArray[np.uint8], has_key: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.bool_]:
        heads = np.ascontiguousarray(matrix[:, :8]).view(">u8").reshape(-1)
        kept: npt.NDArray[np.bool_] = heads < np.uint64(int(self.options.rate * 2**64))
        if has_key is None:
            return kept
        # What has no key is refused anyway: it is drawn at the same rate, so that shares stay right.
        return np.where(has_key, kept, self._draw.random(len(kept)) < self.options.rate)

    def _hidden(self, deployment: str) -> _Hidden:
        hidden = self._secrets.get(deployment)
        if hidden is None:
            secret = blake2b(deployment.encode(), key=self._secret, digest_size=32).digest()
            hidden = self._secrets[deployment] = _Hidden(secret)
        return hidden

    def _warm_up(self) -> None:
        """Have pyarrow load now what it loads at first use (pandas, where it is installed), and not while serving."""
        ring = Recorder("", "", "", "")
        ring.note(bytes(KEY_BYTES), 0, 0.0, None, None)
        rows = ring.drain()
        if rows is not None:
            self._batch([(ring, rows)])
        self._counts = LogCounts()

    def _tidy(self) -> None:
        """Finish what others left, and remove the oldest finished files beyond the limits."""
        try:
            self._tidy_folder()
        except (OSError, pa.ArrowException, MemoryError) as error:
            # Rows are written all the same: this is no reason to say that the log fails.
            if not self._untidy:
                log().warning("log.not_tidied", folder=str(self.folder), error=str(error))
            self._untidy = True
        else:
            self._untidy = False

    def _tidy_folder(self) -> None:
        self._tidied_s = monotonic()
        recover(self.folder)
        files = log_files(self.folder)
        total, now = sum(file.bytes for file in files), time()
        left = len(files)
        for file in files:
            old = now - file.modified_s > self.options.keep_age_s
            if (old or total > self.options.keep_bytes) and (
                file.finished or not (is_new(file) or is_written(file.path))
            ):
                file.path.unlink(missing_ok=True)
                total -= file.bytes
                left -= 1
        self._counts = replace(self._counts, files=left, bytes=total)


class _Constants:
    """Columns in which all rows are the same: cut from longer ones, as it takes long to make each anew."""

    def __init__(self) -> None:
        self._rows = 0
        self._first = pa.array(np.zeros(0, np.int32))
        self._named: dict[str, Any] = {}
        self._nulls: dict[str, Any] = {}

    def names(self, name: str, rows: int) -> Any:
        """So many times the same name."""
        self._grow(rows)
        found = self._named.get(name)
        if found is None:
            if len(self._named) >= _MOST_NAMES:
                self._named.clear()
            found = pa.DictionaryArray.from_arrays(self._first, pa.array((name,), pa.string()))
            self._named[name] = found
        return found.slice(0, rows)

    def nulls(self, column: str, rows: int) -> Any:
        """So many nulls of a column of `SCHEMA`."""
        self._grow(rows)
        found = self._nulls.get(column)
        if found is None:
            found = self._nulls[column] = pa.nulls(self._rows, SCHEMA.field(column).type)
        return found.slice(0, rows)

    def _grow(self, rows: int) -> None:
        if rows > self._rows:
            self._rows = 1 << rows.bit_length()
            self._first = pa.array(np.zeros(self._rows, np.int32))
            self._named.clear()
            self._nulls.clear()


class _Hidden:
    """The keyed hashes of values. Those of small values that lately came are remembered, in memory and nowhere else."""

    def __init__(self, secret: bytes) -> None:
        # To copy a hash that has begun costs a third less than to begin another.
        self._begun = blake2b(key=secret, digest_size=KEY_BYTES)
        self._known: dict[bytes, bytes] = {}
        self._left = _KNOWN_BYTES

    def of(self, values: Sequence[bytes]) -> list[bytes]:
        """The hash of each value."""
        known = self._known.get
        found = list(map(known, values))
        if None in found:
            fresh: dict[bytes, bytes] = {}
            begun = self._begun.copy
            for value in {value for value, digest in zip(values, found, strict=True) if digest is None}:
                row = begun()
                row.update(value)
                fresh[value] = row.digest()
            found = [digest or fresh[value] for value, digest in zip(values, found, strict=True)]
            self._remember(fresh)
        return cast(list[bytes], found)

    def _remember(self, fresh: dict[bytes, bytes]) -> None:
        size = sum(map(len, fresh)) + _KNOWN_OVERHEAD * len(fresh)
        if size > _KNOWN_BYTES // 2:
            return
        if size > self._left:
            # Those that come often do not feel it.
            self._known = {}
            self._left = _KNOWN_BYTES
        self._left -= size
        self._known |= fresh


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file of the log that could not be read to its end, and why."""

    path: Path
    reason: str


def read_log(
    folder: Path,
    deployment: str | None = None,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    columns: Sequence[str] | None = None,
    skipped: list[Skipped] | None = None,
) -> Iterator[pa.Table]:
    """The rows of a log in order of time, as tables with the columns of `SCHEMA` (or those asked for).

    Files that are still written are read up to their last whole frame; what is torn, altered or not a log's file is
    left out and told in ``skipped``. Files of several fronts are merged, with one batch of each in memory at a time.
    Times must have a time zone. Rows noted by several threads or fronts within some milliseconds may change places.
    """
    since_us = None if since is None else int(since.timestamp() * 1e6)
    until_us = None if until is None else int(until.timestamp() * 1e6)
    told: list[Skipped] = [] if skipped is None else skipped
    pending = log_files(folder)
    open_files: list[_Cursor] = []
    while pending or open_files:
        # A file must be open before its first row is due.
        while pending and (not open_files or _stamp_us(pending[0]) <= min(one.last_us for one in open_files)):
            cursor = _Cursor(_batches_of(pending.pop(0), told))
            if cursor.advance():
                open_files.append(cursor)
        if not open_files:
            continue
        horizon = min(one.last_us for one in open_files)
        parts = [part for one in open_files if (part := one.take(horizon)) is not None]
        open_files = [one for one in open_files if one.rows_left() or one.advance()]
        table = as_table([batch for part in parts for batch in part.to_batches()])
        table = table.take(pc.sort_indices(table.column("time")))
        table = _chosen(table, deployment, since_us, until_us)
        if table.num_rows:
            yield table.select(list(columns)) if columns is not None else table


class _Cursor:
    """One file on its way through a merge: the batch that is being given out."""

    def __init__(self, batches: Iterator[pa.Table]) -> None:
        self._batches = batches
        self._table: pa.Table | None = None
        self._times: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._at = 0
        self.last_us = 0

    def advance(self) -> bool:
        """Go on to the next batch; False at the end."""
        for table in self._batches:
            if table.num_rows:
                self._table = table
                times = table.column("time").cast(pa.int64()).to_numpy()
                self._times = np.maximum.accumulate(times)
                self._at = 0
                self.last_us = int(self._times[-1])
                return True
        return False

    def rows_left(self) -> bool:
        return self._at < len(self._times)

    def take(self, until_us: int) -> pa.Table | None:
        """The rows up to a time."""
        end = int(np.searchsorted(self._times, until_us, side="right"))
        if end <= self._at or self._table is None:
            return None
        part = self._table.slice(self._at, end - self._at)
        self._at = end
        return part


def _batches_of(file: LogFile, skipped: list[Skipped]) -> Iterator[pa.Table]:
    path = file.path
    try:
        if not path.exists() and not file.finished:
            # Finished since the folder was listed.
            path = path.with_suffix(".parquet")
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as source:
                for batch in source.iter_batches(_READ_ROWS):
                    yield _conform(pa.Table.from_batches([batch]))
        else:
            with path.open("rb") as opened:
                for batch in read_frames(opened):
                    for start in range(0, batch.num_rows, _READ_ROWS):
                        yield _conform(pa.Table.from_batches([batch.slice(start, _READ_ROWS)]))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        skipped.append(Skipped(path, str(error)))


def _conform(table: pa.Table) -> pa.Table:
    """The columns of `SCHEMA`; raises KeyError or ArrowException where they are not there."""
    return table.select(SCHEMA.names).cast(SCHEMA)


def _chosen(table: pa.Table, deployment: str | None, since_us: int | None, until_us: int | None) -> pa.Table:
    times = table.column("time").cast(pa.int64())
    if deployment is not None:
        table = table.filter(pc.equal(table.column("deployment").cast(pa.string()), deployment))
        times = table.column("time").cast(pa.int64())
    if since_us is not None:
        table = table.filter(pc.greater_equal(times, since_us))
        times = table.column("time").cast(pa.int64())
    if until_us is not None:
        table = table.filter(pc.less(times, until_us))
    return table


def log_keys(tables: Iterable[pa.Table]) -> dict[str, list[npt.NDArray[np.uint64]]]:
    """The keys of a log's rows by deployment, as a traffic profile counts them; rows without a key are left out."""
    found: dict[str, list[npt.NDArray[np.uint64]]] = defaultdict(list)
    for table in tables:
        table = table.filter(pc.is_valid(table.column("key")))
        names = table.column("deployment").cast(pa.string())
        for name in pc.unique(names).to_pylist():
            keys = table.filter(pc.equal(names, name)).column("key").combine_chunks()
            found[name].append(key_ids(keys))
    return dict(found)


def key_ids(keys: Any) -> npt.NDArray[np.uint64]:
    """The first 8 bytes, big-endian, of each key of an Arrow array of 16 bytes each, without nulls."""
    if isinstance(keys, pa.ChunkedArray):
        keys = keys.combine_chunks()
    if not len(keys):
        return np.empty(0, np.uint64)
    raw = np.frombuffer(keys.buffers()[1], ">u8", len(keys) * 2, keys.offset * KEY_BYTES)
    return raw.reshape(-1, 2)[:, 0].astype(np.uint64)


def _stamp_us(file: LogFile) -> int:
    parsed = datetime.strptime(file.stamp + "+0000", "%Y%m%dT%H%M%S%fZ%z")
    return int(parsed.timestamp() * 1e6) - 1


def _times_us(column: pa.Array) -> npt.NDArray[np.int64]:
    """An Arrow array of times, without nulls, as numbers of microseconds."""
    return np.frombuffer(column.buffers()[1], np.int64, len(column), 8 * column.offset)


def _lists(rows: Sequence[Sequence[bytes] | None], hidden: _Hidden | None) -> Any:
    """A list of values for each row, as they are or their hashes."""
    there = [row for row in rows if row is not None]
    values = list(chain.from_iterable(there))
    if hidden is not None:
        values = hidden.of(values)
    if len(there) == len(rows):
        return pa.ListArray.from_arrays(_offsets(map(len, there), len(there)), _binaries(values))
    lengths = (0 if row is None else len(row) for row in rows)
    missing = np.fromiter((row is None for row in rows), np.bool_, len(rows))
    return pa.ListArray.from_arrays(_offsets(lengths, len(rows)), _binaries(values), mask=pa.array(missing))


def _binaries(values: Sequence[bytes | None]) -> Any:
    """Values of any length; None is null."""
    if None in values:
        return pa.array(values, pa.binary())
    whole = cast(Sequence[bytes], values)
    data = b"".join(whole)
    if len(data) >= 2**31:
        raise pa.ArrowCapacityError(f"{len(data)} bytes in one column")
    offsets = _offsets(map(len, whole), len(whole))
    return pa.Array.from_buffers(pa.binary(), len(whole), [None, offsets.buffers()[1], pa.py_buffer(data)])


def _offsets(lengths: Iterable[int], count: int) -> Any:
    ends = np.zeros(count + 1, np.int32)
    np.cumsum(np.fromiter(lengths, np.int32, count), out=ends[1:])
    return pa.array(ends)


def _fixed(matrix: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_] | None) -> Any:
    """Rows of bytes as keys; ``valid`` is None where all are."""
    mask = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little").tobytes())
    data = pa.py_buffer(np.ascontiguousarray(matrix))
    return pa.Array.from_buffers(pa.binary(KEY_BYTES), len(matrix), [mask, data])


def _secret(folder: Path) -> bytes:
    """The folder's secret, made by whoever comes first. Raises OSError."""
    path = folder / SECRET_NAME
    draft = folder / f"{SECRET_NAME}.{os.getpid()}.{os.urandom(4).hex()}"
    if not path.exists():
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, os.urandom(32))
            os.fsync(descriptor)
            # A link is made whole or not at all, and never over another.
            with suppress(FileExistsError):
                os.link(draft, path)
        finally:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
    path.chmod(0o600)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise OSError(f"{path} does not hold a secret of 32 bytes; remove it to have another made")
    return secret
