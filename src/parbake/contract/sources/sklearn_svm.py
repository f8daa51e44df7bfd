"""scikit-learn's support vector machines: the kernel with each support vector, in double as libsvm has it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any, Final

import numpy as np

from parbake.contract.sources.answer import Answer, above, decided, most
from parbake.contract.sources.graph import BOOL, DOUBLE, INT64, Array, Graph, Value
from parbake.contract.sources.table import Table, Work, matrix
from parbake.errors import NotConvertible

Estimator = Callable[[Work, Any, Table], Answer]


def _dense(array: Any) -> Array:
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array, dtype=np.float64)


def _kernel(work: Work, model: Any, table: Table) -> Value:
    """The kernel of each row with each support vector, shape (rows, vectors)."""
    graph = work.graph
    if model.kernel not in ("linear", "poly", "rbf", "sigmoid"):
        raise NotConvertible(
            f"{type(model).__name__} with the kernel {model.kernel}",
            hint="pack a module:function, or --allow-pickle",
        )
    # Weights may be large and of both signs, so that their sums lose digits.
    work.loosen(1e-6, 1e-6)
    work.smooth = True
    x = matrix(graph, table, DOUBLE)
    vectors = _dense(model.support_vectors_)
    product = graph.op("MatMul", x, graph.constant(vectors.T), width=len(vectors))
    if model.kernel == "linear":
        return product
    gamma = graph.constant(float(model._gamma))
    if model.kernel == "rbf":
        own = graph.op("ReduceSumSquare", x, graph.constant([1], INT64), width=1, keepdims=1)
        theirs = graph.constant(np.einsum("ij,ij->i", vectors, vectors).reshape(1, -1))
        both = graph.op("Add", own, theirs, width=len(vectors))
        squared = graph.op("Sub", both, graph.op("Mul", product, graph.constant(2.0)))
        # Rounding can leave a distance a little below nothing.
        distance = graph.op("Max", squared, graph.constant(0.0))
        return graph.op("Exp", graph.op("Neg", graph.op("Mul", distance, gamma)))
    inner = graph.op("Add", graph.op("Mul", product, gamma), graph.constant(float(model.coef0)))
    if model.kernel == "sigmoid":
        return graph.op("Tanh", inner)
    return graph.op("Pow", inner, graph.constant(float(model.degree)))


def _weighted(graph: Graph, kernel: Value, weights: Array, offset: Any) -> Value:
    """``kernel @ weights + offset`` with weights of shape (vectors, k)."""
    out = graph.op("MatMul", kernel, graph.constant(weights), width=weights.shape[1])
    return graph.op("Add", out, graph.constant(np.asarray(offset, dtype=np.float64).reshape(1, -1)))


def _regressor(work: Work, model: Any, table: Table) -> Answer:
    kernel = _kernel(work, model, table)
    return Answer({"prediction": _weighted(work.graph, kernel, _dense(model.dual_coef_).T, model.intercept_)})


def _one_class(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    kernel = _kernel(work, model, table)
    score = graph.flat(_weighted(graph, kernel, _dense(model.dual_coef_).T, model.intercept_))
    return Answer(
        {"label": decided(graph, above(graph, score, 0.0), [-1, 1]).values["label"], "score": score}
    )


def _classifier(work: Work, model: Any, table: Table) -> Answer:
    graph = work.graph
    classes = np.asarray(model.classes_)
    kernel = _kernel(work, model, table)
    duals = _dense(model.dual_coef_)
    if len(classes) == 2:
        score = graph.flat(_weighted(graph, kernel, duals.T, model.intercept_))
        return decided(graph, above(graph, score, 0.0, inclusive=True), classes, score=score)
    pairs = list(combinations(range(len(classes)), 2))
    votes, decisions = _duels(graph, model, kernel, duals, pairs)
    if model.decision_function_shape == "ovo":
        return decided(graph, most(graph, votes), classes, score=decisions)
    # Scores of one against the rest count votes: they jump where the label does, and say no more than it.
    ranks = _with_confidences(graph, votes, decisions, pairs) if model.break_ties else votes
    return Answer({"label": decided(graph, most(graph, ranks), classes).values["label"]})


def _with_confidences(graph: Graph, votes: Value, decisions: Value, pairs: list[tuple[int, int]]) -> Value:
    """Votes, with sums of confidences between equal ones, scaled so that they never outweigh a vote."""
    sides = np.zeros((len(pairs), votes.width))
    for k, (i, j) in enumerate(pairs):
        sides[k, i], sides[k, j] = 1.0, -1.0
    sums = graph.op("MatMul", decisions, graph.constant(sides), width=votes.width)
    size = graph.op("Add", graph.op("Abs", sums), graph.constant(1.0))
    return graph.op("Add", votes, graph.op("Div", sums, graph.op("Mul", size, graph.constant(3.0))))


def _duels(
    graph: Graph, model: Any, kernel: Value, duals: Array, pairs: list[tuple[int, int]]
) -> tuple[Value, Value]:
    """Votes by class and decisions by pair: positive for the first of the two."""
    ends = np.cumsum([0, *np.asarray(model.n_support_).tolist()])
    weights = np.zeros((kernel.width, len(pairs)))
    for k, (i, j) in enumerate(pairs):
        first, second = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
        weights[first, k] = duals[j - 1, first]
        weights[second, k] = duals[i, second]
    decisions = _weighted(graph, kernel, weights, model.intercept_)
    won = graph.cast(graph.op("Greater", decisions, graph.constant(0.0), dtype=BOOL), DOUBLE)
    # A vote for the first is one less for the second, which starts with one for each of its duels.
    gain = np.zeros((len(pairs), len(model.classes_)))
    start = np.zeros((1, len(model.classes_)))
    for k, (i, j) in enumerate(pairs):
        gain[k, i], gain[k, j] = 1.0, -1.0
        start[0, j] += 1.0
    votes = graph.op("MatMul", won, graph.constant(gain), width=len(model.classes_))
    return graph.op("Add", votes, graph.constant(start)), decisions


ESTIMATORS: Final[dict[str, Estimator]] = {
    "SVR": _regressor,
    "NuSVR": _regressor,
    "OneClassSVM": _one_class,
    "SVC": _classifier,
    "NuSVC": _classifier,
}
