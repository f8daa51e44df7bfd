"""The models that are served while something breaks: a few lines each, whose every answer is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from chaos.load import Stream
from parbake.app.bake import bake
from parbake.contract.bundle import Goldens, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Step, TensorSpec

_X: Final = TensorSpec("x", "FP32", (2,), columns=("left", "right"))
_Y: Final = TensorSpec("y", "FP32", (2,))
_OWNER: Final = "chaos@parbake.example"

Row = tuple[float, float]

BAKED: Final[tuple[Row, ...]] = tuple((float(i), 1.0) for i in range(16))
TAIL: Final[tuple[Row, ...]] = tuple((float(i), 2.0) for i in range(100, 164))
POISON: Final[Row] = (666.0, 1.0)


def multiplier(path: Path, factor: float, *, name: str, replace: bool = False, **rest: Any) -> Path:
    """A bundle of an ONNX graph: input ``x`` FP32 (2,), output ``y`` = ``factor`` x."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    x = np.array([[1.0, 2.0], [3.0, 4.5]], np.float32)
    contract = Contract(
        name=name,
        inputs=(_X,),
        outputs=(_Y,),
        steps=(Step("onnx", "model.onnx"),),
        purpose="multiplies",
        owner=_OWNER,
        **rest,
    )
    goldens = Goldens({"x": x}, {"y": x * np.float32(factor)})
    files = {"model.onnx": model.SerializeToString()}
    return write_bundle(path, contract, files, goldens, capture(), replace=replace).path


def function(path: Path, source: str, *, name: str) -> Path:
    """A bundle of the Python function ``predict`` in ``source``, which doubles ``x`` where nothing is the matter."""
    contract = Contract(
        name=name,
        inputs=(_X,),
        outputs=(_Y,),
        steps=(Step("python", "source", "model:predict"),),
        purpose="runs a function",
        owner=_OWNER,
    )
    x = np.array([[1.0, 2.0]], np.float32)
    goldens = Goldens({"x": x}, {"y": 2 * x})
    return write_bundle(path, contract, {"source/model.py": source.encode()}, goldens, capture()).path


def table(bundle: Path, out: Path, rows: Sequence[Row] = BAKED, *, replace: bool = False) -> Path:
    """A prediction table of these rows."""
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"left": left, "right": right}) + "\n" for left, right in rows))
    bake(bundle, source, out, workers=1, replace=replace)
    return out


def body(*rows: Row) -> bytes:
    """A request of the Open Inference Protocol."""
    data = [value for row in rows for value in row]
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(rows), 2], "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


def asking(
    stream: str, model: str, rows: Sequence[Row], *factors: float, connections: int = 2, **rest: Any
) -> Stream:
    """Callers of a model for these rows, one at a time; right is the row times one of the factors."""
    return Stream(
        stream,
        f"/v2/models/{model}/infer",
        tuple(body(row) for row in rows),
        tuple(tuple((factor * left, factor * right) for factor in factors) for left, right in rows),
        connections=connections,
        **rest,
    )
