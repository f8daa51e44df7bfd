"""Tensors from the wire, held against the contract: the checks that REST, gRPC and the people's form share.

Every refusal names the path of the fault, the value and the remedy.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY
from parbake.contract.model import Contract, TensorSpec
from parbake.contract.tensors import Shape, split_bytes
from parbake.errors import InvalidInput, RequestTooLarge
from parbake.serving.service import ServedVersion

_CODES: Final = {
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip

NON_FINITE: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How values that JSON cannot spell are written, in both directions (as Protocol Buffers' JSON has them)."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Given:
    """One tensor as a request names it; ``path`` is where in the request it stands."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes
    path: str
    shape_path: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A request's rows, ready for `ServedVersion.predict`. Inputs that are not needed are empty bytes."""

    raws: list[bytes]
    rows: int
    shapes: tuple[Shape, ...]


def gather(served: ServedVersion, given: Sequence[Given], where: str = "$.inputs") -> Inputs:
    """Put a request's tensors into the contract's order. Raises `InvalidInput` or `RequestTooLarge`."""
    contract = served.contract
    by_name: dict[str, Given] = {}
    for tensor in given:
        if contract.input(tensor.name) is None:
            raise InvalidInput(
                f"model {served.name!r} has no input {tensor.name[:60]!r}",
                path=f"{tensor.path}.name",
                hint=_inputs(served),
            )
        if tensor.name in by_name:
            raise InvalidInput(f"input {tensor.name!r} is given twice", path=f"{tensor.path}.name")
        by_name[tensor.name] = tensor
    raws: list[bytes] = []
    shapes: list[Shape] = []
    rows = -1
    for position, spec in enumerate(contract.inputs):
        tensor = by_name.get(spec.name)  # type: ignore[assignment]  # may be None here
        if tensor is None:
            if position in served.needed:
                raise InvalidInput(f"input {spec.name!r} is missing", path=where, hint=_inputs(served))
            raws.append(b"")
            shapes.append(spec.shape)
            continue
        check_datatype(spec, tensor.datatype, f"{tensor.path}.datatype")
        count, shape = row_shape(contract, spec, tensor.shape, tensor.shape_path or f"{tensor.path}.shape")
        if rows not in (-1, count):
            raise InvalidInput(
                f"input {spec.name!r} has {count} rows, the one before has {rows}",
                path=tensor.shape_path or f"{tensor.path}.shape",
            )
        rows = count
        check_raw(spec, tensor.raw, count, shape, tensor.path)
        raws.append(tensor.raw)
        shapes.append(shape)
    return Inputs(raws, rows, tuple(shapes))


def check_datatype(spec: TensorSpec, datatype: str, path: str) -> None:
    """The request must say the contract's datatype: bytes are never reinterpreted, values never cast."""
    if datatype != spec.datatype:
        raise InvalidInput(
            f"expected {spec.datatype} for input {spec.name!r}, got {datatype[:40]!r}",
            path=path,
            hint=f"send {spec.name!r} as {spec.datatype}",
        )


def row_shape(contract: Contract, spec: TensorSpec, shape: Sequence[int], path: str) -> tuple[int, Shape]:
    """The number of rows and the shape of one, from a tensor's whole shape."""
    if contract.batch.dimension == "none":
        rows, row = 1, tuple(shape)
    elif shape:
        rows, row = shape[0], tuple(shape[1:])
    else:
        rows, row = -1, ()
    expected = wire_shape(contract, spec)
    fits = len(row) == len(spec.shape) and all(
        want in (-1, have) and have >= 0 for want, have in zip(spec.shape, row, strict=True)
    )
    if not fits or rows < 0:
        raise InvalidInput(
            f"expected shape {_words(expected)} for input {spec.name!r}, got {list(shape)[:16]}",
            path=path,
            hint="the first size is the number of rows" if contract.batch.dimension != "none" else "",
        )
    if rows == 0:
        raise InvalidInput(f"input {spec.name!r} has no rows", path=path, hint="send at least one row")
    if rows > contract.batch.max_rows:
        raise RequestTooLarge(
            f"{rows} rows in one request, the limit of {contract.name!r} is {contract.batch.max_rows}",
            path=path,
            hint="send several requests, or score a file with parbake bake",
        )
    return rows, row


def wire_shape(contract: Contract, spec: TensorSpec) -> tuple[int, ...]:
    """A tensor's shape as the protocol shows it, -1 for any size."""
    if contract.batch.dimension == "none":
        return spec.shape
    return (-1, *spec.shape)


def check_raw(spec: TensorSpec, raw: bytes, rows: int, shape: Shape, path: str) -> None:
    """Raw bytes must fill their shape and hold values that the contract allows."""
    count = rows * math.prod(shape)
    if spec.datatype == "BYTES":
        try:
            split_bytes(raw, count)
        except ValueError as error:
            raise InvalidInput(f"input {spec.name!r}: {error}", path=path) from error
        return
    size = count * NUMPY[spec.datatype].itemsize
    if len(raw) != size:
        raise InvalidInput(
            f"shape {[rows, *shape]} of {spec.datatype} takes {size} bytes, input {spec.name!r} has {len(raw)}",
            path=path,
        )
    if spec.datatype in FLOATS and not spec.allow_nan:
        finite = np.isfinite(np.frombuffer(raw, NUMPY[spec.datatype]))
        if not finite.all():
            at = int(np.flatnonzero(~finite)[0])
            value = float(np.frombuffer(raw, NUMPY[spec.datatype])[at])
            raise InvalidInput(
                f"input {spec.name!r} holds {value} and the contract allows only finite numbers",
                path=f"{path}.data[{at}]",
                hint="pack with --allow-nan if the model takes missing values",
            )
    elif spec.datatype == "BOOL":
        values = np.frombuffer(raw, np.uint8)
        if (values > 1).any():
            at = int(np.flatnonzero(values > 1)[0])
            raise InvalidInput(
                f"BOOL input {spec.name!r} holds the byte {values[at]}, expected 0 or 1",
                path=f"{path}.data[{at}]",
            )


def pack_values(spec: TensorSpec, values: Sequence[Any], path: str, names: Sequence[str] = ()) -> bytes:
    """JSON values (flat) as raw bytes. Raises `InvalidInput` naming the first value that does not fit.

    ``names``, where given, are the path of each value instead of ``path[i]``.
    """
    datatype = spec.datatype
    if datatype == "BYTES":
        parts: list[bytes] = []
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise _unfit(spec, value, path, i, names)
            try:
                data = value.encode()
            except UnicodeEncodeError as error:
                raise _unfit(spec, value, path, i, names) from error
            parts.append(_LENGTH.pack(len(data)))
            parts.append(data)
        return b"".join(parts)
    if datatype == "BOOL":
        for i, value in enumerate(values):
            if value is not True and value is not False:
                raise _unfit(spec, value, path, i, names)
        return bytes(values)
    numbers: list[Any] = []
    whole = datatype in INTEGERS
    for i, value in enumerate(values):
        number = value
        if spec.allow_nan and not whole:
            if value is None:
                number = math.nan
            elif isinstance(value, str):
                number = NON_FINITE.get(value, value)
        kind = type(number)
        if kind is not int and (whole or kind is not float):
            raise _unfit(spec, value, path, i, names)
        if kind is float and not spec.allow_nan and not math.isfinite(number):
            raise _unfit(spec, value, path, i, names)
        numbers.append(number)
    try:
        return struct.pack(f"<{len(numbers)}{_CODES[datatype]}", *numbers)
    except (struct.error, OverflowError):
        for i, number in enumerate(numbers):
            try:
                struct.pack(f"<{_CODES[datatype]}", number)
            except (struct.error, OverflowError) as error:
                raise _unfit(spec, number, path, i, names) from error
        raise


def pack_plain(spec: TensorSpec, values: Sequence[Any]) -> bytes:
    """Values of the right types and known to be allowed (flat) as raw bytes, quickly.

    Raises struct.error or OverflowError where the datatype cannot hold a number.
    """
    if spec.datatype == "BYTES":
        encoded = [value.encode() for value in values]
        return b"".join([part for data in encoded for part in (_LENGTH.pack(len(data)), data)])
    if spec.datatype == "BOOL":
        return bytes(values)
    return struct.pack(f"<{len(values)}{_CODES[spec.datatype]}", *values)


def unpack_values(spec: TensorSpec, raw: bytes) -> list[Any]:
    """Raw bytes as JSON values (flat); what is not a finite number becomes a word (see `NON_FINITE`).

    Raises UnicodeDecodeError where ``BYTES`` are not text.
    """
    if spec.datatype == "BYTES":
        count = 0
        at = 0
        while at < len(raw):
            at += 4 + _LENGTH.unpack_from(raw, at)[0]
            count += 1
        return [item.decode() for item in split_bytes(raw, count)]
    if spec.datatype == "BOOL":
        return [byte != 0 for byte in raw]
    values = list(struct.unpack(f"<{len(raw) // NUMPY[spec.datatype].itemsize}{_CODES[spec.datatype]}", raw))
    if spec.datatype in FLOATS and not all(map(math.isfinite, values)):
        return [value if math.isfinite(value) else _word(value) for value in values]
    return values


def struct_of(spec: TensorSpec) -> struct.Struct | None:
    """The struct of one row of fixed numbers, or None for anything else."""
    if spec.datatype in _CODES and spec.fixed:
        return struct.Struct(f"<{spec.elements}{_CODES[spec.datatype]}")
    return None


def _word(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _unfit(spec: TensorSpec, value: Any, path: str, at: int, names: Sequence[str]) -> InvalidInput:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    where = names[at] if names else f"{path}[{at}]"
    hint = f"send {spec.name!r} as {spec.datatype}"
    if value is None or (isinstance(value, str) and value in NON_FINITE):
        hint = "the contract allows no missing values for it (pack with --allow-nan)"
    return InvalidInput(f"expected {spec.datatype}, got {shown}", path=where, hint=hint)


def _words(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in shape) + "]"


def _inputs(served: ServedVersion) -> str:
    specs = served.contract.inputs
    words = ", ".join(
        f"{spec.name} {spec.datatype} {_words(wire_shape(served.contract, spec))}" for spec in specs[:12]
    )
    more = f" and {len(specs) - 12} more" if len(specs) > 12 else ""
    return f"its inputs are {words}{more}"
