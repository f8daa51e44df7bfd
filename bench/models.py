"""The models that are served, from microseconds to milliseconds; packed, with rows to ask for and a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import parbake
from bench.resnet import write_resnet
from parbake.app.bake import bake
from parbake.contract.bundle import read_bundle
from parbake.runtime.session import Session

FEATURES: Final = 10
_SEED: Final = 7

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Packed:
    """A model as a bundle named ``eta``: one FP32 matrix input ``x`` with ten columns, one output."""

    what: str
    bundle: Path
    table: Path
    """Holds the prediction of every one of ``rows``."""
    onnx: Path
    """The graph in the bundle, for peers."""
    rows: Rows
    bodies: tuple[bytes, ...]
    """One row each, as a request of the Open Inference Protocol."""
    answers: list[list[Any]]
    """The values of the output for each row."""
    row_us: float
    """Median time of one row in the session, in this process."""


def logistic_regression(folder: Path, rows: int) -> Packed:
    """Ten features, two probabilities: what is around the model is all that costs."""
    random = np.random.default_rng(_SEED)
    weights, bias = random.normal(size=(FEATURES, 2)), random.normal(size=2)
    return _pack_onnx("logistic regression, 10 features", folder, [(weights, bias)], "Softmax", rows)


def network(folder: Path, rows: int) -> Packed:
    """Three dense layers: about a tenth of a millisecond for a row on its own, far less in company."""
    random = np.random.default_rng(_SEED)
    sizes = (FEATURES, 512, 512, 2)
    layers = [(random.normal(size=(i, o)) * np.sqrt(2 / i), np.zeros(o)) for i, o in pairwise(sizes)]
    return _pack_onnx("MLP, 10 x 512 x 512 x 2", folder, layers, "Softmax", rows)


def forest(folder: Path, rows: int) -> Packed:
    """A RandomForest of scikit-learn, converted to double thresholds when packed."""
    from sklearn.ensemble import RandomForestRegressor

    random = np.random.default_rng(_SEED)
    x = _rows(2000)
    y = x @ random.normal(size=FEATURES) + np.sin(3 * x[:, 0])
    model = RandomForestRegressor(100, max_depth=8, random_state=0).fit(x, y)
    return _finish("forest, 100 trees of depth 8", folder, model, rows)


def resnet(folder: Path, rows: int) -> Packed:
    """A convolution network of about ten milliseconds a row: next to it, a server costs nothing."""
    folder.mkdir(parents=True)
    write_resnet(folder / "model.onnx", FEATURES)
    return _finish("network like ResNet-18", folder, folder / "model.onnx", rows, examples=4, calls=20)


def _pack_onnx(
    what: str,
    folder: Path,
    layers: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    last: str,
    rows: int,
) -> Packed:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], []
    name = "x"
    for i, (weight, bias) in enumerate(layers):
        weights += [
            numpy_helper.from_array(weight.astype(np.float32), f"w{i}"),
            numpy_helper.from_array(bias.astype(np.float32), f"b{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], [f"z{i}"]))
        done = i == len(layers) - 1
        name = "p" if done else f"a{i}"
        nodes.append(helper.make_node(last if done else "Relu", [f"z{i}"], [name]))
    graph = helper.make_graph(
        nodes,
        "eta",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", layers[-1][0].shape[1]])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    return _finish(what, folder, folder / "model.onnx", rows)


def _finish(
    what: str, folder: Path, model: Any, count: int, *, examples: int = 256, calls: int = 200
) -> Packed:
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(count)
    bundle = parbake.pack(
        model,
        name="eta",
        example={"x": rows[:examples]} if isinstance(model, Path) else rows[:examples],
        purpose="measured by bench/",
        owner="bench@parbake.example",
        out=folder / "eta.bundle",
    )
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), FEATURES)
    pq.write_table(pa.table({"x": lists}), folder / "rows.parquet")
    bake(bundle.path, folder / "rows.parquet", folder / "eta.table", workers=1)
    stored = read_bundle(bundle.path)
    (output,) = bundle.contract.outputs
    answers = np.asarray(bundle.predict({"x": rows})[output.name]).reshape(count, -1).tolist()
    return Packed(
        what,
        bundle.path,
        folder / "eta.table",
        stored.file(bundle.contract.steps[0].path),
        rows,
        tuple(_body(row) for row in rows),
        answers,
        _row_us(Session(stored), rows, calls),
    )


def _rows(count: int) -> Rows:
    """Distinct rows with few digits, as people have them."""
    random = np.random.default_rng(_SEED)
    return np.unique(random.normal(size=(count, FEATURES)).round(3).astype(np.float32), axis=0)


def _body(row: Rows) -> bytes:
    # The shortest decimals that are this float32, not the longer ones of its float64.
    data = [float(str(value)) for value in row]
    return msgspec.json.encode(
        {"inputs": [{"name": "x", "shape": [1, len(row)], "datatype": "FP32", "data": data}]}
    )


def _row_us(session: Session, rows: Rows, calls: int) -> float:
    times: list[float] = []
    for i in range(calls):
        started = time.perf_counter()
        session.run({"x": rows[i % len(rows)][np.newaxis]})
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e6
