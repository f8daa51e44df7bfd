"""scikit-learn's trees, forests and boosted trees, leaf by leaf as scikit-learn walks and adds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from parbake.contract.sources.answer import (
    Answer,
    above,
    decided,
    exponential,
    logistic,
    most,
    softmax,
    two_sided,
)
from parbake.contract.sources.graph import DOUBLE, FLOAT, Array, Value
from parbake.contract.sources.sklearn_preprocessing import transform
from parbake.contract.sources.table import Table, Work, decidable, matrix, uniform
from parbake.contract.sources.trees import (
    LEQ,
    MEMBER,
    Tree,
    add_sum,
    add_vectors,
    stump,
    thresholds_of,
    through_float32,
)
from parbake.errors import NotConvertible

Estimator = Callable[[Work, Any, Table], Answer]

_TREE_SUMS: Final = 1e-12
"""Leaves are taken exactly; their sums may end in another last digit (exp, division, threads)."""

_KNOWN_CATEGORIES: Final = 256


def _seen(work: Work, table: Table, trees: Sequence[Tree]) -> Value:
    """The table as the trees see it: in double, the cast to float32 being part of their thresholds."""
    graph = work.graph
    parts = []
    for part in decidable(table).parts:
        # A wide integer goes to float32 in one rounding, not in two by way of a double.
        wide = part.dtype.kind in "iu" and part.dtype.itemsize == 8
        parts.append(graph.cast(graph.cast(part, FLOAT) if wide else part, DOUBLE))
    work.decides(uniform(graph, table, DOUBLE).columns if table.parts else (), thresholds_of(trees))
    work.loosen(_TREE_SUMS, _TREE_SUMS)
    return graph.concat(parts)


def _tree(work: Work, estimator: Any, leaves: Callable[[Any, Array], Array], target: int = 0) -> Tree:
    """A fitted tree; ``leaves`` gives the values of leaves by their node numbers."""
    tree = estimator.tree_
    inner = np.flatnonzero(tree.children_left >= 0)
    outer = np.flatnonzero(tree.children_left < 0)
    place = np.empty(tree.node_count, dtype=np.int64)
    place[inner] = np.arange(len(inner))
    place[outer] = ~np.arange(len(outer))
    missing = getattr(tree, "missing_go_to_left", None) if work.may_be_nan else None
    return Tree(
        feature=np.asarray(tree.feature)[inner].astype(np.int64),
        threshold=through_float32(np.asarray(tree.threshold)[inner]),
        left=place[tree.children_left[inner]],
        right=place[tree.children_right[inner]],
        leaves=leaves(tree, outer),
        missing_left=None if missing is None else np.asarray(missing)[inner].astype(bool),
        target=target,
    )


def _one_output(model: Any) -> None:
    if np.ndim(getattr(model, "n_classes_", 1)) or isinstance(getattr(model, "classes_", None), list):
        raise NotConvertible(
            f"{type(model).__name__} with several outputs of classes",
            hint="one model per output, or --allow-pickle",
        )


def _class_vectors(tree: Any, nodes: Array) -> Array:
    return np.asarray(tree.value)[nodes, 0, :]


def _output_vectors(tree: Any, nodes: Array) -> Array:
    return np.asarray(tree.value)[nodes, :, 0]


def _tree_classifier(work: Work, model: Any, table: Table) -> Answer:
    _one_output(model)
    tree = _tree(work, model, _class_vectors)
    probability = add_vectors(work.graph, _seen(work, table, [tree]), [tree])
    return decided(work.graph, most(work.graph, probability), model.classes_, probability=probability)


def _forest_classifier(work: Work, model: Any, table: Table) -> Answer:
    _one_output(model)
    graph = work.graph
    trees = [_tree(work, one, _class_vectors) for one in model.estimators_]
    total = add_vectors(graph, _seen(work, table, trees), trees)
    probability = graph.op("Div", total, graph.constant(float(len(trees))))
    return decided(graph, most(graph, probability), model.classes_, probability=probability)


def _regression(work: Work, estimators: Sequence[Any], table: Table, outputs: int) -> Value:
    if outputs == 1:
        trees = [
            _tree(work, one, lambda tree, nodes: np.asarray(tree.value)[nodes, 0, 0]) for one in estimators
        ]
        return add_sum(work.graph, _seen(work, table, trees), trees, 1)
    trees = [_tree(work, one, _output_vectors) for one in estimators]
    return add_vectors(work.graph, _seen(work, table, trees), trees)


def _tree_regressor(work: Work, model: Any, table: Table) -> Answer:
    return Answer({"prediction": _regression(work, [model], table, model.n_outputs_)})


def _forest_regressor(work: Work, model: Any, table: Table) -> Answer:
    total = _regression(work, model.estimators_, table, model.n_outputs_)
    count = work.graph.constant(float(len(model.estimators_)))
    return Answer({"prediction": work.graph.op("Div", total, count)})


def _isolation_forest(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    trees = []
    for i, (one, features) in enumerate(zip(model.estimators_, model.estimators_features_, strict=True)):
        depths = np.asarray(model._decision_path_lengths[i]) + np.asarray(
            model._average_path_length_per_tree[i]
        )

        def leaves(_: Any, nodes: Array, depths: Array = depths) -> Array:
            return depths[nodes] - 1.0

        tree = _tree(work, one, leaves)
        trees.append(replace(tree, feature=np.asarray(features)[tree.feature].astype(np.int64)))
    total = add_sum(graph, _seen(work, table, trees), trees, 1)
    denominator = len(trees) * float(_average_path_length(model._max_samples))
    if denominator == 0:
        raise NotConvertible("an IsolationForest trained on a single sample", hint="train it on more rows")
    power = graph.op("Neg", graph.op("Div", total, graph.constant(denominator)))
    scores = graph.op("Pow", graph.constant(2.0), power, dtype=DOUBLE, width=1)
    score = graph.flat(graph.op("Sub", graph.op("Neg", scores), graph.constant(float(model.offset_))))
    inlier = above(graph, score, 0.0, inclusive=True)
    return Answer({"label": decided(graph, inlier, [-1, 1]).values["label"], "score": score})


def _average_path_length(samples: int) -> float:
    """Mean depth of an unsuccessful search in a binary tree (Liu et al., Isolation Forest, 2008, eq. 1)."""
    if samples <= 2:
        return float(samples == 2)
    return float(2.0 * (np.log(samples - 1.0) + np.euler_gamma) - 2.0 * (samples - 1.0) / samples)


def _ada_boost_classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    classes = np.asarray(model.classes_)
    count = len(classes)
    if count < 2:
        raise NotConvertible("AdaBoostClassifier of a single class", hint="there is nothing to decide")
    trees = []
    for one, weight in zip(model.estimators_, model.estimator_weights_, strict=False):
        if type(one).__name__ not in ("DecisionTreeClassifier", "ExtraTreeClassifier"):
            raise NotConvertible(
                f"AdaBoostClassifier of {type(one).__name__}",
                hint="pack a module:function, or --allow-pickle",
            )

        def leaves(tree: Any, nodes: Array, one: Any = one, weight: float = weight) -> Array:
            voted = np.asarray(one.classes_).take(np.argmax(_class_vectors(tree, nodes), axis=1))
            return np.where(voted[:, np.newaxis] == classes, weight, -1 / (count - 1) * weight)

        trees.append(_tree(work, one, leaves))
    total = add_vectors(graph, _seen(work, table, trees), trees)
    decision = graph.op("Div", total, graph.constant(float(np.sum(model.estimator_weights_))))
    if count > 2:
        scaled = graph.op("Div", decision, graph.constant(float(count - 1)))
        return decided(graph, most(graph, decision), classes, probability=softmax(graph, scaled))
    first = graph.op("Neg", graph.take(decision, [0]))
    margin = graph.op("Add", first, graph.take(decision, [1]))
    halves = graph.op("Div", graph.concat([graph.op("Neg", margin), margin]), graph.constant(2.0))
    return decided(graph, above(graph, graph.flat(margin), 0.0), classes, probability=softmax(graph, halves))


def _boosted(work: Work, model: Any, table: Table) -> Value:
    """Raw predictions of GradientBoosting: the initial constant, then stage by stage."""
    constant = model.init_ == "zero" or type(model.init_).__name__ in ("DummyClassifier", "DummyRegressor")
    if not constant:
        raise NotConvertible(
            f"{type(model).__name__} that starts from a {type(model.init_).__name__}",
            hint="train with init=None, or --allow-pickle",
        )
    initial = np.asarray(model._raw_predict_init(np.zeros((1, model.n_features_in_), dtype=np.float32)))[0]
    trees = [stump(float(value), target) for target, value in enumerate(initial.tolist())]
    for stage in model.estimators_:
        for target, one in enumerate(stage):
            trees.append(
                _tree(
                    work,
                    one,
                    lambda tree, nodes: model.learning_rate * np.asarray(tree.value)[nodes, 0, 0],
                    target,
                )
            )
    return add_sum(work.graph, _seen(work, table, trees), trees, len(initial))


def _gradient_boosting_classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    raw = _boosted(work, model, table)
    if raw.width > 1:
        return decided(graph, most(graph, raw), model.classes_, probability=softmax(graph, raw))
    flat = graph.flat(raw)
    slope = 2.0 if model.loss == "exponential" else 1.0
    probability = two_sided(graph, logistic(graph, raw, slope))
    return decided(graph, above(graph, flat, 0.0, inclusive=True), model.classes_, probability=probability)


def _gradient_boosting_regressor(work: Work, model: Any, table: Table) -> Answer:
    return Answer({"prediction": _boosted(work, model, table)})


def _hist_boosted(work: Work, model: Any, table: Table) -> Value:
    """Raw predictions of HistGradientBoosting, in double throughout."""
    graph = work.graph
    work.handles_missing(decidable(table).columns)
    if getattr(model, "_preprocessor", None) is not None:
        table = transform(work, model._preprocessor, table)
    elif model.is_categorical_ is not None and np.any(model.is_categorical_):
        raise NotConvertible(
            "categories of a HistGradientBoosting model from before scikit-learn 1.5", hint="train it again"
        )
    known, place = model._bin_mapper.make_known_categories_bitsets()
    initial = np.asarray(model._baseline_prediction, dtype=np.float64).reshape(-1)
    trees = [stump(float(value), target) for target, value in enumerate(initial.tolist())]
    for iteration in model._predictors:
        for target, predictor in enumerate(iteration):
            trees.append(_hist_tree(predictor, known, place, target))
    work.decides(uniform(graph, table, DOUBLE).columns, thresholds_of(trees))
    work.loosen(_TREE_SUMS, _TREE_SUMS)
    return add_sum(graph, matrix(graph, table, DOUBLE), trees, len(initial))


def _hist_tree(predictor: Any, known: Array, place: Array, target: int) -> Tree:
    nodes = predictor.nodes
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    outer = np.flatnonzero(nodes["is_leaf"] != 0)
    index = np.empty(len(nodes), dtype=np.int64)
    index[inner] = np.arange(len(inner))
    index[outer] = ~np.arange(len(outer))
    inside = nodes[inner]
    mode = np.full(len(inner), LEQ)
    members: dict[int, list[float]] = {}
    for at in np.flatnonzero(inside["is_categorical"] != 0).tolist():
        node = inside[at]
        left = _bits(predictor.raw_left_cat_bitsets[node["bitset_idx"]])
        if node["missing_go_to_left"]:
            # A code that training did not see goes where missing values go; the encoder gives none beyond.
            seen = _bits(known[place[node["feature_idx"]]])
            left = left | (~seen & (np.arange(len(seen)) < np.flatnonzero(seen).max(initial=-1)))
        mode[at] = MEMBER
        members[at] = np.flatnonzero(left).astype(float).tolist()
    return Tree(
        feature=inside["feature_idx"].astype(np.int64),
        threshold=np.where(mode == MEMBER, 0.0, inside["num_threshold"]),
        left=index[inside["left"]],
        right=index[inside["right"]],
        leaves=nodes["value"][outer].astype(np.float64),
        missing_left=inside["missing_go_to_left"].astype(bool),
        mode=mode,
        members=members,
        target=target,
    )


def _bits(words: Array) -> Array:
    """The set bits of a bitset of 256, as booleans."""
    numbers = np.arange(_KNOWN_CATEGORIES)
    bits: Array = (np.asarray(words)[numbers // 32] >> (numbers % 32).astype(np.uint32)) & 1 != 0
    return bits


def _hist_classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    raw = _hist_boosted(work, model, table)
    if raw.width > 1:
        return decided(graph, most(graph, raw), model.classes_, probability=softmax(graph, raw))
    probability = two_sided(graph, logistic(graph, raw))
    return decided(graph, above(graph, graph.flat(raw), 0.0), model.classes_, probability=probability)


def _hist_regressor(work: Work, model: Any, table: Table) -> Answer:
    raw = _hist_boosted(work, model, table)
    link = type(model._loss.link).__name__
    if link == "LogLink":
        return Answer({"prediction": exponential(work.graph, raw)})
    if link != "IdentityLink":
        raise NotConvertible(f"HistGradientBoostingRegressor with {link}", hint="--allow-pickle")
    return Answer({"prediction": raw})


ESTIMATORS: Final[dict[str, Estimator]] = {
    "DecisionTreeClassifier": _tree_classifier,
    "ExtraTreeClassifier": _tree_classifier,
    "DecisionTreeRegressor": _tree_regressor,
    "ExtraTreeRegressor": _tree_regressor,
    "RandomForestClassifier": _forest_classifier,
    "ExtraTreesClassifier": _forest_classifier,
    "RandomForestRegressor": _forest_regressor,
    "ExtraTreesRegressor": _forest_regressor,
    "IsolationForest": _isolation_forest,
    "AdaBoostClassifier": _ada_boost_classifier,
    "GradientBoostingClassifier": _gradient_boosting_classifier,
    "GradientBoostingRegressor": _gradient_boosting_regressor,
    "HistGradientBoostingClassifier": _hist_classifier,
    "HistGradientBoostingRegressor": _hist_regressor,
}
