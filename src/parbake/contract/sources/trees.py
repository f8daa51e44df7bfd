"""Decision trees as values, and their one exact form in ONNX: TreeEnsemble of ai.onnx.ml opset 5.

Older operators keep thresholds and leaves as float32, which moves rows to other leaves. This one keeps
them in the tensors' own datatype: with doubles, every row takes the leaf it takes in the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from parbake.contract.sources.graph import DOUBLE, INT64, ML, Array, Dtype, Graph, Value

LEQ: Final = 0
LT: Final = 1
MEMBER: Final = 6
"""Modes of a node: what sends a row to the left."""

_SUM: Final = 1

# onnxruntime adds up this many rows of a middle axis one after another; beyond, it takes them in lumps.
_GROUP_TREES: Final = 128
_GROUP_ELEMENTS: Final = 4096


@dataclass(frozen=True, slots=True)
class Tree:
    """One binary tree as arrays over its inner nodes; node 0 is the root.

    A row goes left where ``x[feature] <= threshold`` (mode `LEQ`), ``<`` (`LT`) or where ``x[feature]`` is
    one of ``members[node]`` (`MEMBER`), and where it is NaN and ``missing_left``. A child that is not
    negative is an inner node, a negative one is the leaf ``~child``. ``leaves`` holds a value per leaf,
    shape (leaves,), or a vector, shape (leaves, k). A tree of one leaf has no inner nodes.
    """

    feature: Array
    threshold: Array
    left: Array
    right: Array
    leaves: Array
    missing_left: Array | None = None
    mode: Array | None = None
    members: Mapping[int, Sequence[float]] = field(default_factory=dict)
    target: int = 0
    """The output that a scalar leaf is added to."""


def stump(value: float, target: int = 0) -> Tree:
    """A tree of one leaf: a constant that is added in its turn."""
    none = np.zeros(0, dtype=np.int64)
    return Tree(none, np.zeros(0), none, none, np.array([value]), target=target)


def thresholds_of(trees: Sequence[Tree]) -> dict[int, Array]:
    """All thresholds by feature; `MEMBER` nodes have none."""
    features = np.concatenate([tree.feature for tree in trees]) if trees else np.zeros(0, dtype=np.int64)
    values = np.concatenate([np.asarray(tree.threshold, dtype=np.float64) for tree in trees] or [np.zeros(0)])
    plain = np.concatenate([_modes(tree) != MEMBER for tree in trees] or [np.zeros(0, dtype=bool)])
    features, values = features[plain], values[plain]
    return {int(feature): np.unique(values[features == feature]) for feature in np.unique(features)}


def add_sum(graph: Graph, x: Value, trees: Sequence[Tree], targets: int) -> Value:
    """The sum of scalar leaves by target, shape (rows, targets), in ``x``'s dtype and the trees' order.

    onnxruntime adds in order in one thread; with more, the last bits can differ.
    """
    leaves = [np.asarray(tree.leaves).reshape(-1) for tree in trees]
    owners = [np.full(len(leaf), tree.target) for leaf, tree in zip(leaves, trees, strict=True)]
    return _ensemble(graph, x, trees, leaves, owners, targets)


def add_vectors(graph: Graph, x: Value, trees: Sequence[Tree], init: Array | None = None) -> Value:
    """The sum of vector leaves, shape (rows, k), as float64: ``init`` first, then tree by tree.

    The operator has one number per leaf, so trees give the number of the leaf, whose vector is looked up
    and added up outside: one walk for all k, and the same bits with any number of threads.
    """
    table = np.concatenate([np.asarray(tree.leaves, dtype=np.float64) for tree in trees])
    width = table.shape[1]
    starts = np.cumsum([0, *(len(tree.leaves) for tree in trees)])
    numbers = [np.arange(starts[i], starts[i + 1]) for i in range(len(trees))]
    owners = [np.full(len(numbers[i]), i) for i in range(len(trees))]
    found = graph.cast(_ensemble(graph, x, trees, numbers, owners, len(trees)), INT64)
    vectors = graph.constant(table, DOUBLE)
    if len(trees) == 1 and init is None:
        return graph.op("Gather", vectors, graph.flat(found), dtype=DOUBLE, width=width)
    step = max(1, min(_GROUP_TREES, _GROUP_ELEMENTS // width))
    middle = graph.constant([1], INT64)
    total: Value | None = None
    if init is not None:
        # A constant row becomes one per row of x by way of a leaf number times zero.
        first = graph.op("Gather", found, graph.constant([0], INT64), axis=1, width=1)
        zero = graph.op("Mul", first, graph.constant([[0]], INT64))
        start = graph.constant(np.asarray(init, dtype=np.float64).reshape(1, width), DOUBLE)
        total = graph.op("Gather", start, graph.flat(zero), dtype=DOUBLE, width=width)
    for at in range(0, len(trees), step):
        part = graph.take(found, range(at, min(at + step, len(trees))))
        rows = graph.op("Gather", vectors, part, dtype=DOUBLE, width=width)
        if total is not None:
            lifted = graph.op("Unsqueeze", total, middle, width=width)
            rows = graph.op("Concat", lifted, rows, axis=1, width=width)
        total = graph.op("ReduceSum", rows, middle, width=width, keepdims=0)
    if total is None:
        raise ValueError("no trees")
    return total


def _ensemble(
    graph: Graph,
    x: Value,
    trees: Sequence[Tree],
    leaves: Sequence[Array],
    owners: Sequence[Array],
    targets: int,
) -> Value:
    from onnx import helper, numpy_helper

    columns: dict[str, list[Array]] = {}
    members: list[float] = []
    roots: list[int] = []
    weights: list[Array] = []
    targetids: list[Array] = []
    nodes = 0
    count = 0
    for tree, leaf, owner in zip(trees, leaves, owners, strict=True):
        roots.append(nodes)
        size = len(tree.feature)
        if size == 0:
            # The operator has no tree without a node: one whose two leaves are the same.
            tree = Tree(np.zeros(1, np.int64), np.zeros(1), np.array([~0]), np.array([~1]), tree.leaves)
            leaf, owner = np.repeat(leaf, 2), np.repeat(owner, 2)
            size = 1
        modes, splits = _modes(tree), np.asarray(tree.threshold, dtype=np.float64)
        # The operator has no empty set: nothing is below minus infinity either.
        empty = np.array([mode == MEMBER and not tree.members[n] for n, mode in enumerate(modes.tolist())])
        modes, splits = np.where(empty, LT, modes), np.where(empty, -np.inf, splits)
        for side, child in (("true", tree.left), ("false", tree.right)):
            is_leaf = child < 0
            ids = np.where(is_leaf, ~child + count, child + nodes)
            columns.setdefault(f"nodes_{side}nodeids", []).append(ids)
            columns.setdefault(f"nodes_{side}leafs", []).append(is_leaf.astype(np.int64))
        columns.setdefault("nodes_featureids", []).append(tree.feature)
        columns.setdefault("splits", []).append(np.where(modes == MEMBER, 0.0, splits))
        columns.setdefault("modes", []).append(modes)
        tracks = np.zeros(size, bool) if tree.missing_left is None else tree.missing_left
        columns.setdefault("tracks", []).append(tracks)
        for node in np.flatnonzero(modes == MEMBER).tolist():
            members.extend([*tree.members[node], float("nan")])
        weights.append(leaf)
        targetids.append(owner)
        nodes += size
        count += len(leaf)
    flat = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    attributes: dict[str, Any] = {
        name: values.astype(np.int64).tolist() for name, values in flat.items() if name.startswith("nodes_")
    }
    if flat["tracks"].any():
        attributes["nodes_missing_value_tracks_true"] = flat["tracks"].astype(np.int64).tolist()
    if members:
        attributes["membership_values"] = numpy_helper.from_array(np.asarray(members, dtype=x.dtype))
    name = graph.fresh("trees")
    graph.node(
        helper.make_node(
            "TreeEnsemble",
            [x.name],
            [name],
            domain=ML,
            n_targets=targets,
            aggregate_function=_SUM,
            tree_roots=roots,
            nodes_splits=numpy_helper.from_array(_as(flat["splits"], x.dtype)),
            nodes_modes=numpy_helper.from_array(flat["modes"].astype(np.uint8)),
            leaf_weights=numpy_helper.from_array(_as(np.concatenate(weights), x.dtype)),
            leaf_targetids=np.concatenate(targetids).astype(np.int64).tolist(),
            **attributes,
        )
    )
    return Value(name, x.dtype, targets)


def _modes(tree: Tree) -> Array:
    return np.full(len(tree.feature), LEQ, dtype=np.int64) if tree.mode is None else np.asarray(tree.mode)


def _as(values: Array, dtype: Dtype) -> Array:
    """The numbers in the operator's dtype. Raises ValueError where that would change one."""
    converted = np.asarray(values).astype(dtype)
    if not np.array_equal(converted.astype(np.float64), np.asarray(values, dtype=np.float64), equal_nan=True):
        raise ValueError(f"trees whose numbers do not fit {dtype}")
    return converted


def through_float32(thresholds: Array) -> Array:
    """For each t the largest double x with ``float32(x) <= t``: the comparison, cast included, as one on doubles.

    A double halfway between two neighbouring float32 goes to the even one, so whether the midpoint itself
    still passes depends on the last bit of the lower neighbour.
    """
    values = np.asarray(thresholds, dtype=np.float64)
    with np.errstate(over="ignore"):
        below = values.astype(np.float32)
        below = np.where(below.astype(np.float64) > values, np.nextafter(below, np.float32(-np.inf)), below)
        above = np.nextafter(below, np.float32(np.inf))
    # Beyond the largest float32 a double rounds as if the next one existed.
    next_up = np.where(np.isinf(above), 2.0**128, above.astype(np.float64))
    middle = (below.astype(np.float64) + next_up) / 2.0
    even = (below.view(np.uint32) & 1) == 0
    limit = np.where(even, middle, np.nextafter(middle, -np.inf))
    return np.where(
        np.isinf(values), values, np.where(below == np.float32(-np.inf), -(2.0**128 - 2.0**103), limit)
    )
