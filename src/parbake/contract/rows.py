"""Bring rows as people have them (array, frame, table, dicts by column) into a contract's input tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY
from parbake.contract.model import TensorSpec
from parbake.contract.tensors import Tensor
from parbake.errors import InvalidInput, PackRefused

Where = Callable[[int], str]


def to_tensors(rows: object, inputs: tuple[TensorSpec, ...]) -> tuple[dict[str, Tensor], int]:
    """Tensors by input name (first axis: the row) and the number of rows.

    ``rows`` is a numpy array or nested list (one input), a mapping of input or column name to array (or
    of name to single value: one row), a list of such mappings by column, a pandas or polars DataFrame, or
    a pyarrow Table. Values are never reinterpreted: a number does not become a string, a fraction not an
    integer. Raises `InvalidInput` naming the path of the first value that does not fit.
    """
    frame = _columns_of(rows)
    if frame is not None:
        return _from_columns(frame, inputs, lambda name: lambda i: f"$.{name}[{i}]")
    if isinstance(rows, Mapping):
        if rows and all(_dense(value, f"$.{name}").ndim == 0 for name, value in rows.items()):
            single = {str(name): [value] for name, value in rows.items()}
            return _from_columns(single, inputs, lambda name: lambda _: f"$.{name}")
        named = {str(name): value for name, value in rows.items()}
        return _from_columns(named, inputs, lambda name: lambda i: f"$.{name}[{i}]")
    if (
        isinstance(rows, Sequence)
        and not isinstance(rows, str | bytes)
        and any(isinstance(r, Mapping) for r in rows)
    ):
        return _from_columns(_transposed(rows, inputs), inputs, lambda name: lambda i: f"$[{i}].{name}")
    return _from_array(rows, inputs)


def as_inputs(
    example: object, inputs: tuple[TensorSpec, ...]
) -> tuple[tuple[TensorSpec, ...], dict[str, Tensor]]:
    """An example for a model whose inputs are known: the specs with what the example adds, and its tensors.

    A table with a column per position names a matrix input's columns; NaN in the example allows it.
    Raises `PackRefused` where the example does not fit.
    """
    names = [str(name) for name in _columns_of(example) or (example if isinstance(example, Mapping) else ())]
    specs = inputs
    matrix = inputs[0] if len(inputs) == 1 and len(inputs[0].shape) == 1 else None
    if matrix is not None and names and matrix.name not in names and matrix.shape[0] in (-1, len(names)):
        specs = (replace(matrix, columns=tuple(names)),)
    lenient = tuple(replace(spec, allow_nan=True) for spec in specs)
    try:
        tensors, rows = to_tensors(example, lenient)
    except InvalidInput as error:
        raise PackRefused(
            f"the example does not fit the model: {error.message}", path=error.path, hint=error.hint
        ) from error
    if rows == 0:
        raise PackRefused("the example has no rows", hint="give some typical rows: parity is checked on them")
    found = tuple(replace(spec, allow_nan=holds_gaps(tensors[spec.name])) for spec in specs)
    return found, tensors


def gappy_texts(example: object) -> frozenset[str]:
    """The text columns of a frame or table that have missing values (in tensors: empty strings)."""
    gappy: set[str] = set()
    for name, values in (_columns_of(example) or {}).items():
        items = values if isinstance(values, list) else values.tolist() if values.dtype.kind == "O" else []
        if any(item is None for item in items) and all(
            item is None or isinstance(item, str) for item in items
        ):
            gappy.add(name)
    return frozenset(gappy)


def holds_gaps(array: Tensor) -> bool:
    """Whether a tensor of numbers holds NaN or infinities."""
    return array.dtype.kind == "f" and not bool(np.isfinite(array).all())


def column_names(inputs: tuple[TensorSpec, ...]) -> tuple[str, ...]:
    """The names by which one row is given: a matrix input's columns, or the input's own name."""
    return tuple(name for spec in inputs for name in (spec.columns or (spec.name,)))


def _columns_of(rows: object) -> dict[str, Any] | None:
    """The columns of a frame or table, or None for anything else."""
    module = type(rows).__module__.partition(".")[0]
    table: Any = rows
    if module == "polars" and hasattr(table, "to_arrow"):
        table = table.to_arrow()
        module = "pyarrow"
    if module == "pandas" and hasattr(table, "columns"):
        names = [str(name) for name in table.columns]
        _refuse_twins(names)
        return {name: _pandas_values(table.iloc[:, i]) for i, name in enumerate(names)}
    if module == "pyarrow" and hasattr(table, "column_names"):
        _refuse_twins(table.column_names)
        return {
            name: _arrow_values(column)
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    return None


def _refuse_twins(names: Sequence[str]) -> None:
    twin = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twin is not None:
        raise InvalidInput(f"two columns are named {twin!r}", path="$")


def _pandas_values(series: Any) -> Tensor:
    missing = series.isna().to_numpy(dtype=bool)
    if not missing.any():
        values: Tensor = series.to_numpy()
        return values
    if getattr(series.dtype, "kind", "O") == "f" and isinstance(series.dtype, np.dtype):
        return np.asarray(series.to_numpy())
    out = np.empty(len(series), dtype=object)
    out[:] = [None if gone else value for value, gone in zip(series.tolist(), missing.tolist(), strict=True)]
    return out


def _arrow_values(column: Any) -> Tensor | list[Any]:
    import pyarrow as pa

    kind = column.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if plain and column.null_count == 0:
        return np.asarray(column.to_numpy())
    values: list[Any] = column.to_pylist()
    return values


def _transposed(rows: Sequence[Any], inputs: tuple[TensorSpec, ...]) -> dict[str, list[Any]]:
    names = list(column_names(inputs))
    columns: dict[str, list[Any]] = {}
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidInput(f"expected a row by column name, got {_shown(row)}", path=f"$[{i}]")
        if i == 0:
            columns = {str(name): [] for name in row}
        if len(row) != len(columns) or any(name not in columns for name in row):
            odd = next((name for name in row if name not in columns), None)
            if odd is not None:
                _refuse_unknown(str(odd), inputs, f"$[{i}].{odd}")
                raise InvalidInput(f"column {odd!r} is not in the rows before", path=f"$[{i}].{odd}")
            gone = next(name for name in columns if name not in row)
            raise InvalidInput(
                f"column {gone!r} is missing", path=f"$[{i}]", hint=f"a row has {', '.join(names)}"
            )
        for name, value in row.items():
            columns[str(name)].append(value)
    return columns


def _from_columns(
    columns: Mapping[str, Any], inputs: tuple[TensorSpec, ...], where_of: Callable[[str], Where]
) -> tuple[dict[str, Tensor], int]:
    known = {spec.name for spec in inputs} | {name for spec in inputs for name in spec.columns}
    for name in columns:
        if name not in known:
            _refuse_unknown(name, inputs, f"$.{name}")
    tensors: dict[str, Tensor] = {}
    rows = -1
    for spec in inputs:
        if spec.name in columns and not (spec.columns and all(name in columns for name in spec.columns)):
            tensor = _shaped(
                _dense(columns[spec.name], f"$.{spec.name}"), spec, f"$.{spec.name}", where_of(spec.name)
            )
        else:
            names = spec.columns or (spec.name,)
            gone = next((name for name in names if name not in columns), None)
            if gone is not None:
                raise InvalidInput(
                    f"column {gone!r} is missing", path="$", hint=f"a row has {_some(column_names(inputs))}"
                )
            parts = []
            for name in names:
                one = replace(spec, name=name, shape=(), columns=())
                parts.append(_shaped(_dense(columns[name], f"$.{name}"), one, f"$.{name}", where_of(name)))
                if len(parts[-1]) != len(parts[0]):
                    raise InvalidInput(
                        f"column {name!r} has {len(parts[-1])} rows, {names[0]!r} has {len(parts[0])}",
                        path=f"$.{name}",
                    )
            tensor = np.stack(parts, axis=1)
        if rows not in (-1, len(tensor)):
            raise InvalidInput(
                f"input {spec.name!r} has {len(tensor)} rows, the one before has {rows}",
                path=f"$.{spec.name}",
            )
        rows = len(tensor)
        tensors[spec.name] = tensor
    return tensors, max(rows, 0)


def _from_array(rows: object, inputs: tuple[TensorSpec, ...]) -> tuple[dict[str, Tensor], int]:
    values = _dense(rows)
    if values.ndim == 0:
        raise InvalidInput(f"expected rows, got {_shown(rows)}", path="$", hint="the first axis is the row")
    if len(inputs) == 1:
        spec = inputs[0]
        tensor = _shaped(values, spec, "$", lambda i: f"$[{i}]")
        return {spec.name: tensor}, len(tensor)
    scalar = all(spec.shape in ((), (1,)) for spec in inputs)
    if scalar and values.ndim == 2 and values.shape[1] == len(inputs):
        return {
            spec.name: _shaped(values[:, i], spec, "$", lambda row, at=i: f"$[{row}][{at}]")  # type: ignore[misc]
            for i, spec in enumerate(inputs)
        }, len(values)
    raise InvalidInput(
        f"an array of shape {list(values.shape)} cannot be told apart into {len(inputs)} inputs",
        path="$",
        hint=f"give a dict or a DataFrame with {_some(column_names(inputs))}",
    )


def _dense(value: object, path: str = "$") -> Tensor:
    """An array of whatever was given; text and mixed values become objects, so that nothing is cast unseen."""
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind not in "US" else value.astype(object)
    if type(value).__module__.partition(".")[0] in ("pandas", "torch", "pyarrow"):
        return np.asarray(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        lone = np.empty((), dtype=object)
        lone[()] = value
        return lone
    if any(isinstance(item, Sequence | np.ndarray) and not isinstance(item, str | bytes) for item in value):
        parts = [_dense(item, path) for item in value]
        if len({part.shape for part in parts}) > 1:
            raise InvalidInput("the rows differ in length", path=path, hint="every row has the same shape")
        return np.stack(parts)
    out = np.empty(len(value), dtype=object)
    out[:] = list(value)
    return out


def _shaped(values: Tensor, spec: TensorSpec, path: str, where: Where) -> Tensor:
    """``values`` in the spec's datatype and row shape; a missing or extra axis of size 1 is forgiven."""
    if values.ndim == 0:
        raise InvalidInput(f"expected rows of {spec.name!r}, got {_shown(values.item())}", path=path)
    row = values.shape[1:]
    if spec.shape == (1,) and row == ():
        values = values.reshape(-1, 1)
    elif spec.shape == () and row == (1,):
        values = values.reshape(-1)
    elif len(row) != len(spec.shape) or any(
        want not in (-1, have) for want, have in zip(spec.shape, row, strict=True)
    ):
        if len(values) == 0:
            values = values.reshape(0, *(max(size, 0) for size in spec.shape))
        else:
            raise InvalidInput(
                f"expected rows of shape {_sizes(spec.shape)} for {spec.name!r}, got {_sizes(row)}",
                path=path,
                hint=f"the array's whole shape is {_sizes(('rows', *spec.shape))}",
            )
    return _converted(values, spec, where)


def _converted(values: Tensor, spec: TensorSpec, where: Where) -> Tensor:
    kind = values.dtype.kind
    if kind == "O":
        return _converted_objects(values, spec, where)
    if spec.datatype == "BYTES" or kind not in "iufb":
        raise _unfit(values, 0, spec, where)
    if spec.datatype == "BOOL":
        if kind != "b":
            raise _unfit(values, 0, spec, where)
        return values
    if kind == "b" or (kind == "f" and spec.datatype in INTEGERS):
        raise _unfit(values, 0, spec, where)
    dtype = NUMPY[spec.datatype]
    if spec.datatype in INTEGERS:
        limits = np.iinfo(dtype)  # type: ignore[type-var]  # an integer dtype, as was checked
        return _checked(values, (values < limits.min) | (values > limits.max), spec, where).astype(dtype)
    if kind in "iu":
        # By way of double, as every number in JSON goes: int64 to float32 directly rounds otherwise.
        values = values.astype(np.float64)
    if not spec.allow_nan:
        _checked(values, ~np.isfinite(values), spec, where)
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    _checked(values, np.isfinite(values) & ~np.isfinite(cast), spec, where)
    return cast


def _converted_objects(values: Tensor, spec: TensorSpec, where: Where) -> Tensor:
    flat = values.reshape(-1).tolist()
    if spec.datatype == "BYTES":
        out = np.empty(len(flat), dtype=object)
        for i, value in enumerate(flat):
            if value is None and spec.allow_nan:
                value = ""
            if not isinstance(value, str | bytes):
                raise _unfit(values, i, spec, where)
            out[i] = str(value) if isinstance(value, str) else bytes(value)
        return out.reshape(values.shape)
    numbers: list[Any] = []
    wanted: tuple[type, ...] = (bool, np.bool_)
    if spec.datatype in INTEGERS:
        wanted = (int, np.integer)
    elif spec.datatype in FLOATS:
        wanted = (int, float, np.integer, np.floating)
    for i, value in enumerate(flat):
        if value is None and spec.allow_nan and spec.datatype in FLOATS:
            value = np.nan
        if not isinstance(value, wanted) or (isinstance(value, bool) and spec.datatype != "BOOL"):
            raise _unfit(values, i, spec, where)
        numbers.append(value)
    if spec.datatype == "BOOL":
        return np.array(numbers, dtype=bool).reshape(values.shape)
    if spec.datatype in INTEGERS:
        limits = np.iinfo(NUMPY[spec.datatype])  # type: ignore[type-var]  # an integer dtype
        for i, number in enumerate(numbers):
            if not limits.min <= number <= limits.max:
                raise _unfit(values, i, spec, where)
        return np.array(numbers, dtype=NUMPY[spec.datatype]).reshape(values.shape)
    return _converted(np.array(numbers, dtype=np.float64).reshape(values.shape), spec, where)


def _checked(values: Tensor, bad: Tensor, spec: TensorSpec, where: Where) -> Tensor:
    if bad.any():
        raise _unfit(values, int(np.flatnonzero(bad.reshape(-1))[0]), spec, where)
    return values


def _unfit(values: Tensor, at: int, spec: TensorSpec, where: Where) -> InvalidInput:
    """The error for the flat position ``at`` of ``values``."""
    place = np.unravel_index(at, values.shape) if values.size else (0,)
    value = values.reshape(-1)[at] if values.size else None
    value = value.item() if isinstance(value, np.generic) else value
    inner = "".join(f"[{int(i)}]" for i in place[1:]) if spec.shape not in ((), (1,)) else ""
    hint = f"give {spec.name!r} as {spec.datatype}"
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        hint = "the contract allows no missing values for it (pack with allow_nan)"
    return InvalidInput(
        f"expected {spec.datatype} for {spec.name!r}, got {_shown(value)}",
        path=where(int(place[0])) + inner,
        hint=hint,
    )


def _refuse_unknown(name: str, inputs: tuple[TensorSpec, ...], path: str) -> None:
    if name not in {*column_names(inputs), *(spec.name for spec in inputs)}:
        raise InvalidInput(f"no column {name!r}", path=path, hint=f"a row has {_some(column_names(inputs))}")


def _sizes(shape: Sequence[object]) -> str:
    return "[" + ", ".join("any" if size == -1 else str(size) for size in shape) + "]"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _shown(value: object) -> str:
    text = (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, str | bool) or value is None
        else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."
