"""Read an ONNX model: its inputs, outputs and batch dimension, as one file that onnxruntime loads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import numpy as np

from parbake.contract.datatypes import ONNX, Datatype
from parbake.contract.model import Step, TensorSpec
from parbake.contract.ort import onnxruntime
from parbake.contract.rows import as_inputs
from parbake.contract.sources.dimension import along_rows
from parbake.contract.sources.model import Source
from parbake.contract.tensors import Tensor, Tensors, as_text
from parbake.errors import NotConvertible, PackRefused

MODEL: Final = "model.onnx"

MAX_BYTES: Final = 16 * 1024**3
"""Largest model with its external data."""

_INLINE_BYTES: Final = 1536 * 1024**2
"""Weights up to this size are put into the one file; Protocol Buffers end at 2 GiB."""

_SIZED_BY_DATA: Final = frozenset(
    {
        "NonZero",
        "Unique",
        "Compress",
        "NonMaxSuppression",
        "Loop",
        "If",
        "StringSplit",
        "SplitToSequence",
        "RegexSplit",
    }
)
"""Operators whose output's shape depends on values, so that one run does not tell it."""

Dimension = Literal["any", "one", "none"]


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    datatype: Datatype
    shape: tuple[int, ...] | None
    """Declared shape, -1 where symbolic; None where the graph does not say."""


def from_onnx(model: Any, example: object, *, batch: Dimension | None = None) -> Source:
    """A Source of an ONNX model: a path, its bytes, or an ``onnx.ModelProto``.

    The batch dimension is ``any`` where the first axis of all inputs and outputs is symbolic and several
    rows go through, ``one`` where it must be 1, else ``none``; ``batch`` overrules that. External data is
    taken into the bundle, initialisers that stand among the inputs are dropped there, and a ZipMap at the
    end gives way to its tensor. Raises `NotConvertible` for what onnxruntime or a tensor cannot do.
    """
    proto, original, path = _read(model)
    external = _has_external(proto)
    files, labels, changed = _normal(proto, original, path)
    with tempfile.TemporaryDirectory(prefix="parbake-onnx-") as temporary:
        session = _open(files, Path(temporary))
        untouched = session if not changed else _session(str(path) if external else original)
        inputs = [_described(item, "input") for item in session.get_inputs()]
        known = {item.name: item.type.tensor_type.HasField("shape") for item in proto.graph.output}
        outputs = [_described(item, "output", known.get(item.name, True)) for item in session.get_outputs()]
    if not inputs:
        raise NotConvertible("the graph has no inputs", hint="a model must depend on something")
    dimension = batch or _dimension(inputs, outputs)
    call = _Call(untouched, labels)

    def specs_for(chosen: Dimension) -> tuple[tuple[TensorSpec, ...], dict[str, Tensor]]:
        specs = tuple(TensorSpec(item.name, item.datatype, _row_shape(item, chosen)) for item in inputs)
        return as_inputs(example, specs)

    if dimension == "any" and batch is None and not _takes_many(call, specs_for("any")[1]):
        dimension = "one"
    specs, tensors = specs_for(dimension)
    predict = along_rows(call, dimension)
    answers = _tried(predict, tensors)
    steady = all(spec.fixed for spec in specs) and not _sized_by_data(proto)
    return Source(
        framework="onnx",
        framework_version=onnxruntime().__version__,
        inputs=specs,
        outputs=tuple(_output(item, dimension, answers[item.name], steady, labels) for item in outputs),
        steps=(Step("onnx", MODEL),),
        files=files,
        predict=predict,
        example=tensors,
        batch_dimension=dimension,
        own_runtime=True,
    )


class _Call:
    """The model as it was given, in onnxruntime on one thread; maps of a ZipMap come back as tensors."""

    def __init__(self, session: Any, labels: Mapping[str, tuple[str, ...]]) -> None:
        self._session = session
        self._labels = labels
        self._texts = {item.name for item in session.get_inputs() if item.type == "tensor(string)"}
        self._names = [item.name for item in session.get_outputs()]

    def __call__(self, tensors: Tensors) -> dict[str, Tensor]:
        feed = {name: as_text(array) if name in self._texts else array for name, array in tensors.items()}
        values = self._session.run(self._names, feed)
        answer: dict[str, Tensor] = {}
        for name, value in zip(self._names, values, strict=True):
            if isinstance(value, list):
                labels = self._labels[name]
                value = np.array(
                    [[{str(k): v for k, v in row.items()}[label] for label in labels] for row in value],
                    np.float32,
                ).reshape(len(value), len(labels))
            answer[name] = np.asarray(value)
        return answer


def _read(model: Any) -> tuple[Any, bytes, Path | None]:
    """The model as protobuf (external data not loaded), as bytes, and the file it was read from."""
    import onnx
    from google.protobuf.message import DecodeError

    if isinstance(model, onnx.ModelProto):
        return onnx.ModelProto.FromString(model.SerializeToString()), model.SerializeToString(), None
    path = None
    where = "the model"
    if isinstance(model, bytes):
        data = model
    else:
        path = Path(model)
        where = str(path)
        try:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise NotConvertible(f"{path} has {size} bytes, the limit is {MAX_BYTES}")
            data = path.read_bytes()
        except OSError as error:
            raise PackRefused(f"{path} cannot be read: {error.strerror}") from error
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise NotConvertible(
            f"{where} is not an ONNX model: {error}", hint="is the file complete?"
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise NotConvertible(f"{where} is not an ONNX model: it has no graph", hint="is the file complete?")
    return proto, data, path


def _normal(
    proto: Any, original: bytes, path: Path | None
) -> tuple[dict[str, bytes], dict[str, tuple[str, ...]], bool]:
    """The files for the bundle, class labels by ZipMap output, and whether anything was changed. Alters ``proto``."""
    import onnx

    files = _external_data(proto, path.parent if path else None)
    inlined = _has_external(proto) and not files
    if inlined and path is not None:
        onnx.load_external_data_for_model(proto, str(path.parent))
    dropped = _drop_initialised_inputs(proto)
    labels = _drop_zipmaps(proto)
    changed = inlined or dropped or bool(labels)
    if not files:
        _check(proto)
    files[MODEL] = proto.SerializeToString(deterministic=True) if changed else original
    return files, labels, changed


def _check(proto: Any) -> None:
    """Hold the model against the standard. Raises `NotConvertible` with what onnx.checker says."""
    import onnx

    # The standard wants outputs to have a shape; onnxruntime finds it, and older converters leave it out.
    unsaid = [
        item.type.tensor_type
        for item in proto.graph.output
        if item.type.WhichOneof("value") == "tensor_type" and not item.type.tensor_type.HasField("shape")
    ]
    for kind in unsaid:
        kind.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise NotConvertible(f"the model does not pass onnx.checker: {_first_line(error)}") from error
    finally:
        for kind in unsaid:
            kind.ClearField("shape")


def _external_data(proto: Any, folder: Path | None) -> dict[str, bytes]:
    """External files that are too large to be inlined, by name; checks that all of them lie beside the model."""
    locations: set[str] = set()
    for tensor in _tensors(proto.graph):
        if tensor.data_location == tensor.EXTERNAL:
            locations.update(entry.value for entry in tensor.external_data if entry.key == "location")
    if not locations:
        return {}
    if folder is None:
        raise NotConvertible(
            "the model keeps its weights in other files", hint="give the path of the .onnx file"
        )
    total = 0
    for location in locations:
        pure = PurePosixPath(location)
        target = folder / location
        inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in location
        if not inside or not target.resolve().is_relative_to(folder.resolve()):
            raise NotConvertible(f"external data {location!r} lies outside of the model's folder")
        if not target.is_file():
            raise NotConvertible(f"external data {target} is missing", hint="copy it beside the model")
        total += target.stat().st_size
    if total > MAX_BYTES:
        raise NotConvertible(f"the model's weights have {total} bytes, the limit is {MAX_BYTES}")
    if total <= _INLINE_BYTES:
        return {}
    if MODEL in locations:
        raise NotConvertible(f"external data must not be named {MODEL}")
    return {location: (folder / location).read_bytes() for location in sorted(locations)}


def _has_external(proto: Any) -> bool:
    return any(tensor.data_location == tensor.EXTERNAL for tensor in _tensors(proto.graph))


def _tensors(graph: Any) -> Iterator[Any]:
    """All tensors of a graph and of the graphs inside it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for inner in attribute.graphs:
                yield from _tensors(inner)


def _drop_initialised_inputs(proto: Any) -> bool:
    """Old exporters list weights among the inputs, which keeps onnxruntime from folding them."""
    initialised = {tensor.name for tensor in proto.graph.initializer}
    kept = [item for item in proto.graph.input if item.name not in initialised]
    if len(kept) == len(proto.graph.input):
        return False
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    # Format 3 wants every initialiser among the inputs.
    proto.ir_version = max(proto.ir_version, 4)
    return True


def _drop_zipmaps(proto: Any) -> dict[str, tuple[str, ...]]:
    """Replace each ZipMap that ends the graph by its tensor; gives the class labels by output name."""
    import onnx

    graph = proto.graph
    outputs = {item.name: item for item in graph.output}
    labels: dict[str, tuple[str, ...]] = {}
    for node in [node for node in graph.node if node.op_type == "ZipMap"]:
        name = node.output[0]
        used = any(name in other.input for other in graph.node)
        names = _zipmap_labels(node)
        if name not in outputs or used or not names:
            raise NotConvertible(
                f"ZipMap {node.name!r} gives maps, which no tensor holds", hint="convert with zipmap=False"
            )
        labels[name] = names
        at = list(graph.node).index(node)
        del graph.node[at]
        graph.node.insert(at, onnx.helper.make_node("Identity", [node.input[0]], [name], node.name))
        outputs[name].CopyFrom(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", len(names)])
        )
    return labels


def _zipmap_labels(node: Any) -> tuple[str, ...]:
    for attribute in node.attribute:
        if attribute.name == "classlabels_int64s":
            return tuple(str(value) for value in attribute.ints)
        if attribute.name == "classlabels_strings":
            return tuple(value.decode() for value in attribute.strings)
    return ()


def _open(files: Mapping[str, bytes], folder: Path) -> Any:
    """A session on the files of the bundle. The folder may go afterwards."""
    if len(files) == 1:
        return _session(files[MODEL])
    for name, data in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return _session(str(folder / MODEL))


def _session(model: bytes | str) -> Any:
    ort = onnxruntime()

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime has no common base class for its errors.
        raise NotConvertible(
            f"onnxruntime {ort.__version__} cannot load the model: {_first_line(error)}"
        ) from error


def _described(item: Any, role: str, known: bool = True) -> _Tensor:
    if item.type not in ONNX:
        raise NotConvertible(
            f"{role} {item.name!r} is a {item.type}, which no tensor of the protocol holds",
            hint="convert with zipmap=False" if "map" in item.type else "cast it inside the graph",
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in item.shape)
    return _Tensor(item.name, ONNX[item.type], shape if shape or known else None)


def _dimension(inputs: list[_Tensor], outputs: list[_Tensor]) -> Dimension:
    shapes = [item.shape for item in (*inputs, *outputs) if item.shape is not None]
    if all(shape and shape[0] == -1 for shape in shapes):
        return "any"
    if all(shape and shape[0] in (1, -1) for shape in shapes):
        return "one"
    return "none"


def _row_shape(item: _Tensor, dimension: str) -> tuple[int, ...]:
    shape = item.shape or ()
    return shape if dimension == "none" else shape[1:]


def _takes_many(call: _Call, tensors: Mapping[str, Tensor]) -> bool:
    """Whether several rows go through at once: some exporters declare a free batch and then fix it inside."""
    for rows in (2, 3):
        batch = {name: np.concatenate([array] * rows)[:rows] for name, array in tensors.items()}
        try:
            answers = call(batch)
        except Exception:
            # What it says belongs to the caller if one row fails as well.
            return False
        if any(array.ndim == 0 or len(array) != rows for array in answers.values()):
            return False
    return True


def _tried(predict: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Answers to the first rows of the example. Raises `PackRefused` with what onnxruntime says."""
    try:
        answers: dict[str, Tensor] = predict({name: array[:3] for name, array in tensors.items()})
    except Exception as error:
        raise PackRefused(
            f"the model fails on the example: {_first_line(error)}",
            hint="batch='one' or 'none' if the model takes one row at a time",
        ) from error
    return answers


def _output(
    item: _Tensor, dimension: str, answer: Tensor, steady: bool, labels: Mapping[str, tuple[str, ...]]
) -> TensorSpec:
    seen = tuple(answer.shape[1:])
    declared = (-1,) * len(seen) if item.shape is None else _row_shape(item, dimension)
    # Sizes that only the run tells are the same for every row if the inputs' sizes are.
    shape = seen if steady or len(declared) != len(seen) else declared
    return TensorSpec(item.name, item.datatype, shape, labels=labels.get(item.name, ()))


def _sized_by_data(proto: Any) -> bool:
    return any(node.op_type in _SIZED_BY_DATA for node in proto.graph.node)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
