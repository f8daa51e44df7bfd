"""CSV and JSON lines: cut into blocks where a record ends, and parsed block by block by whoever scores them."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from parbake.batch.columns import bind
from parbake.batch.model import BadRow, FileLayout, Piece
from parbake.batch.ports import Rows, Task, where_of
from parbake.batch.stream import DigestReader
from parbake.contract.datatypes import FLOATS
from parbake.contract.model import Contract, TensorSpec
from parbake.errors import InputFileError

_BLOCK_BYTES: Final = 1 << 20
_LEAST_BLOCK_BYTES: Final = 1 << 13
_RECORD_MOST: Final = 64 << 20
_SMALL_BYTES: Final = 1 << 20
_DELIMITERS: Final = (",", ";", "\t", "|")
_BOM: Final = b"\xef\xbb\xbf"


class TextSource:
    """Hands out blocks of whole records, leaving out those that ``done`` names with the same content."""

    def __init__(
        self,
        stream: DigestReader,
        name: str,
        contract: Contract,
        *,
        kind: Literal["csv", "jsonl"],
        size: int | None,
        done: Callable[[Piece], bool],
    ) -> None:
        self._stream = stream
        self._name = name
        self._kind = kind
        self._done = done
        self._offset = 0
        self._line = 1
        self._kept = b""
        self._delimiter = ""
        self._ended = False
        self.total: int | None = None
        self.drained = False
        self.small = size is not None and size < _SMALL_BYTES
        if kind == "csv":
            self.layout = self._header(contract)
        else:
            self.layout = self._first_record(contract)
        self._tasks = self._blocks()

    def next(self, worker: int, rows_per_s: float) -> Task | None:
        """The next block."""
        task = next(self._tasks, None)
        self.drained = task is None
        return task

    def finish(self) -> tuple[str, int]:
        """Digest and size."""
        return self._stream.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def _header(self, contract: Contract) -> FileLayout:
        """Read the header of a CSV file, and find the delimiter under which it has the columns."""
        self._fill(self._block)
        end = self._record_end(first=True)
        if self._kept.startswith(_BOM):
            self._drop(len(_BOM))
            end -= len(_BOM)
        raw = self._kept[:end]
        self._drop(end)
        if not raw.strip():
            raise InputFileError("has no header", path=self._name, hint="the first line names the columns")
        header = self._decode(raw, 1).rstrip("\r\n")
        errors: list[InputFileError] = []
        for delimiter in _DELIMITERS:
            try:
                names = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter), [])]
            except csv.Error as error:
                errors.append(InputFileError(f"the header is no CSV: {error}", path=self._name))
                continue
            try:
                bindings, extra = bind(contract, names, self._name)
            except InputFileError as error:
                errors.append(error)
                continue
            self._delimiter = delimiter
            return FileLayout(self._name, "csv", bindings, extra, header=tuple(names), delimiter=delimiter)
        raise errors[0]

    def _first_record(self, contract: Contract) -> FileLayout:
        """Bind by the names in the first block of JSON lines: the first record alone may be a bad one."""
        self._fill(self._block)
        if self._kept.startswith(_BOM):
            self._drop(len(_BOM))
        names: dict[str, None] = {}
        error: InputFileError | None = None
        for raw in self._kept[: self._record_end()].splitlines():
            if not raw.strip():
                continue
            try:
                record = msgspec.json.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if isinstance(record, dict):
                names.update(dict.fromkeys(record))
                try:
                    bindings, extra = bind(contract, list(names), self._name)
                except InputFileError as lacking:
                    error = lacking
                else:
                    return FileLayout(self._name, "jsonl", bindings, extra)
        raise error or InputFileError(
            "holds no JSON objects, one per line", path=self._name, hint='a line is {"column": value, ...}'
        )

    def _blocks(self) -> Iterator[Task]:
        while True:
            self._fill(self._block)
            if not self._kept:
                return
            end = self._record_end()
            payload = self._kept[:end]
            digest = blake2b(payload, digest_size=16).digest()
            piece = Piece(self._offset, self._offset + end, first=self._line, digest=digest)
            self._drop(end)
            if payload.strip() and not self._done(piece):
                yield Task(piece, payload)

    @property
    def _block(self) -> int:
        """Bytes of the next block: small at first, so that small inputs too are shared by several processes.

        It depends on the place alone, so that a later run cuts the same blocks.
        """
        return max(_LEAST_BLOCK_BYTES, min(_BLOCK_BYTES, self._offset // 32))

    def _fill(self, size: int) -> None:
        """Have at least ``size`` bytes, unless the input ends."""
        while not self._ended and len(self._kept) < size:
            more = self._stream.read(size - len(self._kept))
            self._ended = not more
            self._kept += more

    def _record_end(self, *, first: bool = False) -> int:
        """The byte after the last record (the ``first`` one) in what is held; reads on where there is none."""
        size = self._block
        while True:
            end = self._end_in(self._kept, first=first)
            if end:
                return end
            if self._ended:
                return len(self._kept)
            if size >= _RECORD_MOST:
                raise InputFileError(
                    f"the record has more than {_RECORD_MOST >> 20} MiB",
                    path=f"{self._name}, line {self._line}",
                    hint="is there a quote that is never closed?"
                    if self._kind == "csv"
                    else "one object per line",
                )
            size *= 2
            self._fill(size)

    def _end_in(self, data: bytes, *, first: bool) -> int:
        if self._kind == "jsonl":
            return (data.find(b"\n") if first else data.rfind(b"\n")) + 1
        ends = record_ends(data, self._delimiter, final=False)
        return int(ends[0 if first else -1]) if len(ends) else 0

    def _drop(self, size: int) -> None:
        self._line += self._kept.count(b"\n", 0, size)
        self._offset += size
        self._kept = self._kept[size:]

    def _decode(self, raw: bytes, line: int) -> str:
        return decode(raw, self._name, line)


class CsvReader:
    """Parses blocks of a CSV file (RFC 4180): every needed cell as text."""

    def __init__(self, layout: FileLayout) -> None:
        self._layout = layout

    def rows(self, task: Task) -> Iterator[Rows]:
        """The rows of a block."""
        layout, payload, first = self._layout, task.payload, task.piece.first
        decode(payload, layout.name, first)
        odd: dict[int, int] = {}

        def note(row: Any) -> str:
            odd[row.number] = row.actual_columns
            return "skip"

        needed = list(layout.needed)
        try:
            table = pyarrow.csv.read_csv(
                # A first value that begins with what marks UTF-8 would lose it: pyarrow takes that off once.
                pa.BufferReader(_BOM + payload if payload.startswith(_BOM) else payload),
                read_options=pyarrow.csv.ReadOptions(
                    column_names=list(layout.header),
                    use_threads=False,
                    block_size=len(payload) + len(_BOM) + 1,
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=layout.delimiter, newlines_in_values=True, invalid_row_handler=note
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(needed, pa.string()),
                    include_columns=needed,
                    strings_can_be_null=False,
                    check_utf8=False,
                ),
            )
        except pa.ArrowInvalid as error:
            raise InputFileError(
                f"cannot be read as CSV: {(str(error).splitlines() or [''])[0]}", path=where_of(layout, first)
            ) from error
        lines = record_lines(payload, first, layout.delimiter)
        batches = table.combine_chunks().to_batches()
        batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
        if batch.num_rows + len(odd) != len(lines):
            raise InputFileError(
                f"the {len(lines)} records from here on are read as {batch.num_rows + len(odd)}",
                path=where_of(layout, first),
                hint="is a quote not closed, or not doubled inside a quoted value?",
            )
        # pyarrow counts records from 1, and leaves blank lines out, as we do.
        bad = tuple(
            BadRow(
                int(lines[number - 1]),
                where_of(layout, int(lines[number - 1])),
                f"{count} columns, the header has {len(layout.header)}",
            )
            for number, count in sorted(odd.items())
        )
        if odd:
            lines = np.delete(lines, [number - 1 for number in odd])
        yield Rows(batch, lines, bad)


class JsonReader:
    """Parses blocks of JSON lines: one object by column name per line."""

    def __init__(self, layout: FileLayout, contract: Contract) -> None:
        self._layout = layout
        self._decode = msgspec.json.Decoder(dict[str, Any]).decode
        self._specs: dict[str, TensorSpec] = {}
        self._matrix: set[str] = set()
        for spec, binding in zip(contract.inputs, layout.bindings, strict=True):
            for name in binding.columns:
                self._specs[name] = spec
                if binding.matrix:
                    self._matrix.add(name)

    def rows(self, task: Task) -> Iterator[Rows]:
        """The rows of a block."""
        layout = self._layout
        needed = layout.needed
        records: list[dict[str, Any]] = []
        numbers: list[int] = []
        bad: dict[int, BadRow] = {}
        for at, raw in enumerate(task.payload.split(b"\n"), task.piece.first):
            if not raw.strip():
                continue
            try:
                record = self._decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                bad[at] = BadRow(at, where_of(layout, at), f"is no JSON object: {error}")
                continue
            absent = next((name for name in needed if name not in record), None)
            if absent is not None:
                bad[at] = BadRow(at, where_of(layout, at), f"column {absent!r} is missing")
                continue
            records.append(record)
            numbers.append(at)
        columns = {name: [record[name] for record in records] for name in needed}
        wrong: dict[int, BadRow] = {}
        arrays: list[Any] = []
        for name in needed:
            values = columns[name]
            spec = self._specs[name]
            lists = spec.shape not in ((), (1,)) or any(isinstance(value, list) for value in values)
            nested = name not in self._matrix and spec.shape != () and lists
            array, misfits = _lists(values, spec) if nested else _values(values, spec)
            arrays.append(array)
            for i, shown in misfits.items():
                where = f"{where_of(layout, numbers[i])}, column {name!r}"
                wrong.setdefault(i, BadRow(numbers[i], where, f"{shown} is no {_described(spec, nested)}"))
        batch = pa.record_batch(arrays, names=list(needed))
        kept = np.array(numbers, dtype=np.int64)
        if wrong:
            good = np.ones(len(kept), bool)
            good[list(wrong)] = False
            batch, kept = batch.filter(pa.array(good)), kept[good]
        yield Rows(batch, kept, tuple(sorted([*bad.values(), *wrong.values()])))


def record_ends(data: bytes, delimiter: str, *, final: bool) -> npt.NDArray[np.intp]:
    """Where the records of a block of CSV end: the byte after the line end of each, if it is all there.

    ``delimiter`` is empty where it is not known yet; ``final`` says that nothing follows the block. A line
    end within quotes belongs to a value. A quote counts only at the start of a value: 6" is six inches.
    """
    buffer = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(buffer == ord("\n")) + 1
    if final and (not len(ends) or ends[-1] != len(data)):
        ends = np.append(ends, len(data))
    if b'"' not in data:
        return ends
    at = np.flatnonzero(buffer == ord('"'))
    around = np.frombuffer(b'\n\r"' + (delimiter or "".join(_DELIMITERS)).encode(), np.uint8)
    opening, closing = at[::2], at[1::2]
    regular = np.isin(buffer[opening[opening > 0] - 1], around).all()
    regular = regular and np.isin(buffer[closing[closing + 1 < len(data)] + 1], around).all()
    if regular:
        # Every other quote opens and every other closes, so a record ends where their number is even.
        whole: npt.NDArray[np.intp] = ends[
            (np.searchsorted(at, ends) % 2 == 0) | (final & (ends == len(data)))
        ]
        return whole
    lines = [line.decode("latin-1") + "\n" for line in data.split(b"\n")]
    offsets = np.minimum(np.cumsum([len(line) for line in lines]), len(data))
    reader = csv.reader(lines[:-1] if data.endswith(b"\n") else lines, delimiter=delimiter or ",")
    found: list[int] = []
    # A value too long for the reader, say: what it did not find is missed, and told, when the rows are counted.
    with contextlib.suppress(csv.Error):
        found.extend(int(offsets[reader.line_num - 1]) for _ in reader)
    # The last record may go on in what follows.
    return np.array(found if final else found[:-1], dtype=np.intp)


def record_lines(payload: bytes, first: int, delimiter: str) -> npt.NDArray[np.int64]:
    """The line on which each record of a block of CSV starts; blank lines are no records."""
    ends = record_ends(payload, delimiter, final=True)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.intp)
    buffer = np.frombuffer(payload, np.uint8)
    newlines = np.flatnonzero(buffer == ord("\n"))
    # Nothing but a line end: a record of one or two bytes, both of them line ends.
    blank = (ends - starts <= 2) & np.isin(buffer[starts], (10, 13)) & np.isin(buffer[ends - 1], (10, 13))
    lines: npt.NDArray[np.int64] = (first + np.searchsorted(newlines, starts))[~blank].astype(np.int64)
    return lines


def decode(raw: bytes, name: str, line: int) -> str:
    """Text of bytes. Raises `InputFileError` naming the line that is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        raise InputFileError(
            f"is not UTF-8: byte {raw[error.start]:#04x}",
            path=f"{name}, line {at}",
            hint="save the file as UTF-8",
        ) from error


def _values(values: list[Any], spec: TensorSpec) -> tuple[Any, dict[int, str]]:
    """JSON values as an Arrow array, and those that do not fit (null in the array)."""
    misfits: dict[int, str] = {}
    if not set(map(type, values)) <= _KINDS[_family(spec)] or not _all_small(values):
        misfits = {i: _shown(value) for i, value in enumerate(values) if not _fits(value, spec)}
        values = [None if i in misfits else _native(value, spec) for i, value in enumerate(values)]
    return pa.array(values, _arrow_type(spec)), misfits


def _lists(values: list[Any], spec: TensorSpec) -> tuple[Any, dict[int, str]]:
    """JSON lists as an Arrow array, and those that do not fit (null in the array).

    Lists of a fixed shape come flat, with all elements of a row; lists of an open shape stay nested.
    """
    misfits: dict[int, str] = {}
    lists: list[Any] = []
    for i, value in enumerate(values):
        if spec.shape == (1,) and value is not None and not isinstance(value, list):
            value = [value]
        flat: list[Any] = []
        sizes = None if value is None else _sizes(value, flat)
        if value is not None and not _shape_fits(sizes, spec):
            misfits[i] = _shown(value)
        elif bad := [x for x in flat if not _fits(x, spec)]:
            misfits[i] = f"a list with {_shown(bad[0])}"
        if value is None or i in misfits:
            lists.append(None)
        else:
            lists.append([_native(x, spec) for x in flat] if spec.fixed else _mapped(value, spec))
    kind = _arrow_type(spec)
    for _ in range(1 if spec.fixed else len(spec.shape)):
        kind = pa.list_(kind)
    return pa.array(lists, kind), misfits


def _shape_fits(sizes: tuple[int, ...] | None, spec: TensorSpec) -> bool:
    if sizes is None:
        return False
    if spec.fixed and sizes == (spec.elements,):
        return True
    return len(sizes) == len(spec.shape) and all(
        want in (-1, have) for want, have in zip(spec.shape, sizes, strict=True)
    )


def _described(spec: TensorSpec, nested: bool) -> str:
    return f"{spec.datatype} {list(spec.shape)}" if nested else spec.datatype


_Family = Literal["text", "bool", "float", "int"]
_KINDS: Final[dict[_Family, frozenset[type]]] = {
    "text": frozenset({str, type(None)}),
    "bool": frozenset({bool, type(None)}),
    "float": frozenset({int, float, type(None)}),
    "int": frozenset({int, type(None)}),
}


def _family(spec: TensorSpec) -> _Family:
    if spec.datatype == "BYTES":
        return "text"
    if spec.datatype == "BOOL":
        return "bool"
    return "float" if spec.datatype in FLOATS else "int"


def _fits(value: object, spec: TensorSpec) -> bool:
    """Whether a JSON value may stand for an element of the spec; whole numbers may be written with a point."""
    family = _family(spec)
    if family == "int" and type(value) is float:
        value = int(value) if value.is_integer() else value
    if type(value) not in _KINDS[family]:
        return False
    if type(value) is not int or (family == "float" and abs(value) <= 1 << 53):
        return True
    if family == "float":
        return abs(value) < 1 << 1023 and int(float(value)) == value
    return (
        (0 if spec.datatype == "UINT64" else -(1 << 63))
        <= value
        < 1 << (64 if spec.datatype == "UINT64" else 63)
    )


def _native(value: Any, spec: TensorSpec) -> Any:
    """A value that fits in the Python type that Arrow takes for it."""
    family = _family(spec)
    if value is None or family in ("text", "bool"):
        return value
    return float(value) if family == "float" else int(value)


def _mapped(value: Any, spec: TensorSpec) -> Any:
    return [_mapped(item, spec) for item in value] if isinstance(value, list) else _native(value, spec)


def _all_small(values: list[Any]) -> bool:
    return all(type(value) is not int or 0 <= value <= 1 << 53 for value in values)


def _sizes(value: object, out: list[Any]) -> tuple[int, ...] | None:
    """The shape of nested lists, whose elements are appended to ``out``; None where they are not regular."""
    if not isinstance(value, list):
        out.append(value)
        return ()
    inner = {_sizes(item, out) for item in value}
    if len(inner) > 1 or None in inner:
        return None
    return (len(value), *(inner.pop() or ())) if inner else (0,)


def _arrow_type(spec: TensorSpec) -> Any:
    family = _family(spec)
    if family == "int":
        return pa.uint64() if spec.datatype == "UINT64" else pa.int64()
    return {"text": pa.string(), "bool": pa.bool_(), "float": pa.float64()}[family]


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
