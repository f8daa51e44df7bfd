"""Columns on their way through a graph: what numpy or pandas would hold at this point, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from parbake.contract.datatypes import NUMPY
from parbake.contract.model import TensorSpec
from parbake.contract.sources.example import Example
from parbake.contract.sources.graph import DOUBLE, FLOAT, TEXT, Array, Dtype, Graph, Value
from parbake.errors import NotConvertible

Forward = Callable[[Array], Array]
"""What a column's numbers become: elementwise and non-decreasing, bit for bit as the source computes it."""

_MOST_THRESHOLDS: Final = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    """The raw column a column was made of, by monotone steps alone."""

    input: str
    position: int
    dtype: Dtype
    steps: tuple[Forward, ...] = ()

    def forward(self, raw: Array) -> Array:
        """What raw numbers (of ``dtype``) are at this point."""
        values = raw
        with np.errstate(all="ignore"):
            for step in self.steps:
                values = step(values)
        return values


@dataclass(frozen=True, slots=True)
class Column:
    """What is known of one column."""

    origin: Origin | None = None
    missing_text: bool = False
    """Whether an empty string stands for a missing value."""


@dataclass(frozen=True, slots=True)
class Table:
    """Tensors side by side, one or more columns each, as one array or frame would be in the source."""

    parts: tuple[Value, ...]
    columns: tuple[Column, ...]
    sparse: bool = False
    """Whether the source holds this as a sparse matrix: some of its arithmetic differs there."""
    coarse: str = ""
    """The step that was only reproduced to about 1e-7: what decides at thresholds must not come after it."""

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.columns)

    @property
    def dtype(self) -> Dtype:
        """The dtype that one array of all columns would have."""
        dtypes = [part.dtype for part in self.parts]
        if any(dtype == TEXT for dtype in dtypes):
            return TEXT
        return np.result_type(*dtypes) if dtypes else DOUBLE


@dataclass(slots=True)
class Work:
    """A conversion under way: the graph, and what is learned of the model while it is built."""

    graph: Graph
    accepts_nan: set[str] = field(default_factory=set)
    """Inputs whose missing values the model itself deals with."""
    thresholds: dict[tuple[str, int], tuple[float, ...]] = field(default_factory=dict)
    may_be_nan: bool = False
    """Whether the example has missing numbers, so that the model will be given some."""
    rtol: float = 0.0
    atol: float = 0.0
    smooth: bool = False
    """Whether labels come from scores that are rounded on the way, so that a tie may fall either way."""

    def loosen(self, rtol: float, atol: float) -> None:
        """Something was added that only promises this much."""
        self.rtol = max(self.rtol, rtol)
        self.atol = max(self.atol, atol)

    def handles_missing(self, columns: Sequence[Column]) -> None:
        """NaN in these columns is answered as in the source."""
        self.accepts_nan.update(column.origin.input for column in columns if column.origin is not None)

    def decides(self, columns: Sequence[Column], thresholds: Mapping[int, Array]) -> None:
        """The model decides at these values of these columns."""
        for key, values in raw_thresholds(columns, thresholds).items():
            self.thresholds[key] = tuple(sorted({*self.thresholds.get(key, ()), *values}))


def of_example(graph: Graph, example: Example, specs: Sequence[TensorSpec]) -> Table:
    """The graph's inputs as one table, in the order of the specs; each matrix input gives its columns."""
    parts: list[Value] = []
    columns: list[Column] = []
    marked = {column.name for column in example.columns if column.missing}
    for spec in specs:
        dtype = NUMPY[spec.datatype]
        value = Value(spec.name, dtype, spec.shape[0] if spec.shape else 0)
        parts.append(graph.column(value))
        origins = [Origin(spec.name, i, dtype) for i in range(spec.shape[0] if spec.shape else 1)]
        columns.extend(Column(origin, spec.name in marked) for origin in origins)
    return Table(tuple(parts), tuple(columns))


def select(graph: Graph, table: Table, positions: Sequence[int]) -> Table:
    """Columns of a table, in this order; neighbours from one tensor stay together."""
    owners = [(part, within) for part in range(len(table.parts)) for within in range(table.parts[part].width)]
    parts: list[Value] = []
    run: list[int] = []
    owner = -1
    for position in [*positions, None]:
        part, within = owners[position] if position is not None else (-1, 0)
        if part != owner and run:
            parts.append(graph.take(table.parts[owner], run))
            run = []
        owner = part
        run.append(within)
    return replace(table, parts=tuple(parts), columns=tuple(table.columns[i] for i in positions))


def matrix(graph: Graph, table: Table, dtype: Dtype | None = None) -> Value:
    """All columns as one tensor of their common dtype, or of ``dtype``, each converted straight to it."""
    common = table.dtype if dtype is None else dtype
    return graph.concat([graph.cast(part, common) for part in table.parts])


def floating(graph: Graph, table: Table) -> Value:
    """All columns as scikit-learn's transformers see them: float32 and float64 as they are, others float64."""
    dtype = table.dtype
    return graph.cast(matrix(graph, table), dtype if dtype in (FLOAT, DOUBLE) else DOUBLE)


def uniform(graph: Graph, table: Table, dtype: Dtype | None = None) -> Table:
    """The same table as one tensor."""
    if not table.parts:
        return table
    target = table.dtype if dtype is None else dtype
    columns = [stepped(column, lambda raw: raw.astype(target)) for column in table.columns]
    return replace(table, parts=(matrix(graph, table, target),), columns=tuple(columns))


def decidable(table: Table) -> Table:
    """The table, for trees. Raises `NotConvertible` where rows would cross their thresholds by rounding."""
    if table.coarse:
        raise NotConvertible(
            f"trees behind {table.coarse}, which is converted to about 1e-7 only: rows near a threshold would "
            "take other leaves",
            hint="train on float64 columns, leave that step out, pack a module:function, or --allow-pickle",
        )
    return table


def joined(graph: Graph, tables: Sequence[Table], *, sparse: bool) -> Table:
    """Tables side by side, in the common dtype unless some hold strings."""
    tables = [table for table in tables if table.width]
    whole = Table(
        tuple(part for table in tables for part in table.parts),
        tuple(column for table in tables for column in table.columns),
        sparse,
        next((table.coarse for table in tables if table.coarse), ""),
    )
    if not whole.parts or whole.dtype == TEXT:
        return whole
    return uniform(graph, whole)


def stepped(column: Column, step: Forward) -> Column:
    """The column after one more step; its origin is lost where it was text."""
    if column.origin is None or column.origin.dtype == TEXT:
        return column
    return replace(column, origin=replace(column.origin, steps=(*column.origin.steps, step)))


def raw_thresholds(
    columns: Sequence[Column], thresholds: Mapping[int, Array]
) -> dict[tuple[str, int], tuple[float, ...]]:
    """Thresholds by (input, position): for each the largest raw number that is still at or below it.

    Found by bisection over the raw datatype's own numbers, so that neighbours of the result lie on
    either side however the steps round. Columns with no origin are left out; of more than 4,096
    thresholds of one column, as many are taken evenly.
    """
    found: dict[tuple[str, int], set[float]] = {}
    for position, values in thresholds.items():
        origin = columns[position].origin
        if origin is None or origin.dtype.kind not in "iuf":
            continue
        targets = np.unique(values[np.isfinite(values)])
        if len(targets) > _MOST_THRESHOLDS:
            targets = targets[np.linspace(0, len(targets) - 1, _MOST_THRESHOLDS).astype(int)]
        raws = _largest_at_most(origin, targets)
        # Below the smallest number there is nothing that would be at or below such a threshold.
        real = origin.forward(raws.astype(origin.dtype)).astype(np.float64) <= targets
        found.setdefault((origin.input, origin.position), set()).update(raws[real].tolist())
    return {key: tuple(sorted(values)) for key, values in found.items() if values}


def _largest_at_most(origin: Origin, targets: Array) -> Array:
    """Bisection on ordered integers: floats in the order of their bits, integers as they are."""
    if origin.dtype.kind == "f":
        width = {2: np.int16, 4: np.int32, 8: np.int64}[origin.dtype.itemsize]
        largest = np.array(np.finfo(origin.dtype).max, origin.dtype).view(width).astype(np.int64)
        low = np.full(targets.shape, -largest - 1, dtype=np.int64)
        high = np.full(targets.shape, largest, dtype=np.int64)
    else:
        # Doubles stand in for 64-bit integers at their rim, so the rim itself is left out.
        bits = min(8 * origin.dtype.itemsize, 63)
        signed = origin.dtype.kind == "i"
        low = np.full(targets.shape, -(2 ** (bits - 1)) if signed else 0, dtype=np.int64)
        high = np.full(targets.shape, 2 ** (bits - 1 if signed else min(bits, 62)) - 1, dtype=np.int64)
    while (high > low).any():
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        below = origin.forward(_from_ordered(middle, origin.dtype)).astype(np.float64) <= targets
        low = np.where(below, middle, low)
        high = np.where(below, high, middle - 1)
    return _from_ordered(low, origin.dtype).astype(np.float64)


def _from_ordered(codes: Array, dtype: Dtype) -> Array:
    if dtype.kind != "f":
        return codes.astype(dtype)
    width = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    # Negative numbers have their magnitude in the lower bits, so their order is reversed.
    lowest = -(2 ** (8 * dtype.itemsize - 1))
    bits = np.where(codes >= 0, codes, lowest - codes - 1)
    return bits.astype(width).view(dtype)
