"""Hold a Source's graph, run by onnxruntime, against the framework's own answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort

from parbake.contract.sources.model import Source
from parbake.contract.tensors import Tensor, Tensors, as_text


def answers(source: Source, tensors: Tensors, *, threads: int = 1) -> dict[str, Tensor]:
    """What the converted graph says."""
    onnx.checker.check_model(onnx.load_from_string(source.files["model.onnx"]))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(source.files["model.onnx"], options, providers=["CPUExecutionProvider"])
    feed = {
        item.name: as_text(tensors[item.name]) if tensors[item.name].dtype == object else tensors[item.name]
        for item in session.get_inputs()
    }
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def at_thresholds(source: Source, tensors: Tensors, *, each: int = 30) -> dict[str, Tensor]:
    """The rows, and rows with one value at a threshold or at a neighbour of one."""
    draw = np.random.default_rng(0)
    rows = len(next(iter(tensors.values())))
    parts: list[Mapping[str, Tensor]] = [tensors]
    for (name, position), known in source.thresholds.items():
        dtype = tensors[name].dtype
        some = draw.choice(np.asarray(known), min(each, len(known)), replace=False).astype(dtype)
        around = [some, some + 1, some - 1]
        if dtype.kind == "f":
            around = [some, np.nextafter(some, dtype.type(np.inf)), np.nextafter(some, dtype.type(-np.inf))]
        for values in around:
            at = draw.integers(0, rows, len(values))
            part = {other: array[at].copy() for other, array in tensors.items()}
            part[name].reshape(len(values), -1)[:, position] = values
            parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in tensors}


def largest_gap(source: Source, tensors: Tensors | None = None) -> float:
    """Largest difference of floating outputs on rows and their thresholds; everything else must be equal."""
    rows = at_thresholds(source, source.example if tensors is None else tensors)
    got, expected = answers(source, rows), source.predict(rows)
    assert [spec.name for spec in source.outputs] == list(expected)
    gap = 0.0
    for spec in source.outputs:
        ours, theirs = got[spec.name], expected[spec.name]
        assert ours.shape == theirs.shape == (len(theirs), *spec.shape)
        assert ours.dtype == theirs.dtype
        if ours.dtype.kind == "f":
            gap = max(gap, float(np.nanmax(np.abs(ours - theirs), initial=0.0)))
            assert np.array_equal(np.isnan(ours), np.isnan(theirs))
        else:
            different = np.flatnonzero((ours != theirs).reshape(len(ours), -1).any(axis=1))
            assert not len(different), f"{spec.name} differs in rows {different[:5]}"
    return gap


def numbers(rows: int, *, seed: int = 0) -> Tensor:
    """Six columns: two plain ones, one tiny, a skewed one, a Unix timestamp with milliseconds, and a code 0 to 9."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 6))
    x[:, 2] *= 1e-20
    x[:, 3] = np.exp(3 * x[:, 3])
    x[:, 4] = 1.7e9 + np.round(draw.random(rows) * 1e6, 3)
    x[:, 5] = draw.integers(0, 10, rows)
    return x


def target(x: Tensor) -> Tensor:
    """Something that depends on all columns of `numbers`."""
    seconds = x[:, 4] % 1000
    return np.asarray(
        2 * x[:, 0] + np.sin(3 * x[:, 1]) + 1e20 * x[:, 2] + np.log(x[:, 3]) / 3 + seconds / 500 + x[:, 5] % 3
    )
