"""Inference requests and replies of the Open Inference Protocol over gRPC: typed and raw contents in, raw out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from parbake.contract.datatypes import INTEGERS, NUMPY
from parbake.contract.model import TensorSpec
from parbake.contract.tensors import to_raw
from parbake.errors import InvalidInput
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.transports.grpc.messages import message
from parbake.transports.http.oip import InferCall
from parbake.transports.inputs import Given, gather
from parbake.transports.parameters import output_position, priority_of, refuse_unsupported, timeout_s

_FIELDS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where typed contents stand; FP16 has no field."""


class GrpcCodec:
    """Reads ``ModelInferRequest`` for one served version and writes ``ModelInferResponse``."""

    def __init__(self, served: ServedVersion) -> None:
        self._served = served
        self._specs = served.contract.outputs
        self._everything = tuple((i, True) for i in range(len(self._specs)))
        self._batched = served.contract.batch.dimension != "none"
        self._reply = message("ModelInferResponse")

    def read(self, request: Any) -> InferCall:
        """The call in a request. Raises `InvalidInput` or `RequestTooLarge`."""
        parameters = values_of(request.parameters)
        refuse_unsupported(parameters, "$.parameters")
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            raise InvalidInput(
                f"{len(raw)} raw contents for {len(request.inputs)} inputs",
                path="$.raw_input_contents",
                hint="send one for each input, in the order of the inputs",
            )
        given: list[Given] = []
        for i, tensor in enumerate(request.inputs):
            path = f"$.inputs[{i}]"
            refuse_unsupported(values_of(tensor.parameters), f"{path}.parameters")
            if not raw:
                data = self._typed(tensor, path)
            elif tensor.HasField("contents") and tensor.contents.ListFields():
                raise InvalidInput("both contents and raw_input_contents are given", path=path)
            else:
                data = raw[i]
            given.append(Given(tensor.name, tensor.datatype, list(tensor.shape), data, path))
        inputs = gather(self._served, given)
        return InferCall(
            inputs,
            request.id,
            timeout_s(parameters),
            priority_of(parameters),
            self._wanted(request),
            parameters,
        )

    def _typed(self, tensor: Any, path: str) -> bytes:
        spec = self._served.contract.input(tensor.name)
        if spec is None or tensor.datatype != spec.datatype:
            # `gather` says what is wrong with it.
            return b""
        return pack_contents(spec, tensor.contents, f"{path}.contents")

    def _wanted(self, request: Any) -> tuple[tuple[int, bool], ...]:
        if not request.outputs:
            return self._everything
        wanted: list[tuple[int, bool]] = []
        for i, output in enumerate(request.outputs):
            refuse_unsupported(values_of(output.parameters), f"$.outputs[{i}].parameters")
            position = output_position(self._served, output.name, f"$.outputs[{i}].name")
            if (position, True) in wanted:
                raise InvalidInput(f"output {output.name!r} is asked for twice", path=f"$.outputs[{i}].name")
            wanted.append((position, True))
        return tuple(wanted)

    def write(self, answer: Answer, call: InferCall) -> Any:
        """The reply, with raw contents whatever the form of the request."""
        reply = self._reply(model_name=self._served.name, model_version=self._served.version, id=call.id)
        rows = (answer.rows,) if self._batched else ()
        for i, _ in call.wanted or self._everything:
            spec = self._specs[i]
            reply.outputs.add(name=spec.name, datatype=spec.datatype, shape=(*rows, *answer.shapes[i]))
            reply.raw_output_contents.append(answer.raws[i])
        if answer.fallback:
            reply.parameters["parbake_fallback"].string_param = answer.fallback
        return reply


def pack_contents(spec: TensorSpec, contents: Any, path: str) -> bytes:
    """Typed contents as raw bytes. Raises `InvalidInput` for values in the wrong field or out of range."""
    field = _FIELDS.get(spec.datatype)
    if field is None:
        raise InvalidInput(
            f"{spec.datatype} has no typed contents",
            path=path,
            hint=f"send {spec.name!r} in raw_input_contents",
        )
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if filled not in ([], [field]):
        raise InvalidInput(
            f"{spec.datatype} goes into {field}, got {', '.join(filled)}",
            path=path,
            hint=f"send {spec.name!r} in {field} or in raw_input_contents",
        )
    values = getattr(contents, field)
    if spec.datatype == "BYTES":
        items = np.empty(len(values), dtype=object)
        items[:] = list(values)
        return to_raw(items, "BYTES")
    dtype = NUMPY[spec.datatype]
    if spec.datatype in INTEGERS and dtype.itemsize < 4:
        wide = np.fromiter(values, np.int64, len(values))
        limits = np.iinfo(dtype)  # type: ignore[type-var]  # an integer dtype
        outside = np.flatnonzero((wide < limits.min) | (wide > limits.max))
        if outside.size:
            at = int(outside[0])
            raise InvalidInput(
                f"expected {spec.datatype}, got {wide[at]}",
                path=f"{path}.{field}[{at}]",
                hint=f"{spec.name!r} takes whole numbers from {limits.min} to {limits.max}",
            )
        return to_raw(wide, spec.datatype)
    return np.fromiter(values, dtype, len(values)).tobytes()


def values_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name, as plain values; None where a parameter has no value."""
    return {
        name: getattr(parameter, choice) if (choice := parameter.WhichOneof("parameter_choice")) else None
        for name, parameter in parameters.items()
    }
