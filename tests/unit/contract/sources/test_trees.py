"""Trees as TreeEnsemble: every row takes its leaf, and leaves add up in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import TensorSpec
from parbake.contract.sources.graph import DOUBLE, FLOAT, Dtype, Graph, Value
from parbake.contract.sources.table import Column, Origin, raw_thresholds
from parbake.contract.sources.trees import (
    LEQ,
    LT,
    MEMBER,
    Tree,
    add_sum,
    add_vectors,
    stump,
    thresholds_of,
    through_float32,
)
from parbake.contract.tensors import Tensor

FEATURES = 4


def random_tree(draw: np.random.Generator, size: int, width: int = 0, *, single: bool = False) -> Tree:
    """A tree of that many inner nodes with every mode, with thresholds that rows will hit exactly."""
    left, right = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    free = [(0, 0), (0, 1)]
    for node in range(1, size):
        parent, side = free.pop(draw.integers(len(free)))
        (left if side == 0 else right)[parent] = node
        free += [(node, 0), (node, 1)]
    for leaf, (parent, side) in enumerate(free):
        (left if side == 0 else right)[parent] = ~leaf
    mode = draw.choice([LEQ, LT, MEMBER], size)
    thresholds = np.round(draw.normal(size=size) * 3) / 10
    leaves = draw.normal(size=(len(free), width) if width else len(free))
    if single:
        thresholds, leaves = thresholds.astype(np.float32), leaves.astype(np.float32)
    return Tree(
        feature=np.where(mode == MEMBER, FEATURES - 1, draw.integers(0, FEATURES - 1, size)),
        threshold=thresholds,
        left=left,
        right=right,
        leaves=leaves,
        missing_left=draw.random(size) < 0.5,
        mode=mode,
        members={
            int(n): sorted(set(draw.integers(0, 90, draw.integers(0, 9)).tolist()))
            for n in np.flatnonzero(mode == MEMBER)
        },
        target=int(draw.integers(0, 3)),
    )


def random_rows(draw: np.random.Generator, rows: int, dtype: Dtype = DOUBLE) -> Tensor:
    """Values at thresholds, beside them and missing; the last column holds codes."""
    x = (np.round(draw.normal(size=(rows, FEATURES)) * 3) / 10).astype(dtype)
    beside = draw.integers(0, 4, x.shape)
    x = np.where(
        beside == 1, np.nextafter(x, dtype.type(9)), np.where(beside == 2, np.nextafter(x, dtype.type(-9)), x)
    )
    x[:, -1] = draw.integers(-2, 95, rows)
    x[draw.random(x.shape) < 0.1] = np.nan
    x[0, 0], x[1, 0] = np.inf, -np.inf
    return x


def leaf_of(tree: Tree, row: Tensor) -> int:
    """The leaf of a row, step by step as the docstring of Tree says."""
    node = 0 if len(tree.feature) else -1
    while node >= 0:
        value = row[tree.feature[node]]
        mode = LEQ if tree.mode is None else tree.mode[node]
        if np.isnan(value):
            goes_left = tree.missing_left is not None and bool(tree.missing_left[node])
        elif mode == MEMBER:
            goes_left = float(value) in tree.members[node]
        else:
            goes_left = value <= tree.threshold[node] if mode == LEQ else value < tree.threshold[node]
        node = int(tree.left[node] if goes_left else tree.right[node])
    return ~node


def run(graph: Graph, out: Value, x: Tensor, width: int, *, threads: int = 1) -> Tensor:
    graph.output(out, TensorSpec("y", "FP64" if x.dtype == DOUBLE else "FP32", (width,)))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def graph_of(dtype: Dtype) -> tuple[Graph, Value]:
    return Graph([TensorSpec("x", "FP64" if dtype == DOUBLE else "FP32", (FEATURES,))]), Value(
        "x", dtype, FEATURES
    )


@given(seed=st.integers(0, 2**32), trees=st.integers(1, 6), single=st.booleans())
def test_scalar_leaves_are_exactly_those_of_a_walk_by_hand(seed: int, trees: int, single: bool) -> None:
    draw = np.random.default_rng(seed)
    dtype = FLOAT if single else DOUBLE
    forest = [
        stump(0.5, 1),
        *(random_tree(draw, int(draw.integers(1, 30)), single=single) for _ in range(trees)),
    ]
    x = random_rows(draw, 40, dtype)
    expected = np.zeros((len(x), 3), dtype=dtype)
    for tree in forest:
        for i, row in enumerate(x):
            expected[i, tree.target] += dtype.type(tree.leaves[leaf_of(tree, row)])
    graph, value = graph_of(dtype)
    np.testing.assert_array_equal(run(graph, add_sum(graph, value, forest, 3), x, 3), expected)


@pytest.mark.parametrize(("trees", "width"), [(1, 3), (7, 1), (40, 2), (300, 10), (300, 70)])
def test_vector_leaves_add_up_tree_by_tree_with_any_number_of_threads(trees: int, width: int) -> None:
    draw = np.random.default_rng(trees + width)
    forest = [random_tree(draw, 5, width) for _ in range(trees)]
    start = draw.normal(size=width)
    x = random_rows(draw, 60)
    places = np.array([[leaf_of(tree, row) for tree in forest] for row in x])
    for init in (None, start):
        expected = np.zeros((len(x), width)) if init is None else np.repeat(init[np.newaxis], len(x), axis=0)
        for k, tree in enumerate(forest):
            expected = expected + tree.leaves[places[:, k]]
        for threads in (1, 3):
            graph, value = graph_of(DOUBLE)
            got = run(graph, add_vectors(graph, value, forest, init), x, width, threads=threads)
            np.testing.assert_array_equal(got, expected)


def test_a_number_that_a_float_tree_cannot_hold_is_an_error_not_a_rounding() -> None:
    graph, value = graph_of(FLOAT)
    with pytest.raises(ValueError, match="do not fit float32"):
        add_sum(graph, value, [stump(0.1)], 1)


def test_thresholds_are_listed_by_feature_without_those_of_categories() -> None:
    tree = Tree(
        feature=np.array([1, 3, 1]),
        threshold=np.array([0.5, 0.0, 0.25]),
        left=np.array([1, ~0, ~1]),
        right=np.array([2, ~2, ~3]),
        leaves=np.zeros(4),
        mode=np.array([LEQ, MEMBER, LEQ]),
        members={1: [1.0]},
    )
    assert {feature: values.tolist() for feature, values in thresholds_of([tree, stump(1.0)]).items()} == {
        1: [0.25, 0.5]
    }


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 3))
def test_a_comparison_in_float32_is_the_same_comparison_in_double_at_the_moved_threshold(
    t: float, steps: int
) -> None:
    limit = through_float32(np.array([t]))[0]
    x = np.float64(limit)
    for _ in range(abs(steps)):
        x = np.nextafter(x, np.inf if steps > 0 else -np.inf)
    with np.errstate(over="ignore"):
        assert (float(np.float32(x)) <= t) == (x <= limit)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.sampled_from([np.float64, np.float32, np.int64]),
)
def test_raw_thresholds_are_the_last_values_below_whatever_the_steps_round(
    limits: Sequence[float], mean: float, scale: float, kind: type[np.generic]
) -> None:
    dtype = np.dtype(kind)
    origin = Origin(
        "x", 0, dtype, (lambda raw: (raw.astype(float) - mean) / scale, lambda raw: raw.astype(np.float32))
    )
    found = raw_thresholds([Column(origin)], {0: np.array(limits)})
    for raw in found[("x", 0)]:
        at = np.array([raw]).astype(dtype)
        after = at + 1 if dtype.kind == "i" else np.nextafter(at, dtype.type(np.inf))
        below, above = float(origin.forward(at)[0]), float(origin.forward(after)[0])
        assert any(below <= limit < above for limit in limits)
