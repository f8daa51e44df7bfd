"""LightGBM models as ONNX: double thresholds, its three kinds of missing values, its categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from parbake.contract.sources.answer import (
    Answer,
    OneThread,
    Outputs,
    assemble,
    decided,
    exponential,
    logistic,
    most,
    plain,
    quietly,
    softmax,
    two_sided,
)
from parbake.contract.sources.example import Example, read, rows_for
from parbake.contract.sources.graph import BOOL, DOUBLE, FLOAT, INT64, ML, TEXT, Array, Graph, Value
from parbake.contract.sources.model import Source
from parbake.contract.sources.table import Column, Table, Work, decidable, matrix, of_example, select, uniform
from parbake.contract.sources.trees import LEQ, MEMBER, Tree, add_sum, thresholds_of
from parbake.contract.tensors import Tensors
from parbake.errors import MissingExtra, NotConvertible

_ZERO: Final = float(np.float32(1e-35))
"""Numbers no further from zero than this are zero to LightGBM."""

_CATEGORICAL: Final = 1
_DEFAULT_LEFT: Final = 2
_MISSING_ZERO: Final = 1


@dataclass(frozen=True, slots=True)
class Model:
    """A LightGBM model as its text says it."""

    trees: tuple[Mapping[str, str], ...]
    objective: str
    """Name of the objective; empty for one of the user's own, whose scores stay as they are."""
    parameters: Mapping[str, str]
    """What follows the objective's name: ``num_class``, ``sigmoid``, ``sqrt``."""
    per_iteration: int
    averaged: bool
    features: int


def from_lightgbm(model: Any, example: object) -> Source:
    """Convert a Booster, LGBMClassifier, LGBMRegressor or LGBMRanker, up to its best iteration.

    Every row takes the leaves it takes in LightGBM. Outputs: ``label`` and ``probability`` of a
    classifier, else ``prediction``. Raises `NotConvertible` for linear trees and unknown objectives.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise MissingExtra("lightgbm", "lightgbm") from error
    given = read(example)
    framed = bool(given.names)
    if framed:
        given = _as_categories(given, booster_of(model))
    names = [str(name) for name in booster_of(model).feature_name()]
    known = framed and set(names) <= set(given.names)
    rows = rows_for(given, (names if known else given.names) if framed else None)
    specs = rows.example.specs
    work = Work(Graph(specs), may_be_nan=True)
    table = of_example(work.graph, rows.example, specs)
    answer = add(work, model, table, rows.example if framed else None)

    alone = OneThread()

    def predict(tensors: Tensors) -> Outputs:
        data = rows(tensors)
        if hasattr(model, "classes_"):
            label, probability = alone(
                lambda: (model.predict(data, num_threads=1), model.predict_proba(data, num_threads=1))
            )
            return {"label": plain(np.asarray(label)), "probability": np.asarray(probability)}
        return {"prediction": alone(lambda: np.asarray(model.predict(data, num_threads=1)))}

    return assemble(
        work, answer, rows.example, specs, predict, framework="lightgbm", version=str(lightgbm.__version__)
    )


def booster_of(model: Any) -> Any:
    """The Booster itself."""
    return model.booster_ if hasattr(model, "booster_") else model


def add(work: Work, model: Any, table: Table, example: Example | None = None) -> Answer:
    """Add a model to a graph. ``example`` is given where the table is a frame's columns, not an array."""
    graph = work.graph
    booster = booster_of(model)
    parsed = parse(quietly(booster.model_to_string))
    if table.width != parsed.features:
        raise NotConvertible(
            f"the model was trained on {parsed.features} columns, the example has {table.width}",
            hint="give the example the columns of the training data, in their order",
        )
    work.handles_missing(decidable(table).columns)
    categories = getattr(booster, "pandas_categorical", None) or []
    if example is not None and categories:
        table = _coded(work, table, example, categories)
    if example is None and table.dtype.kind in "iub":
        # LightGBM takes an array of whole numbers as float32.
        table = uniform(graph, table, FLOAT)
    table = uniform(graph, table, DOUBLE)
    raw = _raw(work, parsed, table)
    if not hasattr(model, "classes_"):
        return Answer({"prediction": _converted(graph, parsed, raw)})
    if not parsed.objective:
        raise NotConvertible(
            "a LGBMClassifier with an objective of its own gives scores, not probabilities",
            hint="pack its booster_",
        )
    probability = _converted(graph, parsed, raw)
    if raw.width == 1:
        probability = two_sided(graph, probability)
    return decided(graph, most(graph, probability), model.classes_, probability=probability)


def parse(text: str) -> Model:
    """Read the text that ``Booster.model_to_string`` writes; its numbers are exact."""
    head, *rest = text.split("\nTree=")
    lines = dict(line.partition("=")[::2] for line in head.splitlines())
    words = lines.get("objective", "").split()
    trees = []
    for part in rest:
        body = part.partition("end of trees")[0]
        trees.append(dict(line.partition("=")[::2] for line in body.splitlines()[1:] if "=" in line))
    if any(tree.get("is_linear", "0") != "0" for tree in trees):
        raise NotConvertible(
            "LightGBM with linear trees has no exact conversion", hint="train with linear_tree=false"
        )
    return Model(
        trees=tuple(trees),
        objective=words[0] if words else "",
        parameters=dict(word.partition(":")[::2] for word in words[1:]),
        per_iteration=int(lines["num_tree_per_iteration"]),
        averaged="average_output" in lines,
        features=int(lines["max_feature_idx"]) + 1,
    )


def _raw(work: Work, model: Model, table: Table) -> Value:
    graph = work.graph
    width = table.width
    zeros: dict[int, int] = {}
    codes: dict[int, int] = {}
    # First pass: which features are also needed in another form, as columns of their own.
    for tree in model.trees:
        features = _integers(tree.get("split_feature", ""))
        kinds = _integers(tree.get("decision_type", ""))
        for feature, kind in zip(features.tolist(), kinds.tolist(), strict=True):
            if kind & _CATEGORICAL:
                codes.setdefault(feature, 0)
            elif kind >> 2 & 3 == _MISSING_ZERO:
                zeros.setdefault(feature, 0)
    zeros = {feature: width + i for i, feature in enumerate(sorted(zeros))}
    codes = {feature: width + len(zeros) + i for i, feature in enumerate(sorted(codes))}
    trees = [_tree(tree, zeros, codes, target=i % model.per_iteration) for i, tree in enumerate(model.trees)]
    value = matrix(graph, table, DOUBLE)
    parts = [value]
    columns = list(table.columns)
    if zeros:
        parts.append(_zero_as_missing(graph, graph.take(value, sorted(zeros))))
        columns += [table.columns[feature] for feature in sorted(zeros)]
    if codes:
        parts.append(_truncated(graph, graph.take(value, sorted(codes))))
        columns += [Column() for _ in codes]
    work.decides(columns, thresholds_of(trees))
    work.loosen(1e-12, 1e-12)
    raw = add_sum(graph, graph.concat(parts), trees, model.per_iteration)
    if model.averaged:
        iterations = len(trees) // model.per_iteration
        raw = graph.op("Div", raw, graph.constant(float(iterations)))
    return raw


def _tree(tree: Mapping[str, str], zeros: Mapping[int, int], codes: Mapping[int, int], target: int) -> Tree:
    leaves = _doubles(tree["leaf_value"])
    if int(tree["num_leaves"]) == 1:
        none = np.zeros(0, dtype=np.int64)
        return Tree(none, np.zeros(0), none, none, leaves[:1], target=target)
    features = _integers(tree["split_feature"])
    thresholds = _doubles(tree["threshold"])
    kinds = _integers(tree["decision_type"])
    missing = kinds >> 2 & 3
    categorical = kinds & _CATEGORICAL != 0
    default_left = kinds & _DEFAULT_LEFT != 0
    # Where training knew no missing values, NaN stands for zero.
    missing_left = np.where(missing == 0, thresholds >= 0.0, default_left) & ~categorical
    members: dict[int, list[float]] = {}
    seen = features.copy()
    if categorical.any():
        bounds = _integers(tree["cat_boundaries"])
        words = _integers(tree["cat_threshold"])
        for node in np.flatnonzero(categorical).tolist():
            which = int(thresholds[node])
            members[node] = _bits(words[bounds[which] : bounds[which + 1]])
            seen[node] = codes[int(features[node])]
    for node in np.flatnonzero((missing == _MISSING_ZERO) & ~categorical).tolist():
        seen[node] = zeros[int(features[node])]
    return Tree(
        feature=seen,
        threshold=np.where(categorical, 0.0, _around_zero(thresholds)),
        left=_integers(tree["left_child"]),
        right=_integers(tree["right_child"]),
        leaves=leaves,
        missing_left=missing_left,
        mode=np.where(categorical, MEMBER, LEQ),
        members=members,
        target=target,
    )


def _around_zero(thresholds: Array) -> Array:
    """LightGBM reads numbers around zero as zero, so all of them are on one side of a threshold among them."""
    below = (thresholds >= -_ZERO) & (thresholds < 0.0)
    above = (thresholds >= 0.0) & (thresholds < _ZERO)
    return np.where(below, np.nextafter(-_ZERO, -1.0), np.where(above, _ZERO, thresholds))


def _bits(words: Array) -> list[float]:
    return [
        float(32 * i + bit) for i, word in enumerate(words.tolist()) for bit in range(32) if word >> bit & 1
    ]


def _integers(text: str) -> Array:
    return np.array(text.split(), dtype=np.int64)


def _doubles(text: str) -> Array:
    return np.array([float(word) for word in text.split()], dtype=np.float64)


def _zero_as_missing(graph: Graph, value: Value) -> Value:
    near = graph.op("LessOrEqual", graph.op("Abs", value), graph.constant(_ZERO), dtype=BOOL)
    missing = graph.op("Or", near, graph.op("IsNaN", value, dtype=BOOL), dtype=BOOL)
    return graph.op("Where", missing, graph.constant(float("nan")), value, dtype=DOUBLE)


def _truncated(graph: Graph, value: Value) -> Value:
    """Categories as LightGBM reads them: towards zero, and what is missing or no int32 in no set."""
    known = graph.op("Where", graph.op("IsNaN", value, dtype=BOOL), graph.constant(-1.0), value, dtype=DOUBLE)
    bounded = graph.op("Clip", known, graph.constant(-1.0), graph.constant(2.0**31))
    return graph.cast(graph.cast(bounded, INT64), DOUBLE)


def _converted(graph: Graph, model: Model, raw: Value) -> Value:
    """What the objective makes of raw scores."""
    name = model.objective
    slope = float(model.parameters.get("sigmoid", 1.0))
    if name in ("binary", "multiclassova"):
        return logistic(graph, raw, slope)
    if name == "cross_entropy":
        return logistic(graph, raw)
    if name == "multiclass":
        return softmax(graph, raw)
    if name in ("poisson", "gamma", "tweedie"):
        return exponential(graph, raw)
    if name in ("regression", "regression_l1", "huber", "fair", "quantile", "mape"):
        if "sqrt" in model.parameters:
            return graph.op("Mul", graph.op("Sign", raw), graph.op("Mul", raw, raw))
        return raw
    if name in ("", "lambdarank", "rank_xendcg"):
        return raw
    raise NotConvertible(
        f"LightGBM's objective {name} is not known here", hint="pack a module:function that calls it"
    )


def _as_categories(example: Example, booster: Any) -> Example:
    """Text columns are categories to LightGBM, however the example came (a CSV file has no such dtype)."""
    if not getattr(booster, "pandas_categorical", None):
        return example
    columns = tuple(
        replace(column, categorical=True) if column.values.dtype == object else column
        for column in example.columns
    )
    return replace(example, columns=columns)


def _coded(work: Work, table: Table, example: Example, categories: Sequence[Sequence[Any]]) -> Table:
    """Columns of categories as the positions that training gave them; unknown ones are missing."""
    graph = work.graph
    positions = [i for i, column in enumerate(example.columns) if column.categorical]
    if len(positions) != len(categories):
        raise NotConvertible(
            f"the model was trained on {len(categories)} columns of categories, the example has {len(positions)}",
            hint="give the example's columns the dtypes of the training data (category)",
        )
    known = dict(zip(positions, categories, strict=True))
    parts: list[Value] = []
    columns: list[Column] = []
    for i, column in enumerate(table.columns):
        (value,) = select(graph, table, [i]).parts
        if i in known:
            value = _positions(graph, value, known[i])
            column = Column()
        parts.append(graph.cast(value, DOUBLE))
        columns.append(column)
    return Table(tuple(parts), tuple(columns))


def _positions(graph: Graph, value: Value, categories: Sequence[Any]) -> Value:
    nowhere = graph.constant([[float("nan")]])
    if value.dtype == TEXT:
        codes = graph.op(
            "LabelEncoder",
            value,
            domain=ML,
            dtype=INT64,
            keys_strings=[str(category) for category in categories],
            values_int64s=list(range(len(categories))),
            default_int64=-1,
        )
        found = graph.op("GreaterOrEqual", codes, graph.constant(0, INT64), dtype=BOOL)
        return graph.op("Where", found, graph.cast(codes, DOUBLE), nowhere, dtype=DOUBLE)
    numbers = graph.constant([[float(category) for category in categories]], DOUBLE)
    same = graph.op("Equal", graph.cast(value, DOUBLE), numbers, dtype=BOOL, width=len(categories))
    ones = graph.cast(same, DOUBLE)
    codes = graph.op("ArgMax", ones, dtype=INT64, width=1, axis=1, keepdims=1)
    found = graph.cast(graph.op("ReduceMax", ones, graph.constant([1], INT64), width=1), BOOL)
    return graph.op("Where", found, graph.cast(codes, DOUBLE), nowhere, dtype=DOUBLE)
