"""Bundles whose answer is known beforehand: each input comes back as it went in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper

from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.datatypes import NUMPY
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Step, TensorSpec

ONNX_TYPES: Final = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip


def write_echo(folder: Path, name: str, inputs: Sequence[TensorSpec], **rest: Any) -> StoredBundle:
    """Write ``folder/NAME.bundle``: input ``x`` is answered as ``x_out``. ``rest`` goes into the contract."""

    def value(spec: TensorSpec, suffix: str = "") -> Any:
        shape = ["N", *(size if size >= 0 else f"{spec.name}_{i}" for i, size in enumerate(spec.shape))]
        return helper.make_tensor_value_info(spec.name + suffix, ONNX_TYPES[spec.datatype], shape)

    def golden(spec: TensorSpec) -> Any:
        shape = (1, *(max(size, 1) for size in spec.shape))
        return (
            np.full(shape, "text", object)
            if spec.datatype == "BYTES"
            else np.zeros(shape, NUMPY[spec.datatype])
        )

    graph = helper.make_graph(
        [helper.make_node("Identity", [spec.name], [f"{spec.name}_out"]) for spec in inputs],
        name,
        [value(spec) for spec in inputs],
        [value(spec, "_out") for spec in inputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    contract = Contract(
        name=name,
        inputs=tuple(inputs),
        outputs=tuple(
            TensorSpec(
                f"{spec.name}_out", spec.datatype, spec.shape, labels=spec.columns, allow_nan=spec.allow_nan
            )
            for spec in inputs
        ),
        steps=(Step("onnx", "model.onnx"),),
        purpose="answers what it is asked",
        owner="tests@parbake.example",
        **rest,
    )
    goldens = Goldens(
        {spec.name: golden(spec) for spec in inputs}, {f"{spec.name}_out": golden(spec) for spec in inputs}
    )
    files = {"model.onnx": model.SerializeToString()}
    return write_bundle(folder / f"{name}.bundle", contract, files, goldens, capture())
