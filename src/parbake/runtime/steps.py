"""One step of a model, ready to be called: an ONNX graph, a Python function, or (if allowed) a pickle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parbake.contract.bundle import StoredBundle
from parbake.contract.datatypes import NUMPY
from parbake.contract.model import Step, TensorSpec
from parbake.contract.ort import onnxruntime
from parbake.contract.tensors import Tensor, as_text
from parbake.errors import BundleError, MissingExtra, ModelFailed, NotAllowed, RowRejected
from parbake.runtime.own_code import load_function

StepRunner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def open_step(bundle: StoredBundle, step: Step, *, threads: int, allow_pickle: bool) -> StepRunner:
    """Load one step. Raises `BundleError`, or `NotAllowed` for a pickle that nobody asked for."""
    path = bundle.file(step.path)
    if step.kind == "onnx":
        return OnnxStep(path, threads)
    if step.kind == "python":
        # What a step in front of others gives has the names that packing gave it, not those of the answer.
        outputs = bundle.contract.outputs if step is bundle.contract.steps[-1] else ()
        return PythonStep(load_function(path, step.entry), outputs)
    if not allow_pickle:
        raise NotAllowed(
            f"{bundle.path} holds a pickle, which can run any code when it is loaded",
            hint="--allow-pickle, if you trust whoever packed it",
        )
    gappy = [spec.name for spec in bundle.contract.inputs if spec.datatype == "BYTES" and spec.allow_nan]
    return PickleStep(path, step.entry, gappy)


class OnnxStep:
    """An ONNX graph in onnxruntime on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        ort = onnxruntime()

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4
        # Spinning threads burn whole cores at low load.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime has no common base class for its errors.
            raise BundleError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error
        self._texts = {i.name for i in self._session.get_inputs() if i.type == "tensor(string)"}
        self._names = [o.name for o in self._session.get_outputs()]
        self._wanted = {i.name for i in self._session.get_inputs()}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Raises `RowRejected` or `ModelFailed`."""
        feed = {name: array for name, array in tensors.items() if name in self._wanted}
        for name in self._texts:
            try:
                feed[name] = as_text(feed[name])
            except UnicodeDecodeError as error:
                raise RowRejected(f"input {name!r} is not UTF-8 text") from error
        return dict(zip(self._names, self.run(self._names, feed), strict=True))

    def run(self, names: Sequence[str], feed: Mapping[str, Tensor]) -> list[Any]:
        """The outputs of these names, given all inputs of the graph and no others. Raises `ModelFailed`."""
        try:
            values: list[Any] = self._session.run(names, feed)
        except Exception as error:
            raise ModelFailed(f"onnxruntime: {_first_line(error)}") from error
        return values

    def bound(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> BoundRow:
        """A quicker way for single rows, where all sizes are fixed. Raises where onnxruntime has none."""
        return BoundRow(self._session, inputs, outputs)

    def takes(self, inputs: Sequence[str], outputs: Sequence[str]) -> bool:
        """Whether the graph has just these inputs, none of them text, and has these outputs."""
        return not self._texts and self._wanted == set(inputs) and set(outputs) <= set(self._names)


class BoundRow:
    """The way of one row through a graph whose tensors lie where they always lie: nothing is made for a call.

    ``inputs`` and ``outputs`` are of fixed size, and without text. Raises where onnxruntime does not take them.
    """

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        ort = onnxruntime()

        self._binding = session.io_binding()
        self._run = session.run_with_iobinding
        self._kept: list[Any] = []
        self._inputs = [self._place(spec, self._binding.bind_ortvalue_input, ort) for spec in inputs]
        self._outputs = [self._place(spec, self._binding.bind_ortvalue_output, ort) for spec in outputs]

    def _place(self, spec: TensorSpec, bind: Callable[[str, Any], None], ort: Any) -> memoryview:
        array = np.zeros((1, *spec.shape), NUMPY[spec.datatype])
        value = ort.OrtValue.ortvalue_from_numpy(array)
        bind(spec.name, value)
        self._kept += (array, value)
        return array.reshape(-1).view(np.uint8).data

    def run(self, raws: Sequence[bytes]) -> list[bytes]:
        """Raw bytes of each output, given those of each input. Raises what onnxruntime does."""
        for place, raw in zip(self._inputs, raws, strict=True):
            place[:] = raw
        self._run(self._binding)
        return [place.tobytes() for place in self._outputs]


class PythonStep:
    """A function that takes the inputs as keyword arguments: arrays whose first axis is the row.

    It gives one array (for a single output), a dict by output name, or a tuple in the contract's order.
    Strings are object arrays of str. ValueError means that the row itself is at fault.
    """

    def __init__(self, function: Callable[..., Any], outputs: tuple[TensorSpec, ...]) -> None:
        self._function = function
        self._outputs = outputs

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Raises `RowRejected` or `ModelFailed`."""
        arguments: dict[str, Tensor] = {}
        for name, array in tensors.items():
            try:
                # A copy: the function may change what it is given, and raw bytes cannot be changed.
                arguments[name] = as_text(array) if array.dtype == object else np.array(array)
            except UnicodeDecodeError as error:
                raise RowRejected(f"input {name!r} is not UTF-8 text") from error
        try:
            return named_outputs(self._function(**arguments), self._outputs)
        except ValueError as error:
            raise RowRejected(f"the model refused the row: {_first_line(error)}") from error
        except Exception as error:
            raise ModelFailed(f"{type(error).__name__}: {_first_line(error)}") from error


class PickleStep:
    """An unpickled estimator; ``entry`` names its methods by output: ``label=predict,...``.

    In the inputs named by ``gappy`` an empty string is a missing value, NaN in the frame.
    """

    def __init__(self, path: Path, entry: str, gappy: Collection[str] = ()) -> None:
        try:
            import joblib
        except ImportError as error:
            raise MissingExtra("joblib", "sklearn") from error
        self._estimator: Any = joblib.load(path)
        self._methods = dict(part.split("=", 1) for part in entry.split(","))
        self._gappy = frozenset(gappy)

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Raises `RowRejected` or `ModelFailed`."""
        rows: Any
        if len(tensors) == 1 and next(iter(tensors.values())).ndim == 2:
            rows = np.array(next(iter(tensors.values())))
        else:
            try:
                import pandas as pd
            except ImportError as error:
                raise MissingExtra("pandas", "sklearn") from error
            columns = {
                name: (as_text(a) if a.dtype == object else a).reshape(len(a)) for name, a in tensors.items()
            }
            for name in self._gappy & columns.keys():
                columns[name] = np.where(columns[name] == "", np.nan, columns[name])
            rows = pd.DataFrame(columns)
        try:
            return {
                name: np.asarray(getattr(self._estimator, method)(rows))
                for name, method in self._methods.items()
            }
        except ValueError as error:
            raise RowRejected(f"the model refused the row: {_first_line(error)}") from error
        except Exception as error:
            raise ModelFailed(f"{type(error).__name__}: {_first_line(error)}") from error


def named_outputs(result: Any, outputs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """What a Python function gave, by output name."""
    if isinstance(result, Mapping):
        return {str(name): np.asarray(value) for name, value in result.items()}
    values = result if isinstance(result, tuple) else (result,)
    if outputs and len(values) != len(outputs):
        raise ModelFailed(f"the function gave {len(values)} outputs, the contract has {len(outputs)}")
    names = [spec.name for spec in outputs] or [f"output{i}" if i else "output" for i in range(len(values))]
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
