"""Export a PyTorch module to ONNX: evaluation mode, a free batch dimension, weights in the one file."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from parbake.contract.datatypes import datatype_of
from parbake.contract.model import Step, TensorSpec
from parbake.contract.sources.dimension import along_rows
from parbake.contract.sources.model import Source
from parbake.contract.tensors import Tensor, Tensors
from parbake.errors import MissingExtra, NotAllowed, NotConvertible, PackRefused

RTOL: Final = 1e-4
ATOL: Final = 1e-5
"""What two float32 implementations of the same network agree to (sums run in other orders)."""

_HALF_RTOL: Final = 1e-2
_HALF_ATOL: Final = 1e-2


def from_torch(model: Any, example: object, *, batch: str | None = None) -> Source:
    """A Source of a ``torch.nn.Module``, a TorchScript module or a ``torch.export`` program.

    Inputs are named like the parameters of ``forward``; outputs are ``output`` (or ``output0``,
    ``output1``, ...) or the keys of the dict that ``forward`` gives. Where the export fixes the batch,
    the model is exported for one row (batch dimension ``one``). Raises `NotConvertible` with what the
    exporter says.
    """
    torch = _torch()
    program = isinstance(model, torch.export.ExportedProgram)
    script = isinstance(model, torch.jit.ScriptModule)
    if program:
        runnable = model.module()
    else:
        runnable = model if script else copy.deepcopy(model)
        runnable = runnable.to("cpu").eval()
    names = _script_inputs(model) if script else _forward_inputs(runnable)
    tensors = _in_own_floats(torch, runnable, _named(example, names))
    specs = tuple(
        TensorSpec(name, datatype_of(array), tuple(array.shape[1:]), allow_nan=_gaps(array))
        for name, array in tensors.items()
    )
    text = next((spec.name for spec in specs if spec.datatype == "BYTES"), None)
    if text is not None:
        raise PackRefused(
            f"input {text!r} holds strings, which no torch tensor does", hint="pre= can encode them"
        )
    call = _Call(torch, runnable, tuple(tensors))
    answers = _tried(call, tensors)
    outputs = tuple(answers)
    dimension = batch or "any"
    proto: Any = None
    reason: Exception | None = None
    for dimension in [batch] if batch else ["any", "one"]:
        try:
            proto = _exported(
                torch, model if program else runnable, tensors, outputs, dimension, script, program
            )
            break
        except Exception as error:
            # The exporter's errors have no common base; the last one is shown.
            reason = error
    if proto is None:
        raise NotConvertible(
            f"torch cannot export the model to ONNX: {_summary(reason)}",
            hint="make torch.export.export(model, ...) work, or pack a Python function that calls it",
        ) from reason
    predict = along_rows(call, dimension)
    answers = _tried(predict, tensors)
    half = any(array.dtype == np.float16 for array in answers.values())
    return Source(
        framework="torch",
        framework_version=str(torch.__version__),
        inputs=specs,
        outputs=tuple(TensorSpec(n, datatype_of(a), tuple(a.shape[1:])) for n, a in answers.items()),
        steps=(Step("onnx", "model.onnx"),),
        files={"model.onnx": proto},
        predict=predict,
        example=tensors,
        batch_dimension=dimension,
        rtol=_HALF_RTOL if half else RTOL,
        atol=_HALF_ATOL if half else ATOL,
        smooth=True,
    )


def read_torch(path: Path, *, allow_pickle: bool) -> Any:
    """A model from a ``.pt``, ``.pth`` or ``.pt2`` file.

    TorchScript archives are read by torch's own restricted reader. Whole pickled modules can run any
    code, and so can ``torch.export`` files: ``torch.export.load`` falls back to pickle and evaluates
    expressions. Both need ``allow_pickle``. Raises `NotAllowed` or `PackRefused`.
    """
    torch = _torch()
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        members = []
    kind = "pickled module"
    if any(name.endswith("/constants.pkl") for name in members) and any("/code/" in name for name in members):
        kind = "TorchScript"
    elif any(name.endswith("/archive_format") for name in members):
        kind = "torch.export program"
    if kind != "TorchScript" and not allow_pickle:
        raise NotAllowed(
            f"{path} is a {kind}, and loading one can run any code",
            hint="--allow-pickle if you trust it; or pack the module from Python, or an .onnx file",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "TorchScript":
                return torch.jit.load(str(path), map_location="cpu")
            if kind == "torch.export program":
                return torch.export.load(path)
            loaded = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise PackRefused(f"torch cannot load {path}: {_summary(error)}") from error
    if not isinstance(loaded, torch.nn.Module):
        raise PackRefused(
            f"{path} holds a {type(loaded).__name__}, not a module",
            hint="weights alone do not say how to compute: load them into the module and pack that from Python",
        )
    return loaded


class _Call:
    """The module itself, on numpy arrays: no gradients, in evaluation mode."""

    def __init__(self, torch: Any, module: Any, inputs: tuple[str, ...]) -> None:
        self._torch = torch
        self._module = module
        self._inputs = inputs

    def __call__(self, tensors: Tensors) -> dict[str, Tensor]:
        torch = self._torch
        # A copy: torch wants writable memory, and a model may work in place.
        arguments = [torch.from_numpy(np.array(tensors[name])) for name in self._inputs]
        with torch.no_grad():
            result = self._module(*arguments)
        return {name: value.detach().cpu().numpy() for name, value in _outputs(result)}


def _outputs(result: Any) -> list[tuple[str, Any]]:
    if isinstance(result, Mapping):
        return [(str(name), value) for name, value in result.items()]
    if isinstance(result, tuple | list):
        return [(f"output{i}", value) for i, value in enumerate(result)]
    return [("output", result)]


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtra("torch", "torch") from error
    return torch


def _forward_inputs(module: Any) -> list[tuple[str, bool]]:
    """Parameters of ``forward``: name, and whether it must be given."""
    found = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found.append((parameter.name, parameter.default is parameter.empty))
    return found or [("input", True)]


def _script_inputs(module: Any) -> list[tuple[str, bool]]:
    arguments = module.forward.schema.arguments[1:]
    return [(argument.name, not argument.has_default_value()) for argument in arguments]


def _named(example: object, names: Sequence[tuple[str, bool]]) -> dict[str, Tensor]:
    """The example's arrays in the order of ``forward``'s parameters. Raises `PackRefused`."""
    from parbake.contract.sources.example import read

    if isinstance(example, Mapping):
        example = {name: _array(value) for name, value in example.items()}
    elif isinstance(example, tuple):
        example = {name: _array(value) for (name, _), value in zip(names, example, strict=False)}
    else:
        example = _array(example)
    found = read(example)
    words = ", ".join(name for name, _ in names)
    tensors = dict(found.tensors)
    if len(tensors) == 1 and found.kind in ("array", "matrix") and sum(must for _, must in names) <= 1:
        return {names[0][0]: next(iter(tensors.values()))}
    unknown = [name for name in tensors if name not in dict(names)]
    if unknown:
        raise PackRefused(
            f"forward() has no parameter {unknown[0]!r}, which the example has", hint=f"it takes {words}"
        )
    absent = [name for name, must in names if must and name not in tensors]
    if absent:
        raise PackRefused(f"forward() needs {absent[0]!r}, which the example lacks", hint=f"it takes {words}")
    given = [name for name, _ in names if name in tensors]
    if given != [name for name, _ in names[: len(given)]]:
        raise PackRefused(
            "the example leaves out a parameter of forward() before one that it gives",
            hint=f"in order: {words}",
        )
    return {name: tensors[name] for name in given}


def _in_own_floats(torch: Any, module: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Doubles, which is what frames and lists are made of, in the one float type of the module's weights."""
    kinds = {weight.dtype for weight in module.parameters() if weight.dtype.is_floating_point}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float16}:
        return tensors
    dtype = np.float32 if kinds == {torch.float32} else np.float16
    return {n: a.astype(dtype) if a.dtype == np.float64 else a for n, a in tensors.items()}


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _tried(predict: Any, tensors: Tensors) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers: dict[str, Tensor] = predict({name: array[:4] for name, array in tensors.items()})
    except Exception as error:
        raise PackRefused(
            f"the module fails on the example: {_summary(error)}", hint="inputs have the example's own dtypes"
        ) from error
    for name, array in answers.items():
        try:
            datatype_of(array)
        except ValueError as error:
            raise NotConvertible(f"output {name!r}: {error}", hint="cast it in forward()") from error
    return answers


def _exported(
    torch: Any,
    model: Any,
    tensors: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    dimension: str,
    script: bool,
    program: bool,
) -> bytes:
    """The ONNX file. Raises what torch raises, or ValueError where the batch came out fixed."""
    rows = 1 if dimension == "one" else 3
    sample = {name: np.concatenate([array] * rows)[:rows] for name, array in tensors.items()}
    if dimension == "none":
        sample = {name: array[0] for name, array in tensors.items()}
    arguments = tuple(torch.from_numpy(np.array(array)) for array in sample.values())
    free = dimension == "any"
    with _quiet():
        if script:
            axes = {name: {0: "batch"} for name in (*tensors, *outputs)} if free else None
            buffer = io.BytesIO()
            torch.onnx.export(
                model, arguments, buffer, dynamo=False, input_names=list(tensors), output_names=list(outputs),
                dynamic_axes=axes,
            )  # fmt: skip
            data = buffer.getvalue()
        else:
            shapes = None
            if free and not program:
                shapes = tuple({0: torch.export.Dim("batch")} for _ in arguments)
            exported = torch.onnx.export(
                model, () if program else arguments, dynamo=True, verbose=False, input_names=list(tensors),
                output_names=list(outputs), dynamic_shapes=shapes,
            )  # fmt: skip
            data = exported.model_proto.SerializeToString()
    return _stripped(data, free)


def _stripped(data: bytes, free: bool) -> bytes:
    """The model without stack traces and other marks of where it was exported."""
    import onnx

    proto = onnx.ModelProto.FromString(data)
    del proto.metadata_props[:]
    proto.doc_string = ""
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    for item in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for item in (*proto.graph.input, *proto.graph.output):
        size = item.type.tensor_type.shape.dim[0] if item.type.tensor_type.shape.dim else None
        if free and (size is None or size.HasField("dim_value")):
            raise ValueError(f"the export fixed the batch: {item.name} has no free first axis")
    return bytes(proto.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, logs and deprecations to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _gaps(array: Tensor) -> bool:
    return array.dtype.kind == "f" and not bool(np.isfinite(array).all())


def _summary(error: Exception | None) -> str:
    """The cause at the bottom of an exporter's error, in one line."""
    while error is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
