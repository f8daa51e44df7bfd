"""A column of a file as the tensor that the contract wants: cast only where nothing is lost, and said so where not.

The rules are those of a JSON request. A number for a floating-point input is taken as a double and rounded
to the nearest value of the input's datatype; too large a number is refused, and so is an integer that a
double cannot hold. A whole number may stand in a floating-point column of the file. Missing values are NaN
(texts: empty) where the contract allows them. Numbers, booleans and texts never stand for one another,
but for CSV, where everything is text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY
from parbake.contract.model import TensorSpec
from parbake.contract.tensors import Tensor
from parbake.errors import InputFileError

Mask = npt.NDArray[np.bool_]
Reason = str | Callable[[int], str]

_TRUE, _FALSE = ("true", "1"), ("false", "0")
_MISSING_HINT = "pack with --allow-nan if the model takes missing values"


class Faults:
    """The rows of a batch that do not fit the contract, each with its first fault."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str, str]] = {}
        """By position in the batch: column, reason, hint."""

    def add(self, bad: Mask, column: str, reason: Reason, hint: str = "") -> None:
        """Note the rows where ``bad`` is true; ``reason`` may depend on the position."""
        for at in np.flatnonzero(bad).tolist():
            if at not in self.found:
                self.found[at] = (column, reason if isinstance(reason, str) else reason(at), hint)

    def add_from(self, inner: Faults, rows: npt.NDArray[np.intp]) -> None:
        """Take over the faults of a selection: position i there is ``rows[i]`` here."""
        for at, fault in inner.found.items():
            self.found.setdefault(int(rows[at]), fault)


def tensor(array: Any, spec: TensorSpec, column: str, faults: Faults, *, text: bool) -> Tensor | list[Tensor]:
    """An Arrow array as an input: shape (rows, *spec.shape), or one tensor per row where a size is open.

    Rows that do not fit are noted in ``faults`` and hold anything. ``text`` is for CSV, whose cells are
    strings. Raises `InputFileError` where the whole column has the wrong type.
    """
    array = _plain(array)
    if not spec.fixed:
        return _open(array, spec, column, faults)
    if _is_list(array.type):
        if not spec.shape:
            raise _wrong_type(array.type, spec, column)
        return _nested(array, spec, spec.shape, column, faults)
    if spec.elements != 1 or len(spec.shape) > 1:
        raise InputFileError(
            f"column {column!r} holds single values, input {spec.name!r} wants {list(spec.shape)} per row",
            hint="a list column (Parquet, Arrow, JSON lines), or pack with an example whose columns have names",
        )
    return scalars(array, spec, column, faults, text=text).reshape(len(array), *spec.shape)


def scalars(array: Any, spec: TensorSpec, column: str, faults: Faults, *, text: bool = False) -> Tensor:
    """An Arrow array of single values as a flat array of the spec's datatype."""
    array = _plain(array)
    kind = array.type
    if spec.datatype == "BYTES":
        return _texts(array, spec, column, faults)
    if text:
        array = _parsed(array, spec, column, faults)
        kind = array.type
    missing = _missing(array, spec, column, faults)
    if pa.types.is_null(kind):
        return np.full(len(array), np.nan if spec.datatype in FLOATS else 0).astype(NUMPY[spec.datatype])
    if spec.datatype == "BOOL":
        if not pa.types.is_boolean(kind):
            raise _wrong_type(kind, spec, column)
        return _numpy(array)
    if pa.types.is_decimal(kind):
        array = array.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _wrong_type(kind, spec, column)
    values = _numpy(array)
    if missing is not None:
        values = values.copy()
        values[missing] = np.nan if values.dtype.kind == "f" else 0
    if spec.datatype in INTEGERS:
        return _integers(values, missing, spec, column, faults)
    return _floats(values, missing, spec, column, faults)


def _floats(values: Tensor, missing: Mask | None, spec: TensorSpec, column: str, faults: Faults) -> Tensor:
    dtype = NUMPY[spec.datatype]
    numbers = values
    if values.dtype.kind in "iu":
        numbers = values.astype(np.float64)
        if (
            values.dtype.itemsize == 8
            and len(values)
            and (values.max() > 1 << 53 or values.min() < -(1 << 53))
        ):
            exact = np.array([int(n) == v for n, v in zip(numbers.tolist(), values.tolist(), strict=True)])
            faults.add(
                ~exact, column, lambda at: f"{values[at]} has no exact double, {spec.datatype} was expected"
            )
        if missing is not None:
            numbers[missing] = np.nan
    with np.errstate(over="ignore"):
        out = numbers if numbers.dtype == dtype else numbers.astype(dtype)
    finite = np.isfinite(out)
    if finite.all():
        return out
    given = np.isfinite(numbers)
    faults.add(given & ~finite, column, lambda at: f"{numbers[at]} is too large for {spec.datatype}")
    odd = ~given if missing is None else ~given & ~missing
    if not spec.allow_nan:
        faults.add(
            odd, column, lambda at: f"{_word(numbers[at])}, where the contract wants a number", _MISSING_HINT
        )
        return out
    # One NaN for all, so that one row has one key.
    out = out.copy()
    out[np.isnan(out)] = np.nan
    return out


def _integers(values: Tensor, missing: Mask | None, spec: TensorSpec, column: str, faults: Faults) -> Tensor:
    dtype = NUMPY[spec.datatype]
    limits = np.iinfo(dtype)  # type: ignore[type-var]  # an integer dtype, as the datatype says
    if values.dtype == dtype:
        return values
    bad: Mask
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.trunc(values))
        absent = np.zeros(len(values), bool) if missing is None else missing
        faults.add(
            ~whole & ~absent,
            column,
            lambda at: f"{_word(values[at])} is no whole number, expected {spec.datatype}",
        )
        # The largest integers have no double of their own: the first double beyond them does.
        bad = whole & ((values < float(limits.min)) | (values >= float(int(limits.max) + 1)))
        safe = np.where(whole & ~bad, values, 0)
    else:
        if not len(values) or (int(values.min()) >= limits.min and int(values.max()) <= limits.max):
            return values.astype(dtype)
        bad = np.array([not limits.min <= value <= limits.max for value in values.tolist()])
        safe = np.where(bad, 0, values)
    faults.add(bad, column, lambda at: f"{values[at]} does not fit {spec.datatype}")
    return safe.astype(dtype)


def _texts(array: Any, spec: TensorSpec, column: str, faults: Faults) -> Tensor:
    kind = array.type
    if pa.types.is_null(kind):
        array = array.cast(pa.string())
    elif not (_is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        if not pa.types.is_fixed_size_binary(kind):
            raise _wrong_type(kind, spec, column)
        array = array.cast(pa.binary())
    if _missing(array, spec, column, faults) is not None:
        array = array.fill_null(pa.scalar("" if _is_text(array.type) else b"", array.type))
    out = np.empty(len(array), dtype=object)
    out[:] = array.to_pylist()
    return out


def _parsed(array: Any, spec: TensorSpec, column: str, faults: Faults) -> Any:
    """CSV cells (strings) as numbers or booleans; empty cells are missing."""
    import pyarrow.compute as pc

    empty = pc.equal(array, "")
    if pc.any(empty).as_py():
        array = pc.if_else(empty, pa.scalar(None, array.type), array)
    if spec.datatype != "BOOL":
        wanted = (
            pa.float64()
            if spec.datatype in FLOATS
            else pa.uint64()
            if spec.datatype == "UINT64"
            else pa.int64()
        )
        try:
            return array.cast(wanted)
        except pa.ArrowInvalid:
            pass
    values: list[Any] = []
    bad = np.zeros(len(array), bool)
    cells = array.to_pylist()
    for at, cell in enumerate(cells):
        try:
            values.append(None if cell is None else _value(cell.strip(), spec.datatype))
        except ValueError:
            values.append(0)
            bad[at] = True
    faults.add(bad, column, lambda at: f"{_shown(cells[at])} is no {spec.datatype}")
    if spec.datatype == "BOOL":
        return pa.array([None if value is None else bool(value) for value in values], pa.bool_())
    if spec.datatype in FLOATS:
        return pa.array(values, pa.float64())
    limits = np.iinfo(NUMPY[spec.datatype])  # type: ignore[type-var]  # an integer dtype
    outside = np.array(
        [value is not None and not limits.min <= value <= limits.max for value in values], bool
    )
    faults.add(outside, column, lambda at: f"{_shown(cells[at])} does not fit {spec.datatype}")
    inside = [0 if out else value for value, out in zip(values, outside.tolist(), strict=True)]
    return pa.array(inside, pa.uint64() if spec.datatype == "UINT64" else pa.int64())


def _value(cell: str, datatype: str) -> float | int | bool:
    """One cell of a CSV file. Raises ValueError."""
    if datatype == "BOOL":
        word = cell.lower()
        if word not in _TRUE + _FALSE:
            raise ValueError(cell)
        return word in _TRUE
    if "_" in cell:
        # Python reads 1_000 as a number, and no other reader does.
        raise ValueError(cell)
    number = float(cell)
    if datatype in FLOATS:
        return number
    try:
        return int(cell)
    except ValueError:
        if not number.is_integer():
            raise
        return int(number)


def _nested(array: Any, spec: TensorSpec, shape: tuple[int, ...], column: str, faults: Faults) -> Tensor:
    """A list column as (rows, *shape): nested as the shape is, or flat with all elements of a row."""
    import pyarrow.compute as pc

    rows = len(array)
    out = np.zeros((rows, *shape), NUMPY[spec.datatype])
    if spec.datatype == "BYTES":
        out.fill("")
    inner = array.type.value_type
    deeper = len(shape) > 1 and _is_list(inner)
    size = shape[0] if deeper else int(np.prod(shape, dtype=np.int64))
    missing = _numpy(array.is_null()) if array.null_count else np.zeros(rows, bool)
    faults.add(missing, column, "missing", "every row needs its list")
    lengths = _numpy(pc.list_value_length(array).fill_null(size))
    faults.add(lengths != size, column, lambda at: f"{lengths[at]} elements, expected {size}")
    good = ~missing & (lengths == size)
    kept = np.flatnonzero(good)
    flat = _plain((array if good.all() else array.filter(pa.array(good))).flatten())
    below = Faults()
    values = _nested(flat, spec, shape[1:], column, below) if deeper else scalars(flat, spec, column, below)
    if below.found:
        faults.add_from(below, np.repeat(kept, size))
    out[kept] = values.reshape(len(kept), *shape)
    return out


def _open(array: Any, spec: TensorSpec, column: str, faults: Faults) -> list[Tensor]:
    """A list column whose rows differ in size: one tensor per row, nested as the shape is."""
    if not _is_list(array.type):
        raise _wrong_type(array.type, spec, column)
    empty = np.zeros([max(size, 0) for size in spec.shape], NUMPY[spec.datatype])
    out: list[Tensor] = []
    for at, item in enumerate(array):
        here = Faults()
        row = empty
        try:
            if not item.is_valid:
                raise ValueError("missing")
            leaves, sizes = _leaves(item.values, spec.shape)
            if any(want not in (-1, have) for want, have in zip(spec.shape, sizes, strict=True)):
                raise ValueError(
                    f"has shape {list(sizes)}, expected {[s if s >= 0 else 'any' for s in spec.shape]}"
                )
            row = scalars(leaves, spec, column, here).reshape(sizes)
            if here.found:
                raise ValueError(next(iter(here.found.values()))[1])
        except ValueError as error:
            faults.found.setdefault(at, (column, str(error), ""))
            row = empty
        out.append(row)
    return out


def _leaves(array: Any, shape: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """The elements of one nested list and its sizes. Raises ValueError where it is not regular."""
    import pyarrow.compute as pc

    array = _plain(array)
    if len(shape) == 1:
        if _is_list(array.type):
            raise ValueError("nested deeper than the contract's shape")
        return array, (len(array),)
    if not _is_list(array.type):
        raise ValueError("nested less deep than the contract's shape")
    if array.null_count:
        raise ValueError("missing inside")
    lengths = set(pc.list_value_length(array).to_pylist())
    if len(lengths) > 1:
        raise ValueError("its lists differ in length")
    leaves, sizes = _leaves(array.flatten(), shape[1:])
    return leaves, (len(array), lengths.pop() if lengths else max(shape[1], 0), *sizes[1:])


def _missing(array: Any, spec: TensorSpec, column: str, faults: Faults) -> Mask | None:
    """Where the array has nulls, or None where it has none; nulls that the contract forbids are faults."""
    if not array.null_count:
        return None
    missing = _numpy(array.is_null())
    if not (spec.allow_nan and (spec.datatype in FLOATS or spec.datatype == "BYTES")):
        faults.add(missing, column, f"missing, where the contract wants {spec.datatype}", _MISSING_HINT)
    return missing


def _plain(array: Any) -> Any:
    """The same values without extension types, dictionaries, run lengths and views."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_run_end_encoded(array.type):
        import pyarrow.compute as pc

        array = pc.run_end_decode(array)
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if pa.types.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    return array


def _numpy(array: Any) -> Tensor:
    """An array of numbers or booleans in numpy, without a copy where it can be; anything may stand for nulls.

    Arrow's own ``to_numpy`` imports pandas where that is installed, which takes longer than a small bake.
    """
    if pa.types.is_boolean(array.type):
        return np.asarray(_numpy(array.cast(pa.uint8())) != 0)
    dtype = np.dtype(array.type.to_pandas_dtype())
    data = array.buffers()[1]
    if data is None:
        return np.zeros(len(array), dtype)
    return np.frombuffer(data, dtype)[array.offset : array.offset + len(array)]


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _wrong_type(kind: Any, spec: TensorSpec, column: str) -> InputFileError:
    hint = f"write the column as {spec.datatype}"
    if pa.types.is_temporal(kind):
        hint = "write times as numbers, as training had them (seconds, for example)"
    elif pa.types.is_boolean(kind):
        hint = "write the column as 0 and 1"
    elif spec.datatype == "BYTES":
        hint = "write the column as text"
    elif spec.datatype == "BOOL":
        hint = "write the column as booleans"
    return InputFileError(
        f"column {column!r} is {kind}, input {spec.name!r} wants {spec.datatype}", hint=hint
    )


def _word(value: Any) -> str:
    return "NaN" if np.isnan(value) else str(value)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
