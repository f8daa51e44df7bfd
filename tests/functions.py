"""Bundles of a few lines: a Python function, and a model that multiplies by a number that its answers tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import helper

from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.datatypes import NUMPY
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Step, TensorSpec
from tests import models

X: Final = TensorSpec("x", "FP32", (2,), columns=("left", "right"))
Y: Final = TensorSpec("y", "FP32", (2,))


def write_function(
    folder: Path,
    source: str,
    *,
    name: str = "function",
    inputs: Sequence[TensorSpec] = (X,),
    outputs: Sequence[TensorSpec] = (Y,),
    goldens: Goldens | None = None,
    replace: bool = False,
    **rest: Any,
) -> StoredBundle:
    """Write ``folder/NAME.bundle`` of the function ``predict`` in ``source``; without goldens unless some are given."""

    def nothing(spec: TensorSpec) -> Any:
        return np.empty((0, *(max(size, 0) for size in spec.shape)), NUMPY[spec.datatype])

    contract = Contract(
        name=name,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        steps=(Step("python", "source", "model:predict"),),
        purpose="runs a function",
        **{"owner": "tests@parbake.example", **rest},
    )
    goldens = goldens or Goldens({s.name: nothing(s) for s in inputs}, {s.name: nothing(s) for s in outputs})
    files = {"source/model.py": source.encode()}
    return write_bundle(folder / f"{name}.bundle", contract, files, goldens, capture(), replace=replace)


def write_scaled(
    path: Path,
    factor: float,
    *,
    name: str = "scaled",
    owner: str = "tests@parbake.example",
    replace: bool = False,
    **rest: Any,
) -> StoredBundle:
    """Write a bundle at ``path``: input ``x`` FP32 (2,), output ``y`` = ``factor`` x."""
    onnx = models.model(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        [models.tensor("x", models.FLOAT, ("N", 2))],
        [models.tensor("y", models.FLOAT, ("N", 2))],
        {"factor": np.array(factor, np.float32)},
    )
    contract = Contract(
        name=name,
        inputs=(X,),
        outputs=(Y,),
        steps=(Step("onnx", "model.onnx"),),
        purpose="multiplies",
        owner=owner,
        **rest,
    )
    x = np.array([[1.0, 2.0], [3.0, 4.5]], np.float32)
    goldens = Goldens({"x": x}, {"y": x * np.float32(factor)})
    files = {"model.onnx": onnx.SerializeToString()}
    return write_bundle(path, contract, files, goldens, capture(), replace=replace)


def large_bundle(folder: Path, megabytes: int) -> StoredBundle:
    """A model that takes so much memory and answers with what it is asked."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, megabytes * 1024 * 128)).astype(np.float32)
    onnx = models.model(
        [
            helper.make_node("MatMul", ["x", "w"], ["wide"]),
            helper.make_node("ReduceMax", ["wide"], ["most"], keepdims=1, axes=[1]),
            helper.make_node("Add", ["x", "most"], ["y"]),
        ],
        [models.tensor("x", models.FLOAT, ("N", 2))],
        [models.tensor("y", models.FLOAT, ("N", 2))],
        {"w": weights},
        opset=13,
    )
    contract = Contract("large", (X,), (Y,), (Step("onnx", "model.onnx"),), purpose="is large", owner="test")
    nothing = Goldens({"x": np.empty((0, 2), np.float32)}, {"y": np.empty((0, 2), np.float32)})
    return write_bundle(
        folder / "large.bundle", contract, {"model.onnx": onnx.SerializeToString()}, nothing, capture()
    )
