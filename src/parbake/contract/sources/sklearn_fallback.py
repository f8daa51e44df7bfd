"""Estimators that are not converted here: skl2onnx's graph of them, spliced in as one piece."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np

from parbake.contract.ort import onnxruntime
from parbake.contract.sources.answer import Answer, decided, quietly
from parbake.contract.sources.graph import DOUBLE, FLOAT, INT64, ML_OPSET, OPSET, Array, Dtype, Graph, Value
from parbake.contract.sources.table import Table, Work, matrix
from parbake.errors import NotConvertible

_PROBE_ROWS: Final = 32
_MOST_GAP: Final = 1e-2
_FINE: Final = 1e-9
_NEWEST_ML: Final = 3
"""Newest ai.onnx.ml operators that skl2onnx writes."""


def add(work: Work, model: Any, table: Table) -> tuple[Answer, bool]:
    """Add an estimator by way of skl2onnx: in double if that runs and agrees with the model, else in float.

    Also says whether it agrees as doubles do (to 1e-9).

    Raises `NotConvertible` where skl2onnx is not installed, does not know the estimator, or writes
    operators that onnxruntime does not run. Whether the answers are close enough is for packing to judge.
    """
    name = type(model).__name__
    if "Neighbors" in name:
        raise NotConvertible(
            f"{name}: which neighbours are nearest turns on the last digit of distances, and no conversion has it",
            hint="pack a module:function that calls it, or --allow-pickle",
        )
    try:
        import skl2onnx  # noqa: F401
    except ImportError:
        raise _refused(name, "skl2onnx, which might know one, is not installed") from None
    count = int(getattr(model, "n_features_in_", table.width))
    reasons: list[str] = []
    for dtype in (DOUBLE, FLOAT):
        try:
            onnx_model = _converted(model, count, dtype)
            gap = _gap(onnx_model, model, count, dtype)
        except Exception as error:
            # skl2onnx and onnxruntime raise whatever they like.
            what = "onnxruntime does not run skl2onnx's graph of it"
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if "shape calculator" in first or "no converter" in first.lower():
                what = "skl2onnx knows none either"
            elif "ONNXRuntimeError" not in first:
                what = f"skl2onnx: {first}"
            reasons.append(what)
            continue
        if gap > _MOST_GAP:
            reasons.append(f"skl2onnx's graph of it in {dtype} answers differently")
            continue
        fine = dtype == DOUBLE and gap < _FINE
        work.loosen(*((_FINE, _FINE) if fine else (1e-4, 1e-4)))
        work.smooth = True
        return _spliced(work, model, table, onnx_model, dtype), fine
    raise _refused(name, reasons[0] if reasons else "")


def _refused(name: str, reason: str) -> NotConvertible:
    text = f"no exact conversion of {name} is known" + (f" ({reason})" if reason else "")
    return NotConvertible(text, hint="pack a module:function that calls it, or --allow-pickle")


def _converted(model: Any, count: int, dtype: Dtype) -> Any:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType

    kind = DoubleTensorType if dtype == DOUBLE else FloatTensorType
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_onnx(
            model,
            initial_types=[("X", kind([None, count]))],
            options={id(model): {"zipmap": False}} if hasattr(model, "classes_") else None,
            target_opset={"": OPSET, "ai.onnx.ml": _NEWEST_ML},
        )


def _gap(onnx_model: Any, model: Any, count: int, dtype: Dtype) -> float:
    """Largest difference on random rows; infinite where a label differs. Raises what onnxruntime raises."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = _with_our_opset(onnx_model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(0).normal(size=(_PROBE_ROWS, count))
    got = [np.asarray(x) for x in session.run(None, {"X": rows.astype(dtype)})]
    expected = [np.asarray(x) for x in _words(model, rows.astype(dtype))]
    gap = 0.0
    # Rows on a border may fall on either side; many of them mean another model.
    most_different = _PROBE_ROWS // 16
    for ours, theirs in zip(got, expected, strict=False):
        if theirs.dtype.kind not in "f":
            named = theirs.astype(np.int64) if theirs.dtype == bool else theirs
            if np.sum(ours.reshape(-1).astype(str) != named.reshape(-1).astype(str)) > most_different:
                return float("inf")
        else:
            if theirs.ndim == 1 and ours.shape[1:] == (2,):
                # Scores of both sides, where scikit-learn gives that of the second.
                ours = ours[:, 1]
            gap = max(gap, float(np.max(np.abs(ours.reshape(theirs.shape) - theirs), initial=0.0)))
    return gap


def _words(model: Any, rows: Array) -> list[Any]:
    def ask() -> list[Any]:
        if hasattr(model, "classes_"):
            second = model.predict_proba if hasattr(model, "predict_proba") else model.decision_function
            return [model.predict(rows), second(rows)]
        if hasattr(model, "predict"):
            return [model.predict(rows)]
        out = model.transform(rows)
        return [out.toarray() if hasattr(out, "toarray") else out]

    answer: list[Any] = quietly(ask)
    return answer


def _with_our_opset(onnx_model: Any) -> Any:
    """The graph under the operator sets of the graph it goes into: what is gone there must not load."""
    from onnx import helper

    graph = onnx_model.graph
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)],
        ir_version=10,
    )


def _spliced(work: Work, model: Any, table: Table, onnx_model: Any, dtype: Dtype) -> Answer:
    graph = work.graph
    value = matrix(graph, table, dtype)
    names = _splice(graph, onnx_model, {onnx_model.graph.input[0].name: value.name})
    outputs = [names[output.name] for output in onnx_model.graph.output]
    rows = np.random.default_rng(0).normal(size=(2, value.width)).astype(dtype)
    shapes = [np.asarray(x).shape for x in _words(model, rows)]
    if hasattr(model, "classes_") and len(outputs) > 1:
        shape = onnx_model.graph.output[1].type.tensor_type.shape.dim
        second = Value(outputs[1], dtype, shape[1].dim_value if len(shape) > 1 else 0)
        label = Value(outputs[0], np.asarray(model.classes_).dtype, 0)
        return _classified(graph, model, label, second, shapes[1])
    if hasattr(model, "classes_"):
        raise _refused(type(model).__name__, "skl2onnx gives labels alone")
    if hasattr(model, "predict"):
        cluster = _words(model, rows)[0].dtype.kind in "iu"
        out = Value(outputs[0], INT64 if cluster else dtype, _width(shapes[0]))
        # skl2onnx gives predictions of one target as (rows, 1).
        wide = graph.op("Reshape", out, graph.constant([-1, *shapes[0][1:]], INT64), width=_width(shapes[0]))
        return Answer({"label" if cluster else "prediction": wide})
    return Answer({"transformed": Value(outputs[0], dtype, _width(shapes[0]))})


def _width(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 0


def _classified(graph: Graph, model: Any, label: Value, second: Value, shape: tuple[int, ...]) -> Answer:
    classes = np.asarray(model.classes_)
    if classes.dtype.kind in "iub":
        ours = graph.constant(classes.reshape(1, -1).astype(np.int64))
    else:
        ours = graph.constant(classes.reshape(1, -1).astype(object))
    # Some labels come as (rows,), some as (rows, 1).
    lifted = graph.op("Reshape", label, graph.constant([-1, 1], INT64), width=1)
    same = graph.cast(graph.op("Equal", lifted, ours, dtype=np.dtype(bool), width=len(classes)), FLOAT)
    index = graph.op("ArgMax", same, dtype=INT64, width=0, axis=1, keepdims=0)
    if hasattr(model, "predict_proba"):
        return decided(graph, index, classes, probability=Value(second.name, second.dtype, shape[1]))
    if len(shape) == 1 and second.width == 2:
        second = graph.take(second, [1])
    score = graph.op("Reshape", second, graph.constant([-1, *shape[1:]], INT64), width=_width(shape))
    return decided(graph, index, classes, score=score)


def _splice(graph: Graph, onnx_model: Any, given: dict[str, str]) -> dict[str, str]:
    """Copy a graph's nodes and initializers under new names; gives the new names by the old."""
    from onnx import AttributeProto, NodeProto, TensorProto

    names = dict(given)

    def renamed(name: str) -> str:
        if not name:
            return name
        if name not in names:
            names[name] = graph.fresh("s")
        return names[name]

    for tensor in onnx_model.graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = renamed(tensor.name)
        graph.initializer(copy)

    def rename(node: Any) -> None:
        node.name = ""
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                # The body of a loop: its own names, and those it takes from outside.
                body = attribute.g
                for named in (*body.input, *body.output, *body.initializer):
                    named.name = renamed(named.name)
                for inner in body.node:
                    rename(inner)

    for node in onnx_model.graph.node:
        copy_node = NodeProto()
        copy_node.CopyFrom(node)
        rename(copy_node)
        graph.node(copy_node)
    return names
