"""A network that takes as long as one wants: convolutions one after another, the same for each row."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

import parbake
from parbake.app.measure import batch_of, examples_of
from parbake.contract.bundle import Goldens, StoredBundle, read_bundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Batch, Contract, Step, TensorSpec, Tolerance
from parbake.runtime import cpu
from parbake.runtime.session import Session

_FEATURES: Final = 10
_SIDE: Final = 32
_CHANNELS: Final = 32
_SEED: Final = 7

_TRIED: Final = 7
"""Convolutions that are tried first to see how long one takes."""
_TRIES: Final = 3
_CALLS: Final = 100

Rows = npt.NDArray[np.float32]


def packed_network(
    folder: Path,
    layers: int,
    example: Rows,
    seed: int = _SEED,
    freshness_s: float | None = None,
    *,
    single: bool = False,
    proved: bool = True,
) -> StoredBundle:
    """A network that takes the longer the more convolutions it has, for each row alike.

    A ``single`` one is exported for one row at a time, as large networks often are. Its bundle is without the proof
    that packing gives, as is one that need not be ``proved``: to run a slow model thousands of times takes minutes.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    weights: list[Any] = []

    def tensor(name: str, value: npt.NDArray[Any]) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def normal(name: str, *shape: int) -> str:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return tensor(name, (random.normal(size=shape) * scale).astype(np.float32))

    nodes: list[Any] = []
    name = "x"
    if layers:
        pixels = _SIDE * _SIDE
        nodes += [
            helper.make_node("MatMul", ["x", normal("spread", _FEATURES, pixels)], ["flat"]),
            helper.make_node(
                "Reshape", ["flat", tensor("shape", np.array([-1, 1, _SIDE, _SIDE]))], ["image"]
            ),
        ]
        name = "image"
        for i in range(layers):
            kernel = normal(f"k{i}", _CHANNELS, 1 if i == 0 else _CHANNELS, 3, 3)
            nodes += [
                helper.make_node("Conv", [name, kernel], [f"c{i}"], pads=[1, 1, 1, 1]),
                helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
            ]
            name = f"r{i}"
        nodes += [
            helper.make_node("GlobalAveragePool", [name], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["features"]),
        ]
        name = "features"
    batch = 1 if single else "N"
    width = _CHANNELS if layers else _FEATURES
    nodes.append(helper.make_node("MatMul", [name, normal("last", width, 2)], ["z"]))
    nodes.append(helper.make_node("Softmax", ["z"], ["p"]))
    graph = helper.make_graph(
        nodes,
        "eta",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, _FEATURES])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [batch, 2])],
        weights,
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    if single or not proved:
        return _unproved(folder, example, single)
    bundle = parbake.pack(
        folder / "model.onnx",
        name="eta",
        example={"x": example},
        purpose="measured by bench/",
        owner="bench@parbake.example",
        out=folder / "eta.bundle",
        freshness_s=freshness_s,
    )
    return read_bundle(bundle.path)


def convolutions_of(folder: Path, row_s: float, batch: int) -> int:
    """So many convolutions take a row about ``row_s`` on all CPUs of this machine, in batches of so many rows.

    Told by some, and then by as many as that would be, again and again.
    """
    layers = _TRIED
    for number in range(_TRIES):
        bundle = packed_network(folder / str(number), layers, rows_of(batch), single=batch == 1, proved=False)
        # The first one has one channel to read, and takes next to nothing.
        layers = 1 + max(round((layers - 1) * row_s / seconds_a_row(bundle, batch)), 1)
    return layers


def seconds_a_row(bundle: StoredBundle, batch: int) -> float:
    """What a row takes of a model on all CPUs of this machine, in batches of so many rows: a median."""
    examples, session = examples_of(bundle), Session(bundle, threads=cpu.quota())
    raws = batch_of(examples, batch)
    times: list[float] = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        session.run_raw(raws, batch, examples.shapes)
        times.append(time.perf_counter() - started)
    return median(times) / batch


def _unproved(folder: Path, example: Rows, single: bool) -> StoredBundle:
    """The bundle of a network, as if it had been proved."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    answers = np.concatenate([session.run(["p"], {"x": row[np.newaxis]})[0] for row in example])
    contract = Contract(
        name="eta",
        inputs=(TensorSpec("x", "FP32", (_FEATURES,)),),
        outputs=(TensorSpec("p", "FP32", (2,)),),
        steps=(Step("onnx", "model.onnx"),),
        purpose="measured by bench/",
        owner="bench@parbake.example",
        tolerance=Tolerance(rtol=1e-3, atol=1e-4),
        batch=Batch(dimension="one") if single else Batch(),
    )
    return write_bundle(
        folder / "eta.bundle",
        contract,
        {"model.onnx": (folder / "model.onnx").read_bytes()},
        Goldens({"x": example}, {"p": answers}),
        capture(),
    )


def rows_of(count: int) -> Rows:
    """Distinct rows with few digits."""
    random = np.random.default_rng(_SEED)
    rows: Rows = random.normal(size=(count, _FEATURES)).round(3).astype(np.float32)
    # Distinct by construction.
    rows[:, 0] = np.arange(count)
    return rows


def row_body(row: Rows) -> bytes:
    """A request for one row, of the Open Inference Protocol."""
    data = [float(str(value)) for value in row]
    return msgspec.json.encode(
        {"inputs": [{"name": "x", "shape": [1, len(row)], "datatype": "FP32", "data": data}]}
    )
