"""scikit-learn's linear models, neural networks and other closed formulas, in the dtype numpy gives them."""

from __future__ import annotations

from collections.abc import Callable
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
from parbake.contract.sources.graph import BOOL, DOUBLE, INT64, Array, Graph, Value
from parbake.contract.sources.table import Table, Work, matrix
from parbake.errors import NotConvertible

Estimator = Callable[[Work, Any, Table], Answer]


def _product(work: Work, value: Value, weights: Array, offset: Any) -> Value:
    """``value @ weights + offset`` with weights of shape (columns, k), in the dtype numpy would compute in."""
    graph = work.graph
    offsets = np.asarray(offset).reshape(1, -1)
    dtype = np.result_type(value.dtype, weights.dtype)
    out = graph.op(
        "MatMul",
        graph.cast(value, dtype),
        graph.constant(weights, dtype),
        dtype=dtype,
        width=weights.shape[1],
    )
    final = np.result_type(dtype, offsets.dtype) if offsets.size > 1 or np.ndim(offset) else dtype
    work.loosen(*((1e-9, 1e-9) if final == DOUBLE else (1e-5, 1e-5)))
    work.smooth = True
    out = graph.cast(out, final)
    return graph.op("Add", out, graph.constant(offsets, final)) if np.any(offsets) else out


def _scores(work: Work, model: Any, table: Table) -> Value:
    coefficients = np.atleast_2d(np.asarray(_dense(model.coef_)))
    return _product(work, matrix(work.graph, table), coefficients.T, model.intercept_)


def _dense(array: Any) -> Any:
    return array.toarray() if hasattr(array, "toarray") else array


def _regressor(work: Work, model: Any, table: Table) -> Answer:
    return Answer({"prediction": _scores(work, model, table)})


def _exponential_regressor(work: Work, model: Any, table: Table) -> Answer:
    link = type(model._base_loss.link).__name__
    scores = _scores(work, model, table)
    if link == "LogLink":
        return Answer({"prediction": exponential(work.graph, scores)})
    if link != "IdentityLink":
        raise NotConvertible(f"{type(model).__name__} with {link}")
    return Answer({"prediction": scores})


def _index(graph: Graph, scores: Value) -> Value:
    return above(graph, graph.flat(scores), 0.0) if scores.width == 1 else most(graph, scores)


def _scored(work: Work, model: Any, table: Table) -> Answer:
    """Classifiers that have no probabilities: their label, and how far on which side."""
    graph = work.graph
    _not_multilabel(model)
    scores = _scores(work, model, table)
    score = graph.flat(scores) if scores.width == 1 else scores
    return decided(graph, _index(graph, scores), model.classes_, score=score)


def _one_vs_rest(graph: Graph, scores: Value) -> Value:
    """Logistic of each score; with several classes divided by their sum, all equal where that is zero."""
    each = logistic(graph, scores)
    return two_sided(graph, each) if scores.width == 1 else _shares(graph, each)


def _shares(graph: Graph, each: Value) -> Value:
    total = graph.op("ReduceSum", each, graph.constant([1], INT64), width=1, keepdims=1)
    none = graph.op("Equal", total, graph.constant(0.0, each.dtype), dtype=BOOL)
    share = graph.op("Div", each, total)
    even = graph.constant(1.0 / each.width, each.dtype)
    return graph.op("Where", none, even, share, dtype=each.dtype, width=each.width)


def _logistic_regression(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    scores = _scores(work, model, table)
    scheme = getattr(model, "multi_class", "auto")
    separate = scheme == "ovr" or (scheme in ("auto", "deprecated") and model.solver == "liblinear")
    if scores.width == 1 and scheme == "multinomial":
        probability = softmax(graph, graph.concat([graph.op("Neg", scores), scores]))
    elif scores.width == 1 or separate:
        probability = _one_vs_rest(graph, scores)
    else:
        probability = softmax(graph, scores)
    return decided(graph, _index(graph, scores), model.classes_, probability=probability)


def _sgd_classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    if model.loss == "log_loss":
        scores = _scores(work, model, table)
        return decided(graph, _index(graph, scores), model.classes_, probability=_one_vs_rest(graph, scores))
    if model.loss != "modified_huber":
        return _scored(work, model, table)
    scores = _scores(work, model, table)
    low, high = graph.constant(-1.0, scores.dtype), graph.constant(1.0, scores.dtype)
    shifted = graph.op("Add", graph.op("Clip", scores, low, high), high)
    each = graph.op("Div", shifted, graph.constant(2.0, scores.dtype))
    probability = two_sided(graph, each) if scores.width == 1 else _shares(graph, each)
    return decided(graph, _index(graph, scores), model.classes_, probability=probability)


def _not_multilabel(model: Any) -> None:
    binarizer = getattr(model, "_label_binarizer", None)
    if binarizer is not None and binarizer.y_type_.startswith("multilabel"):
        raise NotConvertible(
            f"{type(model).__name__} with several labels per row",
            hint="one model per label, or --allow-pickle",
        )


def _network(work: Work, model: Any, table: Table) -> Value:
    graph = work.graph
    value = matrix(graph, table)
    last = len(model.coefs_) - 1
    for i, (weights, offsets) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        value = _product(work, value, np.asarray(weights), np.asarray(offsets))
        value = _activated(graph, value, model.activation if i < last else model.out_activation_)
    return value


def _activated(graph: Graph, value: Value, activation: str) -> Value:
    if activation == "identity":
        return value
    if activation == "logistic":
        return logistic(graph, value)
    if activation == "softmax":
        return softmax(graph, value)
    if activation == "exp":
        return exponential(graph, value)
    kinds = {"tanh": "Tanh", "relu": "Relu"}
    if activation not in kinds:
        raise NotConvertible(f"a neural network with the activation {activation}")
    return graph.op(kinds[activation], value)


def _mlp_classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    _not_multilabel(model)
    out = _network(work, model, table)
    if out.width == 1:
        return decided(
            graph, above(graph, graph.flat(out), 0.5), model.classes_, probability=two_sided(graph, out)
        )
    return decided(graph, most(graph, out), model.classes_, probability=out)


def _mlp_regressor(work: Work, model: Any, table: Table) -> Answer:
    return Answer({"prediction": _network(work, model, table)})


def _gaussian_nb(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    value = matrix(graph, table)
    means, variances = np.asarray(model.theta_), np.asarray(model.var_)
    dtype = np.result_type(value.dtype, means.dtype)
    constant = np.log(model.class_prior_) - 0.5 * np.sum(np.log(2.0 * np.pi * variances), axis=1)
    lifted = graph.op("Unsqueeze", graph.cast(value, dtype), graph.constant([1], INT64))
    away = graph.op("Sub", lifted, graph.constant(means, dtype))
    squared = graph.op("Div", graph.op("Mul", away, away), graph.constant(variances, dtype))
    summed = graph.op("ReduceSum", squared, graph.constant([2], INT64), keepdims=0, width=len(means))
    halved = graph.op("Mul", summed, graph.constant(0.5, dtype))
    joint = graph.op(
        "Sub", graph.constant(constant.reshape(1, -1), dtype), halved, dtype=dtype, width=len(means)
    )
    work.loosen(*((1e-9, 1e-9) if dtype == DOUBLE else (1e-4, 1e-4)))
    work.smooth = True
    return decided(graph, most(graph, joint), model.classes_, probability=softmax(graph, joint))


def _k_means(work: Work, model: Any, table: Table) -> Answer:
    """The nearest centre by |c|^2 - 2 x.c, as scikit-learn compares them."""
    graph = work.graph
    value = matrix(graph, table)
    centres = np.asarray(model.cluster_centers_)
    dtype = value.dtype if value.dtype.kind == "f" else DOUBLE
    squares = np.einsum("ij,ij->i", centres, centres)
    distances = _product(
        work, graph.cast(value, dtype), (-2.0 * centres.T).astype(dtype), squares.astype(dtype)
    )
    label = graph.op("ArgMin", distances, dtype=INT64, width=0, axis=1, keepdims=0)
    return Answer({"label": label})


ESTIMATORS: Final[dict[str, Estimator]] = {
    **dict.fromkeys(
        (
            "LinearRegression",
            "Ridge",
            "RidgeCV",
            "Lasso",
            "LassoCV",
            "LassoLars",
            "LassoLarsCV",
            "LassoLarsIC",
            "Lars",
            "LarsCV",
            "ElasticNet",
            "ElasticNetCV",
            "MultiTaskLasso",
            "MultiTaskLassoCV",
            "MultiTaskElasticNet",
            "MultiTaskElasticNetCV",
            "OrthogonalMatchingPursuit",
            "OrthogonalMatchingPursuitCV",
            "BayesianRidge",
            "ARDRegression",
            "HuberRegressor",
            "QuantileRegressor",
            "TheilSenRegressor",
            "SGDRegressor",
            "PassiveAggressiveRegressor",
            "LinearSVR",
        ),
        _regressor,
    ),
    **dict.fromkeys(("PoissonRegressor", "GammaRegressor", "TweedieRegressor"), _exponential_regressor),
    **dict.fromkeys(("LogisticRegression", "LogisticRegressionCV"), _logistic_regression),
    **dict.fromkeys(
        ("LinearSVC", "Perceptron", "PassiveAggressiveClassifier", "RidgeClassifier", "RidgeClassifierCV"),
        _scored,
    ),
    "SGDClassifier": _sgd_classifier,
    "MLPClassifier": _mlp_classifier,
    "MLPRegressor": _mlp_regressor,
    "GaussianNB": _gaussian_nb,
    "KMeans": _k_means,
    "MiniBatchKMeans": _k_means,
}
