"""scikit-learn's transformers as ONNX, operation by operation and in the dtype that scikit-learn uses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import numpy as np

from parbake.contract.sources.graph import (
    BOOL,
    DOUBLE,
    FLOAT,
    INT64,
    ML,
    TEXT,
    Array,
    Dtype,
    Graph,
    Value,
)
from parbake.contract.sources.table import (
    Column,
    Forward,
    Table,
    Work,
    decidable,
    floating,
    joined,
    matrix,
    select,
    stepped,
    uniform,
)
from parbake.errors import NotConvertible

Transform = Callable[[Work, Any, Table], Table]

_Op = Literal["Sub", "Add", "Mul", "Div"]
_NUMPY: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "Sub": np.subtract,
    "Add": np.add,
    "Mul": np.multiply,
    "Div": np.divide,
}


def transform(work: Work, model: Any, table: Table) -> Table:
    """What ``model.transform`` makes of the table. Raises `NotConvertible` for a transformer not known here."""
    if model is None or (isinstance(model, str) and model == "passthrough"):
        return table
    name = type(model).__name__
    module = type(model).__module__
    if module.startswith("sklearn."):
        known = TRANSFORMERS.get(name)
        if known is not None:
            return known(work, model, table)
        if module.startswith("sklearn.feature_selection"):
            return _selector(work, model, table)
    raise NotConvertible(
        f"no exact conversion of the transformer {name} is known",
        hint="pack a module:function, or --allow-pickle",
    )


def _pipeline(work: Work, model: Any, table: Table) -> Table:
    for _, step in model.steps:
        table = transform(work, step, table)
    return table


def _column_transformer(work: Work, model: Any, table: Table) -> Table:
    weights = model.transformer_weights or {}
    done: list[Table] = []
    for name, step, _ in model.transformers_:
        positions = [int(i) for i in np.ravel(model._transformer_to_input_indices[name])]
        if (isinstance(step, str) and step == "drop") or not positions:
            continue
        part = transform(work, step, select(work.graph, table, positions))
        done.append(_weighted(work, part, weights.get(name)))
    return _stacked(work, model, done, sparse=bool(model.sparse_output_))


def _feature_union(work: Work, model: Any, table: Table) -> Table:
    weights = model.transformer_weights or {}
    done = [
        _weighted(work, transform(work, step, table), weights.get(name))
        for name, step in model.transformer_list
        if not (isinstance(step, str) and step == "drop")
    ]
    return _stacked(work, model, done, sparse=any(part.sparse for part in done))


def _stacked(work: Work, model: Any, tables: Sequence[Table], *, sparse: bool) -> Table:
    if getattr(model, "_sklearn_output_config", {}).get("transform", "default") != "default":
        # A frame keeps the dtype of each column.
        return Table(
            tuple(part for table in tables for part in table.parts),
            tuple(column for table in tables for column in table.columns),
            coarse=next((table.coarse for table in tables if table.coarse), ""),
        )
    return joined(work.graph, tables, sparse=sparse)


def _weighted(work: Work, table: Table, weight: float | None) -> Table:
    if weight is None:
        return table
    parts = tuple(
        work.graph.op("Mul", part, work.graph.constant(weight, part.dtype))
        for part in uniform(work.graph, table).parts
    )
    return replace(
        table, parts=parts, columns=tuple(replace(column, origin=None) for column in table.columns)
    )


# Arithmetic on columns


def _arithmetic(work: Work, model: Any, table: Table, steps: Sequence[tuple[_Op, Any]]) -> Table:
    """Elementwise steps with one parameter per column, rounded after each as numpy does in place.

    Of float32 columns, some versions of scikit-learn round the parameters first and others compute in
    float64 and round the result; the fitted model itself is asked which.
    """
    value = floating(work.graph, table)
    dtype = value.dtype
    parameters = [(op, np.asarray(p, dtype=np.float64).reshape(-1)) for op, p in steps]
    rounded = dtype == FLOAT and not table.sparse and _rounds_parameters(model, parameters)
    columns = list(uniform(work.graph, table, dtype).columns)
    for op, parameter in parameters:
        full = np.broadcast_to(parameter, (table.width,))
        value = _step(work.graph, op, value, full, rounded=rounded)
        columns = [
            stepped(column, _forward(op, dtype, float(p), rounded=rounded))
            if op in ("Sub", "Add") or p > 0
            else replace(column, origin=None)
            for column, p in zip(columns, full.tolist(), strict=True)
        ]
    return replace(table, parts=(value,), columns=tuple(columns))


def _step(graph: Graph, op: _Op, value: Value, parameter: Array, *, rounded: bool) -> Value:
    if value.dtype == DOUBLE or rounded:
        return graph.op(op, value, graph.constant(parameter.reshape(1, -1), value.dtype))
    wide = graph.op(op, graph.cast(value, DOUBLE), graph.constant(parameter.reshape(1, -1), DOUBLE))
    return graph.cast(wide, value.dtype)


def _forward(op: _Op, dtype: Dtype, parameter: float, *, rounded: bool) -> Forward:
    inner = dtype if rounded else DOUBLE
    with np.errstate(over="ignore"):
        number = np.asarray(parameter, dtype=inner)
    return lambda raw: _NUMPY[op](raw.astype(inner), number).astype(dtype)


def _rounds_parameters(model: Any, steps: Sequence[tuple[_Op, Array]]) -> bool:
    draw = np.random.default_rng(0)
    scale = 10.0 ** draw.integers(-3, 4, size=(64, model.n_features_in_))
    probe = (draw.normal(size=scale.shape) * scale).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = np.asarray(model.transform(probe.copy()))
        wide = probe
        for op, parameter in steps:
            wide = _NUMPY[op](wide.astype(np.float64), parameter).astype(np.float32)
    return not np.array_equal(got, wide, equal_nan=True)


def _clip(work: Work, table: Table, low: float, high: float) -> Table:
    (value,) = table.parts
    graph = work.graph
    # Clip would turn NaN into a number in some versions of the runtime.
    bounded = graph.op("Clip", value, graph.constant(low, value.dtype), graph.constant(high, value.dtype))
    kept = graph.op("Where", graph.op("IsNaN", value, dtype=BOOL), value, bounded, dtype=value.dtype)
    columns = tuple(stepped(column, lambda raw: np.clip(raw, low, high)) for column in table.columns)
    return replace(table, parts=(kept,), columns=columns)


def _standard_scaler(work: Work, model: Any, table: Table) -> Table:
    steps: list[tuple[_Op, Any]] = []
    if model.with_mean:
        steps.append(("Sub", model.mean_))
    if model.with_std:
        steps.append(("Mul", 1 / model.scale_) if table.sparse else ("Div", model.scale_))
    return _arithmetic(work, model, table, steps)


def _min_max_scaler(work: Work, model: Any, table: Table) -> Table:
    out = _arithmetic(work, model, table, [("Mul", model.scale_), ("Add", model.min_)])
    return _clip(work, out, *map(float, model.feature_range)) if model.clip else out


def _max_abs_scaler(work: Work, model: Any, table: Table) -> Table:
    out = _arithmetic(
        work, model, table, [("Mul", 1.0 / model.scale_) if table.sparse else ("Div", model.scale_)]
    )
    return _clip(work, out, -1.0, 1.0) if getattr(model, "clip", False) else out


def _robust_scaler(work: Work, model: Any, table: Table) -> Table:
    steps: list[tuple[_Op, Any]] = []
    if model.with_centering:
        steps.append(("Sub", model.center_))
    if model.with_scaling:
        steps.append(("Mul", 1.0 / model.scale_) if table.sparse else ("Div", model.scale_))
    return _arithmetic(work, model, table, steps)


def _normalizer(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    value = floating(graph, table)
    axis = graph.constant([1], INT64)
    if model.norm == "l1":
        norm = graph.op("ReduceSum", graph.op("Abs", value), axis, width=1)
    elif model.norm == "l2":
        norm = graph.op("Sqrt", graph.op("ReduceSumSquare", value, axis, width=1))
    else:
        norm = graph.op("ReduceMax", graph.op("Abs", value), axis, width=1)
    zero = graph.op("Equal", norm, graph.constant(0, value.dtype), dtype=BOOL)
    norm = graph.op("Where", zero, graph.constant(1, value.dtype), norm, dtype=value.dtype)
    out = graph.op("Div", value, norm)
    if model.norm == "max":
        return _made(out, table.sparse, table.coarse)
    return _rounded(work, model, out, table)


def _binarizer(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    value = matrix(graph, decidable(table))
    if value.dtype == BOOL:
        value = graph.cast(value, DOUBLE)
    compared = value if value.dtype in (FLOAT, DOUBLE) else graph.cast(value, DOUBLE)
    above = graph.op("Greater", compared, graph.constant(model.threshold, compared.dtype), dtype=BOOL)
    return _made(graph.cast(above, value.dtype), table.sparse)


def _made(value: Value, sparse: bool = False, coarse: str = "") -> Table:
    """A table of columns that no single raw column stands behind."""
    return Table((value,), (Column(),) * value.width, sparse, coarse)


def _rounded(work: Work, model: Any, value: Value, before: Table) -> Table:
    """What sums or powers made, whose last digits depend on who computes them."""
    fine = value.dtype == DOUBLE
    work.loosen(*((1e-9, 1e-9) if fine else (1e-4, 1e-4)))
    work.smooth = True
    return _made(
        value, before.sparse, before.coarse or ("" if fine else f"{type(model).__name__} in float32")
    )


# Missing values


def _simple_imputer(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    statistics = np.asarray(model.statistics_)
    marker = model.missing_values
    nan = _is_missing(marker)
    kept = [i for i in range(table.width) if model.keep_empty_features or not _is_missing(statistics[i])]
    if nan:
        work.handles_missing(table.columns)
    if table.dtype == TEXT or statistics.dtype == object:
        return _impute_text(work, model, table, kept)
    if model.strategy in ("most_frequent", "constant") and table.dtype.kind == "i":
        value = matrix(graph, table)
    else:
        value = floating(graph, table)
    dtype = value.dtype
    if nan:
        missing = graph.op("IsNaN", value, dtype=BOOL) if dtype.kind == "f" else None
    else:
        missing = graph.op("Equal", value, graph.constant(marker, dtype), dtype=BOOL)
    source = list(uniform(graph, table, dtype).columns)
    out = value
    columns: list[Column] = source
    if missing is not None:
        filled = np.where([_is_missing(s) for s in statistics], 0, statistics).astype(dtype)
        out = graph.op("Where", missing, graph.constant(filled.reshape(1, -1)), value, dtype=dtype)
        if not nan:
            columns = [Column() for _ in source]
    out = graph.take(out, kept)
    columns = [columns[i] for i in kept]
    if model.add_indicator and missing is not None:
        marks = graph.cast(graph.take(missing, model.indicator_.features_.tolist()), dtype)
        out = graph.concat([out, marks])
        columns += [Column()] * marks.width
    elif model.add_indicator:
        raise NotConvertible(
            "SimpleImputer with add_indicator on whole numbers", hint="make the columns floating"
        )
    return replace(table, parts=(out,), columns=tuple(columns))


def _impute_text(work: Work, model: Any, table: Table, kept: Sequence[int]) -> Table:
    graph = work.graph
    if model.add_indicator:
        raise NotConvertible(
            "SimpleImputer with add_indicator on strings", hint="add the indicator to numbers only"
        )
    parts: list[Value] = []
    columns: list[Column] = []
    for i in kept:
        single = select(graph, table, [i])
        (value,) = single.parts
        (column,) = single.columns
        statistic = model.statistics_[i]
        if value.dtype != TEXT:
            raise NotConvertible(
                "SimpleImputer was trained on strings and numbers in one array",
                hint="one imputer for the string columns and one for the numbers",
            )
        marker = "" if column.missing_text else None
        gone = marker if _is_missing(model.missing_values) else str(model.missing_values)
        if gone is not None:
            missing = graph.op("Equal", value, graph.constant([[gone]], TEXT), dtype=BOOL)
            value = graph.op("Where", missing, graph.constant([[str(statistic)]], TEXT), value, dtype=TEXT)
        parts.append(value)
        columns.append(replace(column, missing_text=False))
    return replace(table, parts=tuple(parts), columns=tuple(columns))


def _missing_indicator(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    value = floating(graph, table)
    if not _is_missing(model.missing_values) or table.dtype == TEXT:
        raise NotConvertible("MissingIndicator of something else than NaN", hint="--allow-pickle")
    work.handles_missing(table.columns)
    missing = graph.op("IsNaN", value, dtype=BOOL)
    return _made(graph.take(missing, model.features_.tolist()))


def _is_missing(value: Any) -> bool:
    """NaN, None or pandas.NA."""
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)


# Categories


def _one_hot(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    dtype = np.dtype(model.dtype)
    dropped = getattr(model, "_drop_idx_after_grouping", None)
    mappings = _infrequent_mappings(model)
    parts: list[Value] = []
    for i, categories in enumerate(model.categories_):
        hot = _is_category(work, select(graph, table, [i]), categories)
        # Which output column each category lights, -1 for none.
        lights = np.arange(len(categories)) if mappings[i] is None else np.asarray(mappings[i])
        unknown = int(lights.max()) if mappings[i] is not None and _unknown_is_infrequent(model) else -1
        size = int(lights.max()) + 1
        if dropped is not None and dropped[i] is not None:
            drop = int(dropped[i])
            lights = np.where(lights == drop, -1, np.where(lights > drop, lights - 1, lights))
            unknown = -1 if unknown == drop else unknown - (unknown > drop)
            size -= 1
        parts.append(_lit(graph, hot, lights, unknown, size, dtype))
    parts = [part for part in parts if part.width]
    return _made(graph.concat(parts), bool(model.sparse_output))


def _lit(graph: Graph, hot: Value, lights: Array, unknown: int, size: int, dtype: Dtype) -> Value:
    """One column per group of categories, from one boolean column per category."""
    grouped = len(set(lights[lights >= 0].tolist())) < int((lights >= 0).sum())
    if not grouped and unknown < 0:
        order = np.argsort(lights, kind="stable")
        return graph.cast(graph.take(hot, [int(j) for j in order if lights[j] >= 0]), dtype)
    weights = np.zeros((len(lights), size))
    for category, column in enumerate(lights.tolist()):
        if column >= 0:
            weights[category, column] = 1.0
    numbers = graph.cast(hot, DOUBLE)
    out = graph.op("MatMul", numbers, graph.constant(weights), width=size)
    if unknown >= 0:
        known = graph.op("ReduceMax", numbers, graph.constant([1], INT64), width=1)
        row = np.zeros((1, size))
        row[0, unknown] = 1.0
        away = graph.op("Sub", graph.constant([[1.0]]), known, dtype=DOUBLE, width=1)
        out = graph.op("Add", out, graph.op("Mul", away, graph.constant(row), width=size))
    return graph.cast(out, dtype)


def _ordinal(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    dtype = np.dtype(model.dtype)
    mappings = _infrequent_mappings(model)
    parts: list[Value] = []
    for i, categories in enumerate(model.categories_):
        hot = _is_category(work, select(graph, table, [i]), categories)
        codes = np.arange(len(categories)) if mappings[i] is None else np.asarray(mappings[i])
        values = codes.astype(np.float64)
        if i in model._missing_indices:
            values[model._missing_indices[i]] = model.encoded_missing_value
        numbers = graph.cast(hot, DOUBLE)
        index = graph.op("ArgMax", numbers, dtype=INT64, width=1, axis=1, keepdims=1)
        code = graph.op("Gather", graph.constant(values), index, dtype=DOUBLE)
        known = graph.cast(graph.op("ReduceMax", numbers, graph.constant([1], INT64), width=1), BOOL)
        if mappings[i] is not None and _unknown_is_infrequent(model):
            other = float(codes.max())
        elif model.handle_unknown == "use_encoded_value":
            other = float(model.unknown_value)
        else:
            other = -1.0
        unknown = graph.constant([[other]], DOUBLE)
        parts.append(graph.cast(graph.op("Where", known, code, unknown, dtype=DOUBLE, width=1), dtype))
    return _made(graph.concat(parts))


def _is_category(work: Work, single: Table, categories: Array) -> Value:
    """One boolean column per category: whether the column holds it. NaN and None are the missing category."""
    graph = work.graph
    (value,) = single.parts
    (column,) = single.columns
    gone = np.array([_is_missing(c) for c in categories.tolist()], dtype=bool)
    if gone.any():
        work.handles_missing(single.columns)
    if value.dtype == TEXT:
        texts = [
            "" if missing else str(c) for c, missing in zip(categories.tolist(), gone.tolist(), strict=True)
        ]
        if gone.any() and not column.missing_text:
            # Nothing that can be sent is missing, so that category stays dark.
            texts[int(np.flatnonzero(gone)[0])] = "\0"
        name = graph.op(
            "LabelEncoder",
            value,
            domain=ML,
            dtype=INT64,
            keys_strings=texts,
            values_int64s=list(range(len(texts))),
            default_int64=-1,
        )
        numbers = graph.constant([list(range(len(texts)))], INT64)
        return graph.op("Equal", name, numbers, dtype=BOOL, width=len(texts))
    if categories.dtype.kind not in "iufb" and not all(
        isinstance(c, int | float) for c in categories.tolist()
    ):
        raise NotConvertible(
            f"a numeric column is encoded by the categories {categories[:3].tolist()}",
            hint="give the example the dtypes that the model was trained on",
        )
    plain = np.where(gone, 0, categories).astype(
        np.float64 if gone.any() else np.result_type(categories.dtype)
    )
    dtype = np.result_type(plain.dtype, value.dtype)
    if dtype == BOOL:
        dtype = INT64
    same = graph.op(
        "Equal",
        graph.cast(value, dtype),
        graph.constant(plain.reshape(1, -1), dtype),
        dtype=BOOL,
        width=len(plain),
    )
    if not gone.any():
        return same
    where = graph.constant(gone.reshape(1, -1), BOOL)
    missing = (
        graph.op("IsNaN", value, dtype=BOOL) if value.dtype.kind == "f" else graph.constant([[False]], BOOL)
    )
    return graph.op("Where", where, missing, same, dtype=BOOL, width=len(plain))


def _infrequent_mappings(model: Any) -> list[Any]:
    if not getattr(model, "_infrequent_enabled", False):
        return [None] * len(model.categories_)
    return list(model._default_to_infrequent_mappings)


def _unknown_is_infrequent(model: Any) -> bool:
    return model.handle_unknown in ("infrequent_if_exist", "warn")


def _k_bins(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    value = floating(graph, decidable(table))
    if model.dtype is not None:
        value = graph.cast(value, np.dtype(model.dtype))
    work.decides(
        uniform(graph, table, value.dtype).columns,
        {
            i: np.nextafter(np.asarray(edges[1:-1], np.float64), -np.inf)
            for i, edges in enumerate(model.bin_edges_)
        },
    )
    parts: list[Value] = []
    for i, edges in enumerate(model.bin_edges_):
        inner = np.asarray(edges[1:-1], dtype=np.float64)
        column = graph.take(value, [i])
        if not len(inner):
            parts.append(graph.op("Mul", column, graph.constant(0, value.dtype)))
            continue
        reached = graph.op(
            "GreaterOrEqual",
            graph.cast(column, DOUBLE),
            graph.constant(inner.reshape(1, -1)),
            dtype=BOOL,
            width=len(inner),
        )
        parts.append(
            graph.op(
                "ReduceSum", graph.cast(reached, value.dtype), graph.constant([1], INT64), width=1, keepdims=1
            )
        )
    codes = _made(graph.concat(parts))
    if model.encode == "ordinal":
        return codes
    hot = _one_hot(work, model._encoder, codes)
    return replace(hot, parts=(graph.cast(hot.parts[0], value.dtype),), sparse=model.encode == "onehot")


# Columns made of several


def _polynomial(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    if table.sparse:
        raise NotConvertible(
            "PolynomialFeatures of a sparse matrix", hint="OneHotEncoder(sparse_output=False)"
        )
    value = floating(graph, table)
    wanted = [tuple(np.repeat(np.arange(len(row)), row).tolist()) for row in np.asarray(model.powers_)]
    done: dict[tuple[int, ...], tuple[Value, int]] = {(i,): (value, i) for i in range(value.width)}
    needed = {term for term in wanted if term}
    for term in list(needed):
        needed.update(term[i:] for i in range(len(term)))
    for degree in range(2, max((len(term) for term in needed), default=1) + 1):
        terms = sorted(term for term in needed if len(term) == degree)
        before = done[terms[0][1:]][0]
        rest = graph.take(before, [done[term[1:]][1] for term in terms])
        product = graph.op("Mul", rest, graph.take(value, [term[0] for term in terms]))
        done.update({term: (product, i) for i, term in enumerate(terms)})
    parts: list[Value] = []
    run: list[int] = []
    for at, term in enumerate(wanted):
        if not term:
            # One per row, whatever the row holds.
            shape = graph.op("Shape", graph.take(value, [0]), dtype=INT64, width=0)
            one = graph.constant(np.ones(1, value.dtype))
            parts.append(graph.op("Expand", one, shape, dtype=value.dtype, width=1))
            continue
        source, column = done[term]
        run.append(column)
        following = wanted[at + 1] if at + 1 < len(wanted) else ()
        if not following or done[following][0] is not source:
            parts.append(graph.take(source, run))
            run = []
    out = graph.concat(parts)
    degree_one = [next(iter(t)) if len(t) == 1 else -1 for t in wanted]
    columns = uniform(graph, table, value.dtype).columns
    return Table((out,), tuple(columns[i] if i >= 0 else Column() for i in degree_one), coarse=table.coarse)


def _pca(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    value = floating(graph, table)
    components = np.asarray(model.components_)
    dtype = np.result_type(value.dtype, components.dtype)
    out = graph.op(
        "MatMul",
        graph.cast(value, dtype),
        graph.constant(components.T, dtype),
        dtype=dtype,
        width=len(components),
    )
    mean = np.asarray(model.mean_).reshape(1, -1) @ components.T
    out = graph.op("Sub", out, graph.constant(mean, dtype))
    if model.whiten:
        scale = np.sqrt(np.asarray(model.explained_variance_))
        scale = np.maximum(scale, np.finfo(scale.dtype).eps)
        out = graph.op("Div", out, graph.constant(scale.reshape(1, -1), dtype))
    return replace(_rounded(work, model, out, table), sparse=False)


def _truncated_svd(work: Work, model: Any, table: Table) -> Table:
    graph = work.graph
    value = matrix(graph, table)
    components = np.asarray(model.components_)
    dtype = np.result_type(value.dtype, components.dtype)
    out = graph.op(
        "MatMul",
        graph.cast(value, dtype),
        graph.constant(components.T, dtype),
        dtype=dtype,
        width=len(components),
    )
    return replace(_rounded(work, model, out, table), sparse=False)


def _selector(work: Work, model: Any, table: Table) -> Table:
    one = uniform(work.graph, table)
    return select(work.graph, one, np.flatnonzero(model.get_support()).tolist())


def _power(work: Work, model: Any, table: Table) -> Table:
    """Box-Cox or Yeo-Johnson, in double; log(1 + x) and exp(x) - 1 keep their small results exact."""
    graph = work.graph
    value = floating(graph, table)
    x = graph.cast(value, DOUBLE)
    powers = np.asarray(model.lambdas_, dtype=np.float64)
    if model.method == "box-cox":
        out = _power_of(graph, graph.op("Log", x), powers)
    else:
        positive = graph.op("GreaterOrEqual", x, graph.constant(0.0), dtype=BOOL)
        magnitude = _log1p(graph, graph.op("Abs", x))
        up = _power_of(graph, magnitude, powers)
        down = graph.op("Neg", _power_of(graph, magnitude, 2.0 - powers))
        out = graph.op("Where", positive, up, down, dtype=DOUBLE)
    done = _rounded(work, model, graph.cast(out, value.dtype), table)
    return _standard_scaler(work, model._scaler, done) if model.standardize else done


def _power_of(graph: Graph, logarithm: Value, powers: Array) -> Value:
    """(exp(p * log) - 1) / p by column; where p is zero the logarithm itself."""
    flat = np.abs(powers) < np.finfo(np.float64).eps
    safe = np.where(flat, 1.0, powers).reshape(1, -1)
    grown = _expm1(graph, graph.op("Mul", logarithm, graph.constant(safe)))
    scaled = graph.op("Div", grown, graph.constant(safe))
    return graph.op("Where", graph.constant(flat.reshape(1, -1), BOOL), logarithm, scaled, dtype=DOUBLE)


def _log1p(graph: Graph, x: Value) -> Value:
    """log(1 + x) to a few last digits (Kahan): the rounding of 1 + x is undone by the quotient."""
    one = graph.constant(1.0)
    total = graph.op("Add", x, one)
    step = graph.op("Sub", total, one)
    lost = graph.op("Equal", step, graph.constant(0.0), dtype=BOOL)
    safe = graph.op("Where", lost, one, step, dtype=DOUBLE, width=x.width)
    exact = graph.op("Mul", graph.op("Log", total), graph.op("Div", x, safe))
    return graph.op("Where", lost, x, exact, dtype=DOUBLE)


def _expm1(graph: Graph, x: Value) -> Value:
    """exp(x) - 1 to a few last digits: Kahan's quotient for results below 1/2, the difference for others."""
    one = graph.constant(1.0)
    grown = graph.op("Exp", x)
    step = graph.op("Sub", grown, one)
    small = graph.op("Less", graph.op("Abs", step), graph.constant(0.5), dtype=BOOL)
    lost = graph.op("Equal", step, graph.constant(0.0), dtype=BOOL)
    safe = graph.op("Where", lost, one, graph.op("Log", grown), dtype=DOUBLE, width=x.width)
    exact = graph.op("Mul", step, graph.op("Div", x, safe))
    near = graph.op("Where", lost, x, exact, dtype=DOUBLE)
    return graph.op("Where", small, near, step, dtype=DOUBLE)


# Functions that ONNX has too: its operator, and whether that gives the same last digit.
_FUNCTIONS: Final[dict[str, tuple[str, bool]]] = {
    "sqrt": ("Sqrt", True),
    "absolute": ("Abs", True),
    "negative": ("Neg", True),
    "exp": ("Exp", False),
    "log": ("Log", False),
}


def _function(work: Work, model: Any, table: Table) -> Table:
    if model.func is None:
        return table
    if _is_float64_check(model.func):
        return uniform(work.graph, table, DOUBLE)
    name = getattr(model.func, "__name__", repr(model.func))
    if isinstance(model.func, np.ufunc) and name in _FUNCTIONS and not model.kw_args:
        op, exact = _FUNCTIONS[name]
        out = work.graph.op(op, floating(work.graph, table))
        return _made(out, table.sparse, table.coarse) if exact else _rounded(work, model, out, table)
    raise NotConvertible(
        f"a FunctionTransformer runs the Python function {name}",
        hint="pack a module:function that calls it, or --allow-pickle",
    )


def _is_float64_check(func: Any) -> bool:
    """HistGradientBoosting's own step for its numeric columns: check_array(dtype=float64)."""
    inner = getattr(func, "func", None)
    dtypes = (getattr(func, "keywords", None) or {}).get("dtype")
    return getattr(inner, "__name__", "") == "check_array" and dtypes == [np.float64]


TRANSFORMERS: Final[dict[str, Transform]] = {
    "Pipeline": _pipeline,
    "ColumnTransformer": _column_transformer,
    "FeatureUnion": _feature_union,
    "StandardScaler": _standard_scaler,
    "MinMaxScaler": _min_max_scaler,
    "MaxAbsScaler": _max_abs_scaler,
    "RobustScaler": _robust_scaler,
    "Normalizer": _normalizer,
    "Binarizer": _binarizer,
    "SimpleImputer": _simple_imputer,
    "MissingIndicator": _missing_indicator,
    "OneHotEncoder": _one_hot,
    "OrdinalEncoder": _ordinal,
    "KBinsDiscretizer": _k_bins,
    "PolynomialFeatures": _polynomial,
    "PCA": _pca,
    "TruncatedSVD": _truncated_svd,
    "FunctionTransformer": _function,
    "PowerTransformer": _power,
}
