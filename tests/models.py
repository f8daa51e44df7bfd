"""Small ONNX models that tests build, each a few lines of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from parbake.contract.tensors import Tensor

FLOAT, DOUBLE, HALF = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16
INT64, INT32, BOOL, STRING = TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.STRING

Shape = Sequence[int | str | None]


def tensor(name: str, kind: int, shape: Shape | None = ("N",)) -> ValueInfoProto:
    """An input or output; a str in its shape is a symbol, None for ``shape`` leaves it unsaid."""
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: Sequence[Any],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    weights: Mapping[str, Tensor] | None = None,
    *,
    opset: int = 20,
    ml: int | None = None,
) -> ModelProto:
    """A model of these nodes; ``ml`` adds the ai.onnx.ml operators of that version."""
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", opset)]
    if ml is not None:
        opsets.append(helper.make_opsetid("ai.onnx.ml", ml))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def linear(width: int = 4, kind: int = FLOAT, batch: int | str = "N") -> ModelProto:
    """``y = x w + b``: x [N, width], y [N, 2]."""
    rng = np.random.default_rng(5)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = {"w": rng.normal(size=(width, 2)).astype(dtype), "b": rng.normal(size=2).astype(dtype)}
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])],
        [tensor("x", kind, (batch, width))],
        [tensor("y", kind, (batch, 2))],
        weights,
    )


def linear_classifier(width: int = 30, *, zipmap: bool = False, texts: bool = False) -> ModelProto:
    """ai.onnx.ml LinearClassifier with three classes, which converters of linear models write."""
    rng = np.random.default_rng(5)
    classes: dict[str, Any] = (
        {"classlabels_strings": ["a", "b", "c"]} if texts else {"classlabels_ints": [0, 1, 2]}
    )
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", post_transform="SOFTMAX",
            coefficients=rng.normal(size=3 * width).tolist(), intercepts=rng.normal(size=3).tolist(), **classes,
        ),
        helper.make_node("Normalizer", ["scores"], ["p"], domain="ai.onnx.ml", norm="L1"),
    ]  # fmt: skip
    label = tensor("label", STRING if texts else INT64, ("N",))
    if not zipmap:
        return model(nodes, [tensor("x", FLOAT, ("N", width))], [label, tensor("p", FLOAT, ("N", 3))], ml=3)
    maps = {"classlabels_strings": ["a", "b", "c"]} if texts else {"classlabels_int64s": [0, 1, 2]}
    nodes.append(helper.make_node("ZipMap", ["p"], ["probability"], domain="ai.onnx.ml", **maps))
    key = STRING if texts else INT64
    value = helper.make_map_type_proto(key, helper.make_tensor_type_proto(FLOAT, []))
    out = helper.make_value_info("probability", helper.make_sequence_type_proto(value))
    return model(nodes, [tensor("x", FLOAT, ("N", width))], [label, out], ml=3)


def forest(trees: int, width: int = 6, *, depth: int = 4, seed: int = 0) -> ModelProto:
    """ai.onnx.ml TreeEnsembleRegressor of full trees with random thresholds: x [N, width], y [N, 1]."""
    rng = np.random.default_rng(seed)
    inner, leaves = 2**depth - 1, 2**depth
    count = inner + leaves
    nodes: dict[str, list[Any]] = {
        "treeids": [], "nodeids": [], "featureids": [], "values": [], "modes": [], "truenodeids": [],
        "falsenodeids": [], "hitrates": [], "missing_value_tracks_true": [],
    }  # fmt: skip
    targets: dict[str, list[Any]] = {"treeids": [], "nodeids": [], "ids": [], "weights": []}
    for tree in range(trees):
        for node in range(count):
            leaf = node >= inner
            nodes["treeids"].append(tree)
            nodes["nodeids"].append(node)
            nodes["featureids"].append(0 if leaf else int(rng.integers(width)))
            nodes["values"].append(0.0 if leaf else float(np.float32(rng.normal())))
            nodes["modes"].append("LEAF" if leaf else "BRANCH_LEQ")
            nodes["truenodeids"].append(0 if leaf else 2 * node + 1)
            nodes["falsenodeids"].append(0 if leaf else 2 * node + 2)
            nodes["hitrates"].append(1.0)
            nodes["missing_value_tracks_true"].append(0)
            if leaf:
                targets["treeids"].append(tree)
                targets["nodeids"].append(node)
                targets["ids"].append(0)
                targets["weights"].append(float(rng.normal()))
    attributes: dict[str, Any] = {f"nodes_{name}": values for name, values in nodes.items()}
    attributes |= {f"target_{name}": values for name, values in targets.items()}
    node = helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        n_targets=1,
        post_transform="NONE",
        **attributes,
    )
    return model([node], [tensor("x", FLOAT, ("N", width))], [tensor("y", FLOAT, ("N", 1))], ml=3)
