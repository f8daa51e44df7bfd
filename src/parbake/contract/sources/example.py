"""Turn the example a user has (array, frame, table or dict) into input specs and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from parbake.contract.datatypes import NUMPY, Datatype, datatype_of
from parbake.contract.model import TensorSpec
from parbake.contract.tensors import Tensor, Tensors, as_text
from parbake.errors import MissingExtra, PackRefused

Kind = Literal["array", "matrix", "columns", "tensors"]
"""``array``: one nameless array, input ``x``; ``matrix``: a frame as one input with named columns;
``columns``: a frame with one input per column; ``tensors``: a dict, one input per array."""

MATRIX = "x"
"""Name of the input that an array or a purely numeric frame becomes."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a frame: its values with missing ones told apart, and what it was in the frame."""

    name: str
    values: Tensor
    """Shape (rows,). Missing numbers are NaN, missing strings are empty."""
    categorical: bool = False
    missing: bool = False
    """Whether an empty string stands for a missing value (a string column that had some)."""
    marker: float | None = float("nan")
    """What a missing string was in the frame: NaN or None."""


@dataclass(frozen=True, slots=True)
class Example:
    """An example as tensors (first axis: the row), with what it takes to give a frame back."""

    specs: tuple[TensorSpec, ...]
    tensors: Tensors
    kind: Kind
    columns: tuple[Column, ...] = ()
    """The columns of a frame (or of a mapping of plain columns), in its order."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Column names of a frame or of a mapping of plain columns; empty for anything else."""
        return tuple(column.name for column in self.columns)

    def select(self, names: Sequence[str]) -> Example:
        """The same rows with only these columns, in this order. Raises `PackRefused` naming what is missing."""
        have = {column.name: column for column in self.columns}
        absent = [name for name in names if name not in have]
        if absent:
            raise PackRefused(
                f"the example lacks {', '.join(map(repr, absent))}, which the model was trained on",
                hint=f"it has the columns {', '.join(map(repr, have))}",
            )
        return _of_columns([have[name] for name in names])

    def by_column(self) -> Example:
        """The same frame with one input per column."""
        tensors = {column.name: column.values.reshape(-1, 1) for column in self.columns}
        specs = tuple(_spec(name, array) for name, array in tensors.items())
        return Example(specs, tensors, "columns", self.columns)

    def frame(self, tensors: Tensors, names: Sequence[str] = ()) -> Any:
        """A pandas DataFrame of tensors that fit ``specs``; ``names`` names the columns of a nameless array.

        A string column whose example had missing values gets them back for empty strings.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtra("pandas", "sklearn") from error
        if self.kind in ("array", "matrix"):
            (spec,) = self.specs
            values = tensors[spec.name]
            return pd.DataFrame(values, columns=list(names or spec.columns) or None)
        known = {column.name: column for column in self.columns}
        series: dict[str, Any] = {}
        for spec in self.specs:
            values = tensors[spec.name]
            flat = values.reshape(len(values), -1)[:, 0]
            column = known.get(spec.name)
            if spec.datatype == "BYTES":
                flat = as_text(flat)
                if column is not None and column.missing:
                    flat = np.array([column.marker if text == "" else text for text in flat], dtype=object)
                data = pd.Series(flat, dtype=object)
            else:
                data = pd.Series(flat)
            if column is not None and column.categorical:
                data = data.astype("category")
            series[spec.name] = data
        return pd.DataFrame(series)


@dataclass(frozen=True, slots=True)
class Rows:
    """An example as one model takes it: the specs and tensors of its contract, and back to the model's own rows."""

    example: Example
    names: tuple[str, ...] | None
    """Columns of the frame that the model was trained on; None: it takes plain arrays."""

    def __call__(self, tensors: Tensors) -> Any:
        """The frame or array of tensors that fit the specs."""
        if self.names is not None:
            return self.example.frame(tensors, self.names)
        specs = self.example.specs
        if len(specs) == 1:
            values = tensors[specs[0].name]
            return values.reshape(len(values), -1) if values.ndim < 2 else values
        parts = [tensors[spec.name].reshape(len(tensors[spec.name]), -1) for spec in specs]
        if any(spec.datatype == "BYTES" for spec in specs):
            return self.example.frame(tensors).to_numpy(dtype=object)
        return np.concatenate(parts, axis=1)


def rows_for(example: Example, names: Sequence[str] | None) -> Rows:
    """The example for a model that was trained on a frame with these columns, or on plain arrays (None).

    Columns are taken by name and put in the model's order; those it does not know are left out.
    Raises `PackRefused` where one is missing.
    """
    if names is None:
        return Rows(example, None)
    wanted = tuple(str(name) for name in names)
    if example.kind in ("matrix", "columns"):
        return Rows(example.select(wanted), wanted)
    if len(example.specs) == 1:
        (spec,) = example.specs
        if spec.elements != len(wanted):
            raise PackRefused(
                f"the example has {spec.elements} columns, the model was trained on {len(wanted)}",
                hint=f"in order: {', '.join(wanted)}",
            )
        named = TensorSpec(spec.name, spec.datatype, spec.shape, columns=wanted, allow_nan=spec.allow_nan)
        return Rows(replace(example, specs=(named,), kind="array"), wanted)
    specs = {spec.name: spec for spec in example.specs}
    absent = [name for name in wanted if name not in specs]
    if absent:
        raise PackRefused(
            f"the example lacks {', '.join(map(repr, absent))}, which the model was trained on",
            hint=f"it has {', '.join(map(repr, specs))}",
        )
    kept = {name: example.tensors[name] for name in wanted}
    columns = {column.name: column for column in example.columns}
    return Rows(
        replace(
            example,
            specs=tuple(specs[name] for name in wanted),
            tensors=kept,
            columns=tuple(columns[name] for name in wanted if name in columns),
        ),
        wanted,
    )


def layout(example: object) -> tuple[tuple[TensorSpec, ...], Tensors, Kind]:
    """Input specs, tensors (first axis: the row) and kind of an example; see `read`."""
    found = read(example)
    return found.specs, found.tensors, found.kind


def read(example: object) -> Example:
    """Read an example: numpy array, pandas DataFrame, pyarrow Table, or mapping of name to array.

    - an array (n, k) becomes one input ``x`` with row shape (k,);
    - a frame whose columns are all integers, all floats or all booleans becomes one input ``x`` with
      `TensorSpec.columns`, in the smallest datatype that holds them all;
    - any other frame becomes one input per column, row shape (1,): strings BYTES, numbers by their dtype;
    - a mapping becomes one input per array, as it is.

    ``allow_nan`` is set where the example itself has a NaN. Missing strings become empty strings.
    Raises `PackRefused` for anything else, and for dtypes that no tensor has.
    """
    module = type(example).__module__.partition(".")[0]
    if module == "pandas" and hasattr(example, "columns"):
        return _of_columns(_pandas_columns(example))
    if module == "pyarrow" and hasattr(example, "column_names"):
        return _of_columns(_arrow_columns(example))
    if module == "polars" and hasattr(example, "to_arrow"):
        return _of_columns(_arrow_columns(example.to_arrow()))
    if isinstance(example, Mapping):
        return _of_mapping(example)
    if module == "scipy":
        raise PackRefused("a sparse example cannot be packed", hint="example=X[:100].toarray()")
    array = _plain(np.asarray(example), "the example")
    if array.ndim == 0:
        raise PackRefused(
            f"the example is a single {type(example).__name__}", hint="rows first: shape (n, k)"
        )
    return Example((_spec(MATRIX, array),), {MATRIX: array}, "array")


def _of_mapping(example: Mapping[Any, object]) -> Example:
    if not example:
        raise PackRefused("the example is empty", hint="a mapping of input name to array")
    tensors = {str(name): _plain(np.asarray(value), repr(name)) for name, value in example.items()}
    lengths = {name: array.shape[0] if array.ndim else -1 for name, array in tensors.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        raise PackRefused(
            "the arrays of the example differ in their first axis: "
            + ", ".join(f"{name} has {'none' if n < 0 else n}" for name, n in lengths.items()),
            hint="the first axis is the row",
        )
    specs = tuple(_spec(name, array) for name, array in tensors.items())
    columns: tuple[Column, ...] = ()
    if len(specs) > 1 and all(spec.shape == () for spec in specs):
        columns = tuple(Column(name, array) for name, array in tensors.items())
    return Example(specs, tensors, "tensors", columns)


def _of_columns(columns: Sequence[Column]) -> Example:
    if not columns:
        raise PackRefused("the example has no columns")
    kinds = {column.values.dtype.kind if not column.categorical else "O" for column in columns}
    kinds = {"i" if kind == "u" else kind for kind in kinds}
    names = tuple(column.name for column in columns)
    if len(kinds) == 1 and kinds != {"O"}:
        dtype = np.result_type(*(column.values.dtype for column in columns))
        # int64 beside uint64 would become floating.
        if dtype.kind in kinds or dtype.kind == "u":
            matrix = np.stack([column.values.astype(dtype) for column in columns], axis=1)
            spec = TensorSpec(
                MATRIX, datatype_of(matrix), (len(columns),), columns=names, allow_nan=_has_nan(matrix)
            )
            return Example((spec,), {MATRIX: matrix}, "matrix", tuple(columns))
    return Example((), {}, "columns", tuple(columns)).by_column()


def _spec(name: str, array: Tensor) -> TensorSpec:
    return TensorSpec(name, datatype_of(array), tuple(array.shape[1:]), allow_nan=_has_nan(array))


def _has_nan(array: Tensor) -> bool:
    return array.dtype.kind == "f" and bool(~np.isfinite(array).all())


def _plain(array: Tensor, what: str) -> Tensor:
    """The array in a dtype that a tensor can have: native strings become objects, big-endian little-endian."""
    if array.dtype.kind in "US":
        return array.astype(object)
    if array.dtype.kind == "O":
        odd = next((x for x in array.reshape(-1).tolist() if not isinstance(x, str | bytes)), None)
        if odd is not None:
            raise PackRefused(
                f"{what} mixes strings and others: {odd!r} is a {type(odd).__name__}",
                hint="a DataFrame or a dict of arrays keeps one dtype per column",
            )
        return array
    try:
        return np.ascontiguousarray(array, dtype=NUMPY[_datatype(array)])
    except ValueError as error:
        raise PackRefused(
            f"{what}: {error}", hint="numbers, booleans or strings; times as seconds"
        ) from error


def _datatype(array: Tensor) -> Datatype:
    return datatype_of(array.astype(array.dtype.newbyteorder("="), copy=False))


def _pandas_columns(frame: Any) -> list[Column]:
    if not frame.columns.is_unique:
        raise PackRefused("two columns of the example have the same name")
    columns = []
    for position, name in enumerate(frame.columns):
        series = frame.iloc[:, position]
        dtype = str(series.dtype)
        categorical = dtype == "category"
        missing = series.isna().to_numpy(dtype=bool)
        kind = getattr(series.dtype, "kind", "O")
        if categorical:
            categories = series.dtype.categories
            kind = "O" if categories.dtype.kind not in "iufb" else categories.dtype.kind
        if kind in "mM" or dtype.startswith("period"):
            raise PackRefused(
                f"column {str(name)!r} holds times ({dtype}), which no tensor does",
                hint="give seconds as numbers, in training too",
            )
        columns.append(_column(str(name), series.to_numpy(), missing, kind, categorical))
    return columns


def _arrow_columns(table: Any) -> list[Column]:
    import pyarrow as pa

    if len(set(table.column_names)) != len(table.column_names):
        raise PackRefused("two columns of the example have the same name")
    columns = []
    for name, chunked in zip(table.column_names, table.columns, strict=True):
        kind_of = chunked.type
        categorical = pa.types.is_dictionary(kind_of)
        if categorical:
            kind_of = kind_of.value_type
            chunked = chunked.cast(kind_of)
        if pa.types.is_temporal(kind_of):
            raise PackRefused(
                f"column {name!r} holds times ({kind_of}), which no tensor does",
                hint="give seconds as numbers, in training too",
            )
        missing = np.asarray(chunked.is_null().to_numpy(), dtype=bool)
        text = pa.types.is_string(kind_of) or pa.types.is_large_string(kind_of) or pa.types.is_binary(kind_of)
        values = np.array(chunked.to_pylist(), dtype=object) if text else chunked.to_numpy()
        kind = "O" if text else np.dtype(kind_of.to_pandas_dtype()).kind
        columns.append(_column(name, values, missing, kind, categorical, arrow=True))
    return columns


def _column(
    name: str, values: Tensor, missing: Tensor, kind: str, categorical: bool, *, arrow: bool = False
) -> Column:
    if kind == "O" and all(isinstance(x, bool | np.bool_) for x in values[~missing]) and not missing.all():
        kind = "b"
    if kind not in "iufb":
        texts = np.empty(len(values), dtype=object)
        texts[:] = [
            "" if gone else value for value, gone in zip(values.tolist(), missing.tolist(), strict=True)
        ]
        odd = next((x for x in texts if not isinstance(x, str | bytes)), None)
        if odd is not None:
            raise PackRefused(
                f"column {name!r} mixes strings and others: {odd!r} is a {type(odd).__name__}",
                hint="one dtype per column, in training too",
            )
        marked = bool(missing.any())
        if marked and any(x == "" and not gone for x, gone in zip(texts, missing, strict=True)):
            raise PackRefused(
                f"column {name!r} has both empty and missing strings, and a tensor cannot tell them apart",
                hint="make one of them the other, in training too",
            )
        first = values[missing][0] if marked else None
        return Column(name, texts, categorical, marked, None if first is None and not arrow else float("nan"))
    if missing.any():
        # Integers and booleans have no NaN of their own: a frame with gaps holds them as doubles.
        numbers = np.full(len(values), np.nan, dtype=values.dtype if values.dtype.kind == "f" else np.float64)
        numbers[~missing] = values[~missing].astype(numbers.dtype)
        return Column(name, numbers, categorical)
    dense = (
        values
        if values.dtype.kind == kind
        else values.astype({"b": bool, "f": np.float64}.get(kind, np.int64))
    )
    return Column(name, _plain(dense, f"column {name!r}"), categorical)
