"""Write an ONNX graph by hand: typed values, constants that are stored once, one call per operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from parbake.contract.datatypes import NUMPY
from parbake.contract.model import TensorSpec
from parbake.errors import NotConvertible

OPSET: Final = 21
ML: Final = "ai.onnx.ml"
ML_OPSET: Final = 5
IR_VERSION: Final = 10

Array = npt.NDArray[Any]
Dtype = np.dtype[Any]

DOUBLE: Final[Dtype] = np.dtype(np.float64)
FLOAT: Final[Dtype] = np.dtype(np.float32)
INT64: Final[Dtype] = np.dtype(np.int64)
BOOL: Final[Dtype] = np.dtype(np.bool_)
TEXT: Final[Dtype] = np.dtype(object)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph. ``width`` is its number of columns, of shape (rows, width); 0: shape (rows,)."""

    name: str
    dtype: Dtype
    width: int


class Graph:
    """A graph under construction. Names are given in order, so the same model gives the same bytes."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        from onnx import helper

        self._nodes: list[Any] = []
        self._initializers: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
        self._outputs: list[Any] = []
        self._count = 0
        self._inputs = [
            helper.make_tensor_value_info(spec.name, onnx_type(NUMPY[spec.datatype]), ["N", *spec.shape])
            for spec in inputs
        ]
        self._taken = {spec.name for spec in inputs}

    def fresh(self, stem: str) -> str:
        """A name that nothing in the graph has yet."""
        while True:
            self._count += 1
            name = f"{stem}_{self._count}"
            if name not in self._taken:
                return name

    def constant(self, array: Any, dtype: Dtype | None = None) -> str:
        """The name of an initializer with this content; equal contents share one."""
        from onnx import numpy_helper

        data = np.ascontiguousarray(array, dtype=dtype)
        if np.ndim(array) == 0:
            data = data.reshape(())
        content = repr(data.tolist()).encode() if data.dtype == object else data.tobytes()
        key = (str(data.dtype), data.shape, content)
        if key not in self._initializers:
            self._initializers[key] = numpy_helper.from_array(data, self.fresh("c"))
        return str(self._initializers[key].name)

    def op(
        self,
        kind: str,
        *inputs: Value | str,
        dtype: Dtype | None = None,
        width: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Value:
        """Add an operator with one output; dtype and width are those of the first input unless given."""
        from onnx import helper

        first = next((item for item in inputs if isinstance(item, Value)), None)
        if dtype is None:
            dtype = first.dtype if first is not None else DOUBLE
        if width is None:
            width = first.width if first is not None else 0
        names = [item.name if isinstance(item, Value) else item for item in inputs]
        name = self.fresh(kind.lower())
        self._nodes.append(helper.make_node(kind, names, [name], domain=domain, **attributes))
        return Value(name, dtype, width)

    def node(self, node: Any) -> None:
        """Add a ready-made NodeProto, whose output names come from `fresh`."""
        self._nodes.append(node)

    def initializer(self, tensor: Any) -> None:
        """Add a ready-made TensorProto, whose name comes from `fresh`."""
        self._initializers[("", (), tensor.name.encode())] = tensor

    def cast(self, value: Value, dtype: Dtype) -> Value:
        """The value as ``dtype``, rounded to nearest where it must be; itself where it is that already."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, to=onnx_type(dtype))

    def concat(self, values: Sequence[Value]) -> Value:
        """Values of one dtype side by side."""
        if len(values) == 1:
            return values[0]
        return self.op("Concat", *values, width=sum(value.width for value in values), axis=1)

    def take(self, value: Value, columns: Sequence[int]) -> Value:
        """Columns of a matrix, in this order."""
        if list(columns) == list(range(value.width)):
            return value
        return self.op("Gather", value, self.constant(columns, INT64), width=len(columns), axis=1)

    def flat(self, value: Value) -> Value:
        """A matrix of one column as a vector."""
        return self.op("Squeeze", value, self.constant([1], INT64), width=0) if value.width else value

    def column(self, value: Value) -> Value:
        """A vector as a matrix of one column."""
        return value if value.width else self.op("Unsqueeze", value, self.constant([1], INT64), width=1)

    def output(self, value: Value, spec: TensorSpec) -> None:
        """Give a value the name and datatype of an output."""
        from onnx import helper

        dtype = NUMPY[spec.datatype]
        last = self.cast(value, dtype)
        self._nodes.append(helper.make_node("Identity", [last.name], [spec.name]))
        self._taken.add(spec.name)
        self._outputs.append(helper.make_tensor_value_info(spec.name, onnx_type(dtype), ["N", *spec.shape]))

    def to_bytes(self) -> bytes:
        """The finished model. Raises `NotConvertible` where it is over protobuf's 2 GiB."""
        from onnx import helper

        graph = helper.make_graph(
            self._nodes, "model", self._inputs, self._outputs, list(self._initializers.values())
        )
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(ML, ML_OPSET)]
        model = helper.make_model(
            graph, opset_imports=domains, ir_version=IR_VERSION, producer_name="parbake"
        )
        try:
            data: bytes = model.SerializeToString(deterministic=True)
        except Exception as error:
            # Which error it is depends on protobuf's implementation.
            raise NotConvertible(
                "the converted model is over 2 GiB, which no ONNX file may be",
                hint="train fewer or smaller trees",
            ) from error
        return data


def onnx_type(dtype: Dtype) -> int:
    """ONNX's number for a numpy dtype; objects are strings."""
    from onnx import TensorProto, helper

    return int(TensorProto.STRING) if dtype == TEXT else int(helper.np_dtype_to_tensor_dtype(dtype))
