"""Small bundles to bake with, and tables of rows that fit them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from onnx import ModelProto, helper

from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.key import Keys
from parbake.contract.model import Batch, Contract, Key, Step, TensorSpec, Tolerance
from parbake.contract.record import Records
from parbake.contract.tensors import Tensors, row_slices, to_raw
from parbake.runtime.session import Session
from tests.models import BOOL, FLOAT, INT64, STRING, linear, model, tensor


def onnx_bundle(
    path: Path,
    proto: ModelProto,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    golden: Tensors,
    *,
    key: Key | None = None,
    batch: Batch | None = None,
) -> StoredBundle:
    """A bundle of an ONNX graph; its goldens are what it answers here."""
    return _bundle(
        path,
        {"model.onnx": proto.SerializeToString()},
        Step("onnx", "model.onnx"),
        inputs,
        outputs,
        golden,
        key,
        batch,
    )


def python_bundle(
    path: Path, source: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], golden: Tensors
) -> StoredBundle:
    """A bundle of a function ``predict`` in a module of this source."""
    files = {"source/model.py": source.encode()}
    return _bundle(
        path, files, Step("python", "source", "model:predict"), inputs, outputs, golden, None, None
    )


def linear_bundle(path: Path, *, width: int = 4, key: Key | None = None) -> StoredBundle:
    """``y = x w + b`` of the columns c0, c1, ...: one matrix input; bits depend on the company of a lone row."""
    columns = tuple(f"c{i}" for i in range(width))
    return onnx_bundle(
        path,
        linear(width),
        (TensorSpec("x", "FP32", (width,), columns=columns),),
        (TensorSpec("y", "FP32", (2,)),),
        {"x": np.random.default_rng(1).normal(size=(5, width)).astype(np.float32)},
        key=key,
        batch=Batch(invariant_from=2),
    )


def mixed_bundle(path: Path) -> StoredBundle:
    """Columns of all kinds, and a text among the outputs, so that records differ in size."""
    proto = model(
        [
            helper.make_node("Identity", ["city"], ["echo"]),
            helper.make_node("Cast", ["rooms"], ["r"], to=FLOAT),
            helper.make_node("Cast", ["sold"], ["s"], to=FLOAT),
            helper.make_node("Add", ["area", "r"], ["a"]),
            helper.make_node("Add", ["a", "s"], ["sum"]),
        ],
        [tensor(name, kind, ("N", 1)) for name, kind in (("city", STRING), ("area", FLOAT), ("rooms", INT64))]
        + [tensor("sold", BOOL, ("N", 1))],
        [tensor("sum", FLOAT, ("N", 1)), tensor("echo", STRING, ("N", 1))],
    )
    golden = {
        "city": np.array([["Ulm"], ["Köln"]], dtype=object),
        "area": np.array([[1.5], [2.0]], dtype=np.float32),
        "rooms": np.array([[3], [4]], dtype=np.int64),
        "sold": np.array([[True], [False]]),
    }
    inputs = (
        TensorSpec("city", "BYTES", (1,)),
        TensorSpec("area", "FP32", (1,)),
        TensorSpec("rooms", "INT64", (1,)),
        TensorSpec("sold", "BOOL", (1,)),
    )
    outputs = (TensorSpec("sum", "FP32", (1,)), TensorSpec("echo", "BYTES", (1,)))
    return onnx_bundle(path, proto, inputs, outputs, golden)


def summing_bundle(path: Path) -> StoredBundle:
    """The sum of a list of any length."""
    proto = model(
        [helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=0)],
        [tensor("x", FLOAT, ("N", "K"))],
        [tensor("y", FLOAT, ("N",))],
        {"axis": np.array([1], dtype=np.int64)},
    )
    golden = {"x": np.array([[1.0, 2.0, 3.0]], dtype=np.float32)}
    return onnx_bundle(path, proto, (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", ()),), golden)


def linear_rows(rows: int, *, width: int = 4, seed: int = 0) -> pa.Table:
    """Random rows for `linear_bundle`."""
    values = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return pa.table({f"c{i}": values[:, i] for i in range(width)})


def expected(bundle: StoredBundle, inputs: Tensors) -> dict[bytes, bytes]:
    """Key and record of each row, computed with the session, one row at a time."""
    contract = bundle.contract
    session, keys, records = Session(bundle), Keys(contract), Records(contract)
    found: dict[bytes, bytes] = {}
    for at in range(len(next(iter(inputs.values())))):
        row = {name: values[at : at + 1] for name, values in inputs.items()}
        outputs = session.run(row)
        raws = [to_raw(row[spec.name], spec.datatype) for spec in contract.inputs]
        (key,) = keys.of(raws, 1, [row[spec.name].shape[1:] for spec in contract.inputs])
        slices = [
            row_slices(to_raw(outputs[s.name], s.datatype), s.datatype, 1, outputs[s.name].size)[0]
            for s in contract.outputs
        ]
        found[key] = records.join(slices, [outputs[spec.name].shape[1:] for spec in contract.outputs])
    return found


def _bundle(
    path: Path,
    files: Mapping[str, bytes],
    step: Step,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    golden: Tensors,
    key: Key | None,
    batch: Batch | None,
) -> StoredBundle:
    contract = Contract(
        name=path.stem,
        inputs=inputs,
        outputs=outputs,
        steps=(step,),
        purpose="to be baked",
        owner="tests@parbake.example",
        key=key or Key(),
        batch=batch or Batch(),
        tolerance=Tolerance(1e-5, 1e-5),
    )
    none: dict[str, Any] = {spec.name: np.zeros((0, *spec.shape)) for spec in outputs}
    empty = Goldens({name: values[:0] for name, values in golden.items()}, none)
    draft = write_bundle(path.with_suffix(".draft"), contract, files, empty, capture(), replace=True)
    return write_bundle(
        path, contract, files, Goldens(golden, Session(draft).run(golden)), capture(), replace=True
    )
