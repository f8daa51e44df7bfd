"""Inference requests and replies of the Open Inference Protocol v2 over REST: JSON, and its binary tensor data.

Specification: the Open Inference Protocol ("Predict Protocol - Version 2"), with the binary tensor data
extension. Most requests are one plain JSON tensor; `InferCodec` reads these in one typed decode, and whatever
does not fit that form, or does not fit the contract, takes the careful way, which names the fault.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, overload

import msgspec
from msgspec import Struct

from parbake.contract.datatypes import FLOATS
from parbake.contract.record import Records
from parbake.errors import InvalidInput, InvalidRequest, MalformedBody
from parbake.runtime.waiting import NORMAL
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.transports.http.protocol import VERSION, ok_json
from parbake.transports.inputs import (
    Given,
    Inputs,
    gather,
    pack_values,
    row_shape,
    struct_of,
    unpack_values,
)
from parbake.transports.parameters import output_position, priority_of, refuse_unsupported, timeout_s

_FRAME_BYTES: Final = 1024
_MOST_DIMENSIONS: Final = 32
_MOST_FRAMES: Final = 64
_SHORT_ELEMENTS: Final = 64
"""Most output values per row on the short way: larger replies may have to be compressed."""


class InputTensor(Struct, forbid_unknown_fields=True):
    """``$request_input``."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: dict[str, Any] = {}


class OutputWanted(Struct, forbid_unknown_fields=True):
    """``$request_output``."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(Struct, forbid_unknown_fields=True):
    """``$inference_request``."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputWanted] = []


class _PlainNumbers(Struct, forbid_unknown_fields=True, gc=False):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class _PlainRequest(Struct, forbid_unknown_fields=True, gc=False):
    inputs: list[_PlainNumbers]
    id: str = ""


@dataclass(slots=True)
class InferCall:
    """A request that has been read: rows for the model, and how the reply shall look."""

    inputs: Inputs
    id: str = ""
    timeout_s: float = 0.0
    priority: int = NORMAL
    wanted: tuple[tuple[int, bool], ...] | None = None
    """Positions of the outputs to send and whether as binary; None: all, as JSON."""
    parameters: Mapping[str, Any] | None = None
    """What else it says of itself, where it does."""


class InferCodec:
    """Reads requests for one served version and writes its replies."""

    def __init__(self, served: ServedVersion) -> None:
        contract = served.contract
        self._served = served
        self._decoder = msgspec.json.Decoder(InferRequest)
        self._plain = msgspec.json.Decoder(_PlainRequest)
        self._encode = msgspec.json.Encoder().encode
        self._specs = contract.outputs
        self._ok = ok_json(served.version)
        spec = contract.inputs[0]
        packer = struct_of(spec)
        unpackers = [struct_of(spec) for spec in contract.outputs]
        self._unpackers = None if None in unpackers else [u.unpack for u in unpackers if u is not None]
        self.has_short_way = (
            packer is not None
            and self._unpackers is not None
            and len(contract.inputs) == 1
            and spec.datatype in FLOATS
            and not contract.key.columns
            and not contract.key.rounding
            and sum(output.elements for output in contract.outputs) <= _SHORT_ELEMENTS
        )
        """Whether `read_row` and `write_row` are for this contract."""
        self._frame = (b"\0", b"\0", 0, 0)
        """What stood before and after the values in the last body read; no body begins with NUL."""
        self.binary: dict[bytes, tuple[bytes, str]] = {}
        """By the JSON of requests whose binary data is one row: how the reply begins, up to the outputs' raw bytes
        (nothing where it is all JSON), and the request id."""
        self._row_bytes = spec.row_bytes
        self._allow_nan = spec.allow_nan
        self._unpack_row: Callable[[bytes], tuple[float, ...]] = (
            packer.unpack if packer is not None else _no_struct
        )
        self._values = msgspec.json.Decoder(list[float]).decode
        self._pack: Callable[..., bytes] = packer.pack if packer is not None else _no_struct
        self._name = spec.name
        self._datatype = spec.datatype
        first = [] if contract.batch.dimension == "none" else [1]
        self._one_row = [*first, *spec.shape]
        self._record = struct.Struct(
            "<"
            + "".join(u.format[1:] for u in unpackers if u is not None)  # one struct for all outputs of a row
        )
        self._one_output = len(contract.outputs) == 1
        self._elements = [output.elements if output.fixed else 0 for output in contract.outputs]
        self._head = b'{"model_name":%s,"model_version":%s,' % (
            self._encode(served.name),
            self._encode(served.version),
        )
        self._one_row_outputs = [
            b'%s{"name":%s,"datatype":"%s","shape":%s,"data":'
            % (
                b"," if i else b'"outputs":[',
                self._encode(spec.name),
                spec.datatype.encode(),
                self._encode([*first, *spec.shape]),
            )
            for i, spec in enumerate(contract.outputs)
        ]
        self._unpack_rows = [unpacker.iter_unpack for unpacker in unpackers if unpacker is not None]
        frame = self._head + b"".join(start + b"[\0]}" for start in self._one_row_outputs) + b"]}"
        self._reply_length = len(frame) - len(self._one_row_outputs)
        # "%" in a name must not be taken for a place to fill.
        self._reply_form = self._ok.replace(b"%b", frame.replace(b"%", b"%%").replace(b"\0", b"%b"))
        before, _, self._reply_end = frame.partition(b"\0")
        self._reply_starts = _Starts(self._ok.replace(b"%b", before.replace(b"%", b"%%")), self._reply_length)
        """With one output: all before the values, by their length."""

    # The short way ---------------------------------------------------------------------------------

    def read_row(self, body: bytes) -> tuple[bytes, str] | None:
        """Raw bytes and request id of a body that is one row of the contract's only input, or None.

        None says nothing about the fault: `read` reads the body again with care.
        """
        before, after, start, end = self._frame
        try:
            if body.startswith(before) and body.endswith(after):
                # All but the list of values is known: what stands between must be a list of numbers.
                # struct refuses a wrong number of values, and numbers that the datatype cannot hold.
                return self._pack(*self._values(body[start:end])), ""
            request = self._plain.decode(body)
            (tensor,) = request.inputs
            if (
                tensor.shape == self._one_row
                and tensor.name == self._name
                and tensor.datatype == self._datatype
            ):
                raw = self._pack(*tensor.data)
                if not request.id:
                    self._learn_frame(body)
                return raw, request.id
        except (msgspec.MsgspecError, ValueError, OverflowError, struct.error):
            return None
        return None

    def _learn_frame(self, body: bytes) -> None:
        """Remember what this client writes around the values, so that the next body need not be parsed as a whole.

        Only a frame that is itself a valid request of one row without values is taken.
        """
        at = body.rfind(b'"data"')
        start, end = body.find(b"[", at), body.find(b"]", at)
        if at < 0 or not at < start < end:
            return
        before, after = body[:start], body[end + 1 :]
        if len(before) + len(after) > _FRAME_BYTES:
            return
        try:
            (tensor,) = self._plain.decode(before + b"[]" + after).inputs
        except (msgspec.MsgspecError, ValueError):
            return
        if tensor.data == [] and tensor.shape == self._one_row and tensor.name == self._name:
            self._frame = (before, after, len(before), -len(after))

    def write_row(self, record: bytes, request_id: str) -> bytes:
        """The whole HTTP reply for one row's outputs, one after another as in `parbake.contract.record`."""
        values = self._record.unpack(record)
        if self._one_output and not request_id:
            text = self._encode(values)[1:-1]
            if b"null" not in text:
                return self._reply_starts[len(text)] + text + self._reply_end
        parts: list[bytes] = [self._head, self._id(request_id)]
        at = 0
        for start, count in zip(self._one_row_outputs, self._elements, strict=True):
            parts += (start, self._encode(values[at : at + count]), b"}")
            at += count
        parts.append(b"]}")
        payload = b"".join(parts)
        if b"null" in payload:
            # JSON has no word for NaN and infinities; ours are written the general way.
            payload = self.write(self._answer(record), InferCall(Inputs([], 1, ()), request_id))[0]
        return self._ok % (len(payload), payload)

    def write_rows(self, raws: Sequence[bytes]) -> list[bytes] | None:
        """The whole HTTP replies for a batch of rows without request ids, given each output's raw bytes.

        One call encodes all values of an output. None where a value has no word in JSON: use `write_row`.
        """
        texts: list[list[bytes]] = []
        for unpack, raw in zip(self._unpack_rows, raws, strict=True):
            encoded = self._encode(list(unpack(raw)))
            if b"null" in encoded:
                return None
            # Lists of numbers: what stands between two rows can stand nowhere else.
            texts.append(encoded[2:-2].split(b"],["))
        if len(texts) == 1:
            starts, end = self._reply_starts, self._reply_end
            return [starts[len(text)] + text + end for text in texts[0]]
        form, length = self._reply_form, self._reply_length
        return [form % (length + sum(map(len, row)), *row) for row in zip(*texts, strict=True)]

    def _id(self, request_id: str) -> bytes:
        return b'"id":%b,' % self._encode(request_id) if request_id else b""

    def _answer(self, record: bytes) -> Answer:
        raws, shapes = Records(self._served.contract).split(record)
        return Answer(raws, shapes, 1)

    # The same with binary tensors ------------------------------------------------------------------

    def binary_row(self, raw: bytes) -> bool:
        """Whether raw bytes are one row of the contract's only input, of values that it allows."""
        if len(raw) != self._row_bytes:
            return False
        if self._allow_nan:
            return True
        # One that is no finite number makes the sum none; so may a sum that is too large, and `read` tells them apart.
        return isfinite(sum(self._unpack_row(raw)))

    def learn_binary(self, head: bytes, call: InferCall) -> None:
        """Remember the JSON that stood before one row's raw bytes, and how the replies to it begin."""
        plainly = not call.timeout_s and call.priority == NORMAL and call.inputs.rows == 1
        if not plainly or len(head) > _FRAME_BYTES:
            return
        reply = b""
        if call.wanted is not None:
            if call.wanted != tuple((i, True) for i in range(len(self._specs))):
                return
            nothing = Answer(
                [bytes(spec.row_bytes or 0) for spec in self._specs], [s.shape for s in self._specs], 1
            )
            payload, size = self.write(nothing, call)
            reply = (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n%b: %b\r\ncontent-length: %d\r\n"
                b"inference-header-content-length: %d\r\n\r\n%b"
                % (VERSION, self._served.version.encode(), len(payload), size or 0, payload[:size])
            )
        if len(self.binary) >= _MOST_FRAMES:
            self.binary.clear()
        self.binary[head] = (reply, call.id)

    # Requests --------------------------------------------------------------------------------------

    def read(self, body: bytes, json_bytes: int | None) -> InferCall:
        """Read a request. ``json_bytes`` is the length of the JSON part where binary tensors follow it.

        Raises `MalformedBody`, `InvalidInput` or `RequestTooLarge`.
        """
        binary = b""
        if json_bytes is not None:
            if not 0 <= json_bytes <= len(body):
                raise MalformedBody(
                    f"inference-header-content-length is {json_bytes}, the body has {len(body)} bytes"
                )
            body, binary = body[:json_bytes], body[json_bytes:]
        request = decode_json(self._decoder, body)
        refuse_unsupported(request.parameters, "$.parameters")
        given: list[Given] = []
        at = 0
        for i, tensor in enumerate(request.inputs):
            path = f"$.inputs[{i}]"
            refuse_unsupported(tensor.parameters, f"{path}.parameters")
            size = tensor.parameters.get("binary_data_size")
            if size is not None:
                if type(size) is not int or size < 0 or size > len(binary) - at:
                    raise InvalidInput(
                        f"binary_data_size is {repr(size)[:60]}, {len(binary) - at} bytes are left",
                        path=f"{path}.parameters.binary_data_size",
                    )
                if bytes(tensor.data):
                    raise InvalidInput("both data and binary_data_size are given", path=path)
                raw = binary[at : at + size]
                at += size
            else:
                raw = self._raw_of(tensor, path)
            given.append(Given(tensor.name, tensor.datatype, tensor.shape, raw, path))
        if at != len(binary):
            raise MalformedBody(
                f"{len(binary) - at} bytes of binary data belong to no input",
                path="$.inputs",
                hint="each binary tensor needs its binary_data_size",
            )
        inputs = gather(self._served, given)
        parameters = request.parameters
        return InferCall(
            inputs,
            request.id,
            timeout_s(parameters),
            priority_of(parameters),
            self._wanted(request),
            parameters,
        )

    def _raw_of(self, tensor: InputTensor, path: str) -> bytes:
        spec = self._served.contract.input(tensor.name)
        if spec is None or tensor.datatype != spec.datatype:
            # `gather` says what is wrong with it.
            return b""
        data = bytes(tensor.data)
        if not data:
            raise InvalidInput(f"input {tensor.name!r} has no data", path=f"{path}.data")
        rows, shape = row_shape(self._served.contract, spec, tensor.shape, f"{path}.shape")
        count = rows * math.prod(shape)
        if spec.datatype != "BYTES" and data.count(b",") >= max(count, 1):
            # Told before a list of far too many values is made.
            raise _miscounted(tensor, count, data.count(b",") + 1, path)
        try:
            values = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise InvalidInput(message.replace("`", ""), path=f"{path}.data") from error
        if not isinstance(values, list):
            raise InvalidInput(f"expected a list, got {type(values).__name__}", path=f"{path}.data")
        names: Sequence[str] = ()
        if values and isinstance(values[0], list):
            values, names = flatten(values, tensor.shape, f"{path}.data")
        if len(values) != count:
            raise _miscounted(tensor, count, len(values), path)
        return pack_values(spec, values, f"{path}.data", names)

    def _wanted(self, request: InferRequest) -> tuple[tuple[int, bool], ...] | None:
        everything_binary = request.parameters.get("binary_data_output", False)
        if type(everything_binary) is not bool:
            raise InvalidInput("expected true or false", path="$.parameters.binary_data_output")
        if not request.outputs:
            return tuple((i, True) for i in range(len(self._specs))) if everything_binary else None
        wanted: list[tuple[int, bool]] = []
        for i, output in enumerate(request.outputs):
            path = f"$.outputs[{i}]"
            refuse_unsupported(output.parameters, f"{path}.parameters")
            position = output_position(self._served, output.name, f"{path}.name")
            binary = output.parameters.get("binary_data", everything_binary)
            if type(binary) is not bool:
                raise InvalidInput("expected true or false", path=f"{path}.parameters.binary_data")
            if any(position == other for other, _ in wanted):
                raise InvalidInput(f"output {output.name!r} is asked for twice", path=f"{path}.name")
            wanted.append((position, binary))
        return tuple(wanted)

    # Replies ---------------------------------------------------------------------------------------

    def write(self, answer: Answer, call: InferCall) -> tuple[bytes, int | None]:
        """The reply's body, and the length of its JSON part where binary tensors follow."""
        wanted = call.wanted or tuple((i, False) for i in range(len(self._specs)))
        rows = [] if self._served.contract.batch.dimension == "none" else [answer.rows]
        outputs: list[dict[str, Any]] = []
        blobs: list[bytes] = []
        for i, binary in wanted:
            spec, raw, shape = self._specs[i], answer.raws[i], answer.shapes[i]
            output: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": [*rows, *shape]}
            if binary:
                output["parameters"] = {"binary_data_size": len(raw)}
                blobs.append(raw)
            else:
                try:
                    output["data"] = unpack_values(spec, raw)
                except UnicodeDecodeError as error:
                    raise InvalidRequest(
                        f"output {spec.name!r} is not UTF-8 text, which JSON cannot carry",
                        hint="ask for it as binary data (parameters.binary_data)",
                    ) from error
            outputs.append(output)
        reply: dict[str, Any] = {"model_name": self._served.name, "model_version": self._served.version}
        if call.id:
            reply["id"] = call.id
        reply["outputs"] = outputs
        head = self._encode(reply)
        if not blobs:
            return head, None
        return b"".join((head, *blobs)), len(head)


class _Starts(dict[int, bytes]):
    """The beginning of a reply by the length of its values, made when it is first needed."""

    def __init__(self, form: bytes, length: int) -> None:
        super().__init__()
        self._form = form
        self._length = length

    def __missing__(self, size: int) -> bytes:
        start = self[size] = self._form % (self._length + size)
        return start


def flatten(values: list[Any], shape: Sequence[int], path: str) -> tuple[list[Any], Sequence[str]]:
    """Nested lists as one, with the path of each value. Raises `InvalidInput` where they do not have the shape."""
    if len(shape) > _MOST_DIMENSIONS:
        raise InvalidInput(f"{len(shape)} dimensions, the limit is {_MOST_DIMENSIONS}", path=path)
    level: list[Any] = [values]
    for depth, size in enumerate(shape):
        deeper: list[Any] = []
        for i, value in enumerate(level):
            if not isinstance(value, list) or len(value) != size:
                got = f"{len(value)} values" if isinstance(value, list) else type(value).__name__
                at = Places(path, shape[:depth], len(level))[i]
                raise InvalidInput(f"expected {size} values as in shape {list(shape)}, got {got}", path=at)
            deeper += value
        level = deeper
    places = Places(path, shape, len(level))
    for i, value in enumerate(level):
        if type(value) is list:
            raise InvalidInput(f"nested deeper than the shape {list(shape)}", path=places[i])
    return level, places


def _miscounted(tensor: InputTensor, count: int, got: int, path: str) -> InvalidInput:
    return InvalidInput(f"shape {tensor.shape} takes {count} values, got {got}", path=f"{path}.data")


class Places(Sequence[str]):
    """The paths of values of nested lists, each made when it is asked for: most never are."""

    def __init__(self, path: str, shape: Sequence[int], count: int) -> None:
        self._path = path
        self._shape = shape
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...

    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self._count))]
        if not 0 <= at < self._count:
            raise IndexError(at)
        places: list[int] = []
        for size in reversed(self._shape):
            at, place = divmod(at, size)
            places.append(place)
        return self._path + "".join(f"[{place}]" for place in reversed(places))


def decode_json(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """Decode, with errors as ours: `MalformedBody` for what is not JSON, `InvalidInput` with its path otherwise."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        raise InvalidInput(message.replace("`", ""), path=path.strip("`") or "$") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBody(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise MalformedBody("the body is nested too deeply") from error


def _no_struct(*_: Any) -> Any:
    raise ValueError("this contract's input is not a row of numbers")
