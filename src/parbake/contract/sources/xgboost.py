"""XGBoost models as ONNX: float32 throughout, ``<``, and sums in the order of the trees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from parbake.contract.sources.answer import (
    Answer,
    OneThread,
    Outputs,
    above,
    assemble,
    decided,
    logistic,
    most,
    plain,
    quietly,
    softmax,
    two_sided,
)
from parbake.contract.sources.example import read, rows_for
from parbake.contract.sources.graph import BOOL, FLOAT, Array, Graph, Value
from parbake.contract.sources.model import Source
from parbake.contract.sources.table import Table, Work, decidable, matrix, of_example, uniform
from parbake.contract.sources.trees import LT, Tree, add_sum, stump, thresholds_of
from parbake.contract.tensors import Tensors
from parbake.errors import MissingExtra, NotConvertible

_PROBE_ROWS: Final = 64
_NEIGHBOURS: Final = 64

_IDENTITY: Final = (
    "reg:squarederror",
    "reg:squaredlogerror",
    "reg:absoluteerror",
    "reg:pseudohubererror",
    "reg:quantileerror",
    "reg:expectileerror",
    "reg:linear",
    "binary:logitraw",
    "rank:pairwise",
    "rank:ndcg",
    "rank:map",
)
_LOGISTIC: Final = ("binary:logistic", "reg:logistic")
_EXPONENTIAL: Final = ("count:poisson", "reg:gamma", "reg:tweedie", "survival:cox", "survival:aft")


def from_xgboost(model: Any, example: object) -> Source:
    """Convert a Booster, XGBClassifier, XGBRegressor, XGBRanker or their random forests.

    Every row takes the leaves it takes in XGBoost; the scikit-learn classes stop at their best iteration,
    as they do themselves. Outputs: ``label`` and ``probability`` of a classifier, else ``prediction``.
    Raises `NotConvertible` for linear boosters, categories and trees with vectors as leaves.
    """
    try:
        import xgboost
    except ImportError as error:
        raise MissingExtra("xgboost", "xgboost") from error
    given = read(example)
    booster = booster_of(model)
    rows = rows_for(given, booster.feature_names or None)
    specs = rows.example.specs
    work = Work(Graph(specs), may_be_nan=True)
    answer = add(work, model, of_example(work.graph, rows.example, specs))
    plain_booster = isinstance(model, xgboost.Booster)

    alone = OneThread()

    def predict(tensors: Tensors) -> Outputs:
        data = rows(tensors)
        if plain_booster:
            return {"prediction": alone(lambda: np.asarray(model.predict(xgboost.DMatrix(data))))}
        if hasattr(model, "n_classes_"):
            label, probability = alone(lambda: (model.predict(data), model.predict_proba(data)))
            return {"label": plain(np.asarray(label)), "probability": np.asarray(probability)}
        return {"prediction": alone(lambda: np.asarray(model.predict(data)))}

    return assemble(
        work, answer, rows.example, specs, predict, framework="xgboost", version=str(xgboost.__version__)
    )


def booster_of(model: Any) -> Any:
    """The Booster itself."""
    return model.get_booster() if hasattr(model, "get_booster") else model


def add(work: Work, model: Any, table: Table) -> Answer:
    """Add a model to a graph."""
    graph = work.graph
    booster = booster_of(model)
    learner = json.loads(bytes(booster.save_raw("json")))["learner"]
    objective = str(learner["objective"]["name"])
    work.handles_missing(decidable(table).columns)
    seen = uniform(graph, table, FLOAT)
    value = matrix(graph, seen)
    marker = getattr(model, "missing", None)
    missing = float("nan") if marker is None else float(marker)
    if table.sparse:
        # What a sparse matrix does not store is missing to XGBoost.
        value = _missing(graph, value, 0.0)
    if missing == missing:
        value = _missing(graph, value, missing)
    rounds = _rounds(model)
    trees = _trees(learner, rounds)
    bases = _base_margins(booster, learner, objective, trees, rounds)
    stumps = [stump(float(base), target) for target, base in enumerate(bases.tolist())]
    thresholds = thresholds_of(trees)
    below = {f: np.nextafter(t.astype(np.float32), np.float32(-np.inf)) for f, t in thresholds.items()}
    work.decides(seen.columns, {f: t.astype(np.float64) for f, t in below.items()})
    work.loosen(1e-6, 1e-6)
    raw = add_sum(graph, value, [*stumps, *trees], len(stumps))
    if not hasattr(model, "n_classes_"):
        return Answer({"prediction": _converted(graph, objective, raw)})
    return _classified(graph, model, objective, raw)


def _missing(graph: Graph, value: Value, marker: float) -> Value:
    same = graph.op("Equal", value, graph.constant(marker, FLOAT), dtype=BOOL)
    return graph.op("Where", same, graph.constant(float("nan"), FLOAT), value, dtype=FLOAT)


def _classified(graph: Graph, model: Any, objective: str, raw: Value) -> Answer:
    classes = np.asarray(model.classes_)
    if raw.width == 1 and objective in _LOGISTIC:
        positive = logistic(graph, raw)
        index = above(graph, graph.flat(positive), 0.5)
        return decided(graph, index, classes, probability=two_sided(graph, positive))
    if raw.width > 1 and objective in ("multi:softprob", "multi:softmax"):
        probability = softmax(graph, raw)
        index = most(graph, raw if objective == "multi:softmax" else probability)
        return decided(graph, index, classes, probability=probability)
    raise NotConvertible(
        f"a classifier with the objective {objective} is not known here",
        hint="pack its Booster, or a module:function that calls it",
    )


def _converted(graph: Graph, objective: str, raw: Value) -> Value:
    """What the objective makes of margins."""
    if objective in _IDENTITY:
        return raw
    if objective in _LOGISTIC:
        return logistic(graph, raw)
    if objective in _EXPONENTIAL:
        return graph.op("Exp", raw)
    if objective == "multi:softprob":
        return softmax(graph, raw)
    if objective == "multi:softmax":
        return graph.cast(most(graph, raw), FLOAT)
    if objective == "binary:hinge":
        over = graph.op("Greater", raw, graph.constant(0.0, FLOAT), dtype=BOOL)
        return graph.cast(over, FLOAT)
    raise NotConvertible(
        f"XGBoost's objective {objective} is not known here", hint="pack a module:function that calls it"
    )


def _rounds(model: Any) -> int | None:
    """Boosting rounds that the model itself uses; None: all."""
    if not hasattr(model, "get_booster"):
        return None
    try:
        return int(model.best_iteration) + 1
    except AttributeError:
        return None


def _trees(learner: Any, rounds: int | None) -> list[Tree]:
    """Trees in their order with their targets; dart's weights are part of their leaves."""
    boosted = learner["gradient_booster"]
    weights = boosted.get("weight_drop")
    model = boosted["gbtree"]["model"] if "gbtree" in boosted else boosted.get("model")
    if model is None or "trees" not in model:
        raise NotConvertible(
            f"XGBoost's booster {boosted.get('name')} has no trees", hint="train with booster='gbtree'"
        )
    count = len(model["trees"]) if rounds is None else int(model["iteration_indptr"][rounds])
    factors = np.ones(count, np.float32) if weights is None else np.asarray(weights[:count], np.float32)
    trees = []
    for tree, target, factor in zip(model["trees"][:count], model["tree_info"], factors, strict=False):
        if any(tree.get("split_type", ())):
            raise NotConvertible(
                "XGBoost's categories have no exact conversion here",
                hint="encode them in a scikit-learn pipeline (OrdinalEncoder, OneHotEncoder), "
                "or pack a module:function that calls it",
            )
        if int(tree["tree_param"].get("size_leaf_vector", 1)) > 1:
            raise NotConvertible(
                "XGBoost's multi_output_tree", hint="train with multi_strategy='one_output_per_tree'"
            )
        trees.append(_tree(tree, int(target), factor))
    return trees


def _tree(tree: Any, target: int, factor: Any) -> Tree:
    left = np.asarray(tree["left_children"], dtype=np.int64)
    right = np.asarray(tree["right_children"], dtype=np.int64)
    values = np.asarray(tree["split_conditions"], dtype=np.float32)
    inner = np.flatnonzero(left >= 0)
    outer = np.flatnonzero(left < 0)
    place = np.empty(len(left), dtype=np.int64)
    place[inner] = np.arange(len(inner))
    place[outer] = ~np.arange(len(outer))
    return Tree(
        feature=np.asarray(tree["split_indices"], dtype=np.int64)[inner],
        threshold=values[inner],
        left=place[left[inner]],
        right=place[right[inner]],
        leaves=values[outer] * factor,
        missing_left=np.asarray(tree["default_left"]).astype(bool)[inner],
        mode=np.full(len(inner), LT),
        target=target,
    )


def _base_margins(
    booster: Any, learner: Any, objective: str, trees: Sequence[Tree], rounds: int | None
) -> Array:
    """What each target's sum starts from, in float32.

    The model's text has the base score after the objective's transformation. Whether and how XGBoost takes
    it back differs by version, to the last bit: formulas and their results' neighbours are tried until one
    reproduces XGBoost's own margins. Where none does (dart), the one that comes nearest is taken.
    """
    parameters = learner["learner_model_param"]
    text = str(parameters["base_score"])
    scores = np.asarray(json.loads(text) if text.startswith("[") else [float(text)], dtype=np.float64)
    targets = max(1, int(parameters.get("num_class", 0)), int(parameters.get("num_target", 1)))
    scores = np.broadcast_to(scores, (targets,))
    with np.errstate(all="ignore"):
        same, logit, logarithm = scores, np.log(scores / (1.0 - scores)), np.log(scores)
    if objective in _LOGISTIC:
        formulas = (logit, same)
    elif objective in _EXPONENTIAL:
        formulas = (logarithm, same)
    else:
        formulas = (same, logit)
    expected, terms = _probe(booster, trees, rounds)
    found = np.zeros(targets, dtype=np.float32)
    for target in range(targets):
        own = [term for tree, term in zip(trees, terms, strict=True) if tree.target == target]
        starts = [np.float32(formula[target]) for formula in formulas if np.isfinite(formula[target])]
        steps = sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs)
        candidates = np.array([_moved(start, step) for start in starts for step in steps], dtype=np.float32)
        totals = np.repeat(candidates[:, np.newaxis], len(expected), axis=1)
        for term in own:
            totals = totals + term
        gaps = np.max(np.abs(totals - expected[:, target]), axis=1)
        found[target] = candidates[int(np.argmin(gaps))]
    return found


def _moved(value: Any, steps: int) -> Any:
    for _ in range(abs(steps)):
        value = np.nextafter(value, np.float32(np.inf if steps > 0 else -np.inf))
    return value


def _probe(booster: Any, trees: Sequence[Tree], rounds: int | None) -> tuple[Array, list[Array]]:
    """Margins (rows, targets) that XGBoost gives some random rows, and each tree's leaf for them."""
    import xgboost

    draw = np.random.default_rng(0)
    data = draw.normal(size=(_PROBE_ROWS, booster.num_features())).astype(np.float32)
    for feature, values in thresholds_of(trees).items():
        data[:, feature] = draw.choice(values, size=_PROBE_ROWS)
    rows = xgboost.DMatrix(data, feature_names=booster.feature_names, feature_types=booster.feature_types)
    whole = quietly(lambda: booster.predict(rows, output_margin=True, iteration_range=(0, rounds or 0)))
    return np.asarray(whole, dtype=np.float32).reshape(_PROBE_ROWS, -1), [_leaf(tree, data) for tree in trees]


def _leaf(tree: Tree, data: Array) -> Array:
    """The leaf value of each row."""
    node = np.zeros(len(data), dtype=np.int64) if len(tree.feature) else np.full(len(data), -1)
    while (node >= 0).any():
        at = np.maximum(node, 0)
        left = data[np.arange(len(data)), tree.feature[at]] < tree.threshold[at]
        node = np.where(node >= 0, np.where(left, tree.left[at], tree.right[at]), node)
    leaves: Array = np.asarray(tree.leaves, dtype=np.float32)[~node]
    return leaves
