"""The form for people: rows as JSON objects by column name, answered by the names of the outputs.

One row in, one row out; a list in, a list out. A column is an input of its own (row shape ``()`` or ``(1,)``), or
one of the named columns of a matrix input; any other input takes nested lists under its own name. Most requests are
read in one typed decode; whatever does not fit takes the careful way, which names the fault.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Literal

import msgspec

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY
from parbake.contract.model import TensorSpec
from parbake.contract.tensors import Shape
from parbake.errors import InvalidInput, InvalidRequest, MalformedBody, RequestTooLarge
from parbake.names import near
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.transports.http.oip import InferCall, flatten
from parbake.transports.inputs import NON_FINITE, Inputs, pack_plain, pack_values, struct_of, unpack_values

_SHOWN_NAMES: Final = 8
_SHOWN_CHARS: Final = 60
_MOST_DIGITS: Final = 400


@dataclass(frozen=True, slots=True)
class Column:
    """One key of a row."""

    name: str
    spec: TensorSpec
    """The input that it belongs to."""
    position: int
    """Of that input in the contract."""
    at: int | None
    """Place in a matrix input; None where the column is the whole input."""
    needed: bool
    """Whether a row must have it: static mode looks at the key only."""

    @property
    def single(self) -> bool:
        """Whether it takes one value, and not a list."""
        return self.at is not None or self.spec.shape in ((), (1,))


def columns_of(served: ServedVersion) -> tuple[Column, ...]:
    """The columns of a row, in the contract's order."""
    inputs = served.contract.inputs
    names = [name for spec in inputs for name in (spec.columns or (spec.name,))]
    # Two matrices may name a column alike: then each goes by its own name, as a list.
    apart = len(set(names)) == len(names)
    key = served.contract.key.columns if served.mode == "static" else ()
    columns: list[Column] = []
    for position, spec in enumerate(inputs):
        whole = not key or spec.name in key
        if spec.columns and apart:
            columns += [
                Column(name, spec, position, at, whole or name in key) for at, name in enumerate(spec.columns)
            ]
        else:
            needed = whole or any(name in key for name in spec.columns)
            columns.append(Column(spec.name, spec, position, None, needed))
    return tuple(columns)


def example_row(columns: Sequence[Column]) -> dict[str, Any]:
    """A row that the contract accepts, made of zeros and short texts."""
    return {column.name: _example(column) for column in columns if column.needed}


@dataclass(slots=True)
class PeopleCall(InferCall):
    """A request in this form; ``alone`` says that it was one row and no list."""

    alone: bool = True


class PeopleCodec:
    """Reads rows by column name for one served version and writes its answers by output name."""

    def __init__(self, served: ServedVersion) -> None:
        contract = served.contract
        self._served = served
        self._columns = columns_of(served)
        self._names = [column.name for column in self._columns]
        self._known = frozenset(self._names)
        self._shapes = tuple(spec.shape for spec in contract.inputs)
        self._max_rows = contract.batch.max_rows
        needed = [column for column in self._columns if column.needed]
        places = {column.name: place for place, column in enumerate(needed)}
        of_input: list[list[Column]] = [[] for _ in contract.inputs]
        for column in self._columns:
            of_input[column.position].append(column)
        self._groups = [
            _Group(spec, columns, places) for spec, columns in zip(contract.inputs, of_input, strict=True)
        ]
        self._one, self._many = _decoders(needed)
        self._colons = len(needed) + sum(column.name.count(":") for column in needed)
        self._encode = msgspec.json.Encoder().encode
        self._output_names = [spec.name for spec in contract.outputs]
        self._output_keys = [
            b"%s%s:" % (b"," if i else b"{", self._encode(name)) for i, name in enumerate(self._output_names)
        ]

        packers = [struct_of(spec) for spec in contract.outputs]
        self._quick = [
            (key, packer.unpack, None if spec.shape in ((), (1,)) else labels_of(spec, spec.elements))
            for key, packer, spec in zip(self._output_keys, packers, contract.outputs, strict=True)
            if packer is not None and len(spec.shape) <= 1
        ]
        self._all_quick = len(self._quick) == len(contract.outputs)

    # Requests --------------------------------------------------------------------------------------

    def read(self, body: bytes, json_bytes: int | None) -> InferCall:
        """Read one row or a list of rows. Raises `MalformedBody`, `InvalidInput` or `RequestTooLarge`."""
        if json_bytes is not None:
            raise MalformedBody(
                "binary tensors are not read here",
                path="inference-header-content-length",
                hint=f"send them to /v2/models/{self._served.name}/infer",
            )
        start = body[:1]
        try:
            if start == b"{" and self._one is not None:
                values = msgspec.structs.astuple(self._one.decode(body))
                # Every needed key was there, so that more colons are a key given twice, or part of a text.
                if body.count(b":") == self._colons:
                    raws = [group.pack_row(values) for group in self._groups]
                    return PeopleCall(Inputs(raws, 1, self._shapes), alone=True)
            elif start == b"[" and self._many is not None:
                rows = [msgspec.structs.astuple(row) for row in self._many.decode(body)]
                if 0 < len(rows) <= self._max_rows and body.count(b":") == self._colons * len(rows):
                    cells = list(zip(*rows, strict=True))
                    raws = [group.pack_rows(rows, cells) for group in self._groups]
                    return PeopleCall(Inputs(raws, len(rows), self._shapes), alone=False)
        except (msgspec.MsgspecError, ValueError, OverflowError, struct.error, RecursionError):
            # Read again with care: either an unusual form, or a fault that needs a name.
            return self._read_carefully(body)
        return self._read_carefully(body)

    def _read_carefully(self, body: bytes) -> PeopleCall:
        content = self._parse(body)
        alone = isinstance(content, _Object)
        rows = [content] if alone else content
        if not isinstance(rows, list):
            raise InvalidInput(
                f"expected a row as an object, or a list of rows, got {_shown(content)}",
                path="$",
                hint=self._for_example(),
            )
        if not rows:
            raise InvalidInput("the list has no rows", path="$", hint="send at least one row")
        if len(rows) > self._max_rows:
            raise RequestTooLarge(
                f"{len(rows)} rows in one request, the limit of {self._served.name!r} is {self._max_rows}",
                path="$",
                hint="send several requests, or score a file with parbake bake",
            )
        paths = ["$"] if alone else [f"$[{i}]" for i in range(len(rows))]
        named = [self._named(row, path) for row, path in zip(rows, paths, strict=True)]
        packed = [group.pack_carefully(named, paths) for group in self._groups]
        inputs = Inputs([raw for raw, _ in packed], len(rows), tuple(shape for _, shape in packed))
        return PeopleCall(inputs, alone=alone)

    def _parse(self, body: bytes) -> Any:
        """Any JSON, its objects with all their pairs. Raises `MalformedBody`."""
        if not body.strip():
            raise MalformedBody("the body is empty", path="$", hint=self._for_example())
        try:
            return json.loads(
                body.decode(),
                object_pairs_hook=_Object,
                parse_constant=_refuse_constant,
                parse_int=_parse_int,
                parse_float=_parse_float,
            )
        except UnicodeDecodeError as error:
            raise MalformedBody(
                f"the body is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        except json.JSONDecodeError as error:
            raise MalformedBody(
                f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
                hint=self._for_example(),
            ) from error
        except RecursionError as error:
            raise MalformedBody("the body is nested too deeply") from error

    def _named(self, row: Any, path: str) -> dict[str, Any]:
        """A row by column name. Raises `InvalidInput` for names that are unknown, missing or given twice."""
        if not isinstance(row, _Object):
            raise InvalidInput(
                f"expected a row as an object, got {_shown(row)}", path=path, hint=self._for_example()
            )
        values = dict(row)
        if len(values) != len(row):
            once: set[str] = set()
            twice = ""
            for twice, _ in row:
                if twice in once:
                    break
                once.add(twice)
            raise InvalidInput(
                f"{_quoted(twice)} is given twice", path=_member(path, twice), hint="send it once"
            )
        missing = [column.name for column in self._columns if column.needed and column.name not in values]
        unknown = [name for name in values if name not in self._known]
        if not missing and not unknown:
            return values
        said: list[str] = []
        if missing:
            said.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        if unknown:
            said.append(f"model {self._served.name!r} has no column {_some(unknown)}")
        raise InvalidInput(
            "; ".join(said),
            path=_member(path, unknown[0]) if len(unknown) == 1 and not missing else path,
            hint=self._meant(unknown),
        )

    def _meant(self, unknown: Sequence[str]) -> str:
        hints = [
            f"did you mean {_quoted(close)} where it says {_quoted(name)}?"
            for name in unknown[:_SHOWN_NAMES]
            if (close := near(name, self._names))
        ]
        return " ".join(hints) or f"a row has {_some(self._names)}"

    def _for_example(self) -> str:
        row = json.dumps(example_row(self._columns))
        return f"for example {row}" if len(row) <= 4 * _SHOWN_CHARS else "GET /openapi.json shows an example"

    # Replies ---------------------------------------------------------------------------------------

    def write(self, answer: Answer, call: InferCall) -> tuple[bytes, int | None]:
        """An object for an object, a list for a list. Raises `InvalidRequest` where BYTES are no text."""
        encode = self._encode
        specs = self._served.contract.outputs
        alone = isinstance(call, PeopleCall) and call.alone
        if alone and self._all_quick:
            parts: list[bytes] = []
            for (key, unpack, labels), raw in zip(self._quick, answer.raws, strict=True):
                values = unpack(raw)
                if labels is None:
                    data = encode(values[0])
                else:
                    data = encode(dict(zip(labels, values, strict=True)) if labels else values)
                if b"null" in data:
                    # Not a finite number: that takes a word.
                    break
                parts += (key, data)
            else:
                parts.append(b"}")
                return b"".join(parts), None
        try:
            columns = [
                _rows_of(spec, raw, shape, answer.rows)
                for spec, raw, shape in zip(specs, answer.raws, answer.shapes, strict=True)
            ]
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                "an output is not UTF-8 text, which JSON cannot carry",
                hint=f"ask /v2/models/{self._served.name}/infer for it as binary data",
            ) from error
        if alone:
            parts = []
            for key, column in zip(self._output_keys, columns, strict=True):
                parts += (key, encode(column[0]))
            parts.append(b"}")
            return b"".join(parts), None
        names = self._output_names
        return encode([dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]), None


class _Group:
    """One input and the columns that fill it; ``places`` is where a column stands in a decoded row."""

    def __init__(self, spec: TensorSpec, columns: Sequence[Column], places: Mapping[str, int]) -> None:
        self._spec = spec
        self._columns = columns
        self._single = columns[0].single
        self._filler = _filler(spec)
        self._places = [places.get(column.name) for column in columns]
        present = [place for place in self._places if place is not None]
        self._asked = bool(present)
        self._slice = slice(present[0], present[-1] + 1) if len(present) == len(columns) else None
        self._all = self._slice == slice(0, len(places))
        self._pack = packer.pack if (packer := struct_of(spec)) is not None and self._single else None
        self._gaps = spec.allow_nan

    def pack_row(self, values: tuple[Any, ...]) -> bytes:
        """Raw bytes of one decoded row. Raises ValueError, OverflowError or struct.error for what does not fit."""
        if not self._asked:
            return b""
        part: Sequence[Any] = values[self._slice] if self._slice is not None else self._filled(values)
        if self._pack is not None and not self._gaps:
            return self._pack(*part)
        return self._pack_flat(part)

    def pack_rows(self, rows: Sequence[tuple[Any, ...]], cells: Sequence[tuple[Any, ...]]) -> bytes:
        """The same for many rows, given as they are and by column."""
        if not self._asked:
            return b""
        if self._all and len(self._columns) > 1:
            return self._pack_flat(list(chain.from_iterable(rows)))
        if self._slice is None:
            return self._pack_flat(list(chain.from_iterable(map(self._filled, rows))))
        part = cells[self._slice]
        return self._pack_flat(
            part[0] if len(part) == 1 else list(chain.from_iterable(zip(*part, strict=True)))
        )

    def _filled(self, values: tuple[Any, ...]) -> list[Any]:
        # Static mode reads the key's columns only: what stands in the others is never seen.
        return [self._filler if place is None else values[place] for place in self._places]

    def _pack_flat(self, values: Sequence[Any]) -> bytes:
        if not self._single:
            for size in self._spec.shape:
                if any(len(value) != size for value in values):
                    raise ValueError("not the contract's shape, or one with an open size")
                values = list(chain.from_iterable(values))
        if self._gaps:
            values = [value if type(value) is float else self._gap(value) for value in values]
        return pack_plain(self._spec, values)

    def _gap(self, value: Any) -> Any:
        """What a missing or non-finite value of a decoded row is packed as; null stays where it is not allowed."""
        if not self._gaps:
            return value
        if self._spec.datatype == "BYTES":
            return "" if value is None else value
        return math.nan if value is None else NON_FINITE.get(value, value)

    def pack_carefully(self, rows: Sequence[dict[str, Any]], paths: Sequence[str]) -> tuple[bytes, Shape]:
        """Raw bytes and row shape of this input. Raises `InvalidInput` naming the first value that does not fit."""
        spec = self._spec
        if not self._asked and any(column.name not in row for row in rows for column in self._columns):
            return b"", spec.shape
        if not self._single:
            return self._pack_nested(rows, paths)
        values: list[Any] = []
        for row in rows:
            for column in self._columns:
                value = row.get(column.name, self._filler)
                values.append(self._gap(value) if value is None else value)
        try:
            return pack_values(spec, values, "$"), spec.shape
        except InvalidInput:
            width = len(self._columns)
            for i, value in enumerate(values):
                column = self._columns[i % width]
                _check(spec, value, column.name, _member(paths[i // width], column.name))
            raise

    def _pack_nested(self, rows: Sequence[dict[str, Any]], paths: Sequence[str]) -> tuple[bytes, Shape]:
        spec = self._spec
        values: list[Any] = []
        names: list[str] = []
        shape: list[int] = []
        for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
            at = _member(path, spec.name)
            value = row[spec.name]
            own = _shape_of(value, len(spec.shape))
            fits = len(own) == len(spec.shape) and all(
                want in (-1, have) for want, have in zip(spec.shape, own, strict=True)
            )
            if not fits:
                raise InvalidInput(
                    f"expected {_lists(spec.shape)}, got {_lists(own) if own else _shown(value)}",
                    path=at,
                    hint=_remedy(spec, spec.name),
                )
            if i and own != shape:
                raise InvalidInput(
                    f"this row has {_lists(own)}, the first has {_lists(shape)}",
                    path=at,
                    hint="send rows of different shapes in separate requests",
                )
            shape = own
            flat, where = flatten(value, own, at)
            values += [self._gap(value) if value is None else value for value in flat]
            names += where
        try:
            return pack_values(spec, values, "$", names), tuple(shape)
        except InvalidInput:
            for value, name in zip(values, names, strict=True):
                _check(spec, value, spec.name, name)
            raise


class _OutOfRange:
    """A number that no datatype holds."""


class _Object(list[tuple[str, Any]]):
    """A JSON object with all its pairs, those of a repeated key too."""


def _decoders(
    needed: Sequence[Column],
) -> tuple[msgspec.json.Decoder[Any] | None, msgspec.json.Decoder[Any] | None]:
    """Typed decoders of a row and of a list of rows; none where a column's name has signs that need an escape."""
    fields = [(f"column_{i}", _type_of(column)) for i, column in enumerate(needed)]
    names = {f"column_{i}": column.name for i, column in enumerate(needed)}
    try:
        row = msgspec.defstruct("Row", fields, rename=names, forbid_unknown_fields=True, gc=False)
    except ValueError:
        return None, None
    return msgspec.json.Decoder(row), msgspec.json.Decoder(list[row])  # type: ignore[valid-type]  # made above


def _type_of(column: Column) -> Any:
    spec = column.spec
    kind: Any = bool
    if spec.datatype == "BYTES":
        kind = str | None if spec.allow_nan else str
    elif spec.datatype in FLOATS:
        kind = float | Literal["NaN", "Infinity", "-Infinity"] | None if spec.allow_nan else float
    elif spec.datatype in INTEGERS:
        kind = int
    for _ in () if column.single else spec.shape:
        kind = list[kind]
    return kind


def _filler(spec: TensorSpec) -> Any:
    return {"BYTES": "", "BOOL": False}.get(spec.datatype, 0)


def _example(column: Column) -> Any:
    value: Any = "text" if column.spec.datatype == "BYTES" else _filler(column.spec)
    for size in () if column.single else reversed(column.spec.shape):
        value = [value] * (1 if size == -1 else size)
    return value


def labels_of(spec: TensorSpec, size: int) -> tuple[str, ...]:
    """What the positions of an output are called; empty where they have no names."""
    names = spec.labels or spec.columns
    return names if len(set(names)) == size else ()


def _rows_of(spec: TensorSpec, raw: bytes, shape: Shape, rows: int) -> list[Any]:
    """The JSON value of each row of an output. Raises UnicodeDecodeError where BYTES are no text."""
    values = unpack_values(spec, raw)
    if spec.shape in ((), (1,)):
        return values
    if len(shape) == 1:
        size = shape[0]
        parts = [values[row * size : (row + 1) * size] for row in range(rows)]
        names = labels_of(spec, size)
        return [dict(zip(names, part, strict=True)) for part in parts] if names else parts
    for size in reversed(shape[1:]):
        values = [values[at : at + size] for at in range(0, len(values), size)] if size else []
    size = shape[0]
    values = [values[row * size : (row + 1) * size] for row in range(rows)]
    return values


def _refuse_constant(word: str) -> Any:
    raise MalformedBody(
        f"the body is not JSON: {word} is no JSON number",
        hint=f'send null, or "{word}" in quotes, where the contract allows missing values',
    )


def _parse_int(digits: str) -> Any:
    # No datatype holds thousands of digits, and reading them takes time that grows with their square.
    return int(digits) if len(digits) <= _MOST_DIGITS else _OutOfRange()


def _parse_float(text: str) -> Any:
    value = float(text)
    return value if math.isfinite(value) else _OutOfRange()


def _shape_of(value: Any, dimensions: int) -> list[int]:
    """Sizes along the first elements of nested lists, at most one more than ``dimensions``."""
    shape: list[int] = []
    while isinstance(value, list) and not isinstance(value, _Object) and len(shape) <= dimensions:
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _check(spec: TensorSpec, value: Any, name: str, path: str) -> None:
    try:
        pack_values(spec, [value], path)
    except InvalidInput as error:
        raise InvalidInput(
            f"expected {_kind(spec)}, got {_shown(value)}", path=path, hint=_remedy(spec, name, value)
        ) from error


def _kind(spec: TensorSpec) -> str:
    if spec.datatype == "BYTES":
        return "text"
    if spec.datatype == "BOOL":
        return "true or false"
    return "a whole number" if spec.datatype in INTEGERS else "a number"


def _remedy(spec: TensorSpec, name: str, value: Any = None) -> str:
    unit = f" in {spec.unit}" if spec.unit else ""
    low, high = bounds_of(spec)
    numeric = isinstance(value, int | float | _OutOfRange) and not isinstance(value, bool)
    span = f" from {low} to {high}" if numeric and low is not None else ""
    gaps = ", or null where it is missing" if spec.allow_nan else ""
    return f"{_quoted(name)} is {spec.datatype}: {_kind(spec)}{unit}{span}{gaps}"


def bounds_of(spec: TensorSpec) -> tuple[int | float | None, int | float | None]:
    """The smallest and the largest number that a datatype holds; None and None for what is no number."""
    if spec.datatype in INTEGERS:
        bits = 8 * NUMPY[spec.datatype].itemsize
        return (
            (0, 2**bits - 1) if spec.datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
    # Up to half a step above the largest number of the type, rounding goes down to it.
    largest = {
        "FP16": math.nextafter(65520.0, 0.0),
        "FP32": math.nextafter(2.0**128 - 2.0**103, 0.0),
        "FP64": sys.float_info.max,
    }.get(spec.datatype)
    return (None, None) if largest is None else (-largest, largest)


def _member(path: str, name: str) -> str:
    if name.isidentifier() and len(name) <= _SHOWN_CHARS:
        return f"{path}.{name}"
    return f"{path}[{_quoted(name)}]"


def _quoted(name: str) -> str:
    return json.dumps(name if len(name) <= _SHOWN_CHARS else name[: _SHOWN_CHARS - 3] + "...")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(_quoted(name) for name in names[:_SHOWN_NAMES])
    return shown + (f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else "")


def _lists(shape: Sequence[int]) -> str:
    return "a list of shape [" + ", ".join("any" if size == -1 else str(size) for size in shape) + "]"


def _shown(value: Any) -> str:
    """A value as JSON has it, cut short."""
    if isinstance(value, list):
        return "an object" if isinstance(value, _Object) else f"a list of {len(value)}"
    if isinstance(value, _OutOfRange):
        return "a number out of range"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
