"""Requests over gRPC: typed and raw contents mean the same bits; what does not fit is refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY, Datatype
from parbake.contract.model import Batch, Contract, TensorSpec
from parbake.contract.tensors import to_raw
from parbake.errors import InvalidInput, InvalidRequest, ParbakeError, RequestTooLarge
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.transports.grpc.codec import GrpcCodec, values_of
from parbake.transports.grpc.messages import message, parse

X = TensorSpec("x", "FP32", (2,))
Y = TensorSpec("y", "INT64", (1,))
Z = TensorSpec("z", "BYTES", ())

Request = message("ModelInferRequest")


def serve(
    inputs: Sequence[TensorSpec] = (X,), outputs: Sequence[TensorSpec] = (Y, Z), **rest: Any
) -> ServedVersion:
    contract = Contract(
        "eta", tuple(inputs), tuple(outputs), steps=(), purpose="tests", owner="tests", **rest
    )
    return ServedVersion(
        "eta",
        "3",
        contract,
        "sha256:0",
        mode="dynamic",
        table=None,
        batcher=None,
        deadline_s=1.0,
        stats=Stats(),
    )


def request(*tensors: dict[str, Any], raw: Sequence[bytes] = (), **rest: Any) -> Any:
    return Request(model_name="eta", inputs=tensors, raw_input_contents=raw, **rest)


def tensor(
    name: str = "x", datatype: str = "FP32", shape: Sequence[int] = (1, 2), **contents: Any
) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "contents": contents}


def refusal(asked: Any, served: ServedVersion | None = None) -> str:
    with pytest.raises(ParbakeError) as caught:
        GrpcCodec(served or serve()).read(asked)
    assert isinstance(caught.value, InvalidRequest)
    return str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            request(tensor(fp32_contents=[1.0])),
            "shape [1, 2] of FP32 takes 8 bytes, input 'x' has 4 at $.inputs[0]",
        ),
        (
            request(tensor(fp64_contents=[1.0, 2.0])),
            "FP32 goes into fp32_contents, got fp64_contents at $.inputs[0].contents",
        ),
        (
            request(tensor(fp32_contents=[1.0, math.nan])),
            "holds nan and the contract allows only finite numbers at $.inputs[0]",
        ),
        (
            request(tensor(datatype="FP64", fp64_contents=[1, 2])),
            "expected FP32 for input 'x', got 'FP64' at $.inputs[0].datatype",
        ),
        (
            request(tensor(shape=[2], fp32_contents=[1, 2])),
            "expected shape [any, 2] for input 'x', got [2] at $.inputs[0].shape",
        ),
        (
            request(tensor(name="u", fp32_contents=[1, 2])),
            "model 'eta' has no input 'u' at $.inputs[0].name\nhint: its inputs are x FP32",
        ),
        (request(), "input 'x' is missing at $.inputs"),
        (request(tensor(), tensor(), raw=[b"", b""]), "input 'x' is given twice at $.inputs[1].name"),
        (request(tensor(), raw=[bytes(8), bytes(8)]), "2 raw contents for 1 inputs at $.raw_input_contents"),
        (
            request(tensor(fp32_contents=[1, 2]), raw=[bytes(8)]),
            "both contents and raw_input_contents are given at $.inputs[0]",
        ),
        (request(tensor(), raw=[bytes(7)]), "takes 8 bytes, input 'x' has 7"),
        (
            request(tensor(), raw=[bytes(8)], outputs=[{"name": "w"}]),
            "model 'eta' has no output 'w' at $.outputs[0].name\nhint: its outputs are y, z",
        ),
        (
            request(tensor(), raw=[bytes(8)], parameters={"sequence_id": {"int64_param": 7}}),
            "sequence_id is not supported at $.parameters.sequence_id\nhint: this server keeps no sequences",
        ),
        (
            request(
                {**tensor(), "parameters": {"shared_memory_region": {"string_param": "r"}}}, raw=[bytes(8)]
            ),
            "shared_memory_region is not supported at $.inputs[0].parameters.shared_memory_region",
        ),
        (
            request(
                tensor(),
                raw=[bytes(8)],
                outputs=[{"name": "y", "parameters": {"classification": {"int64_param": 3}}}],
            ),
            "classification is not supported at $.outputs[0].parameters.classification\nhint: ask for the prob",
        ),
        (
            request(tensor(), raw=[bytes(8)], parameters={"timeout": {"string_param": "soon"}}),
            "expected microseconds as a whole number, got 'soon' at $.parameters.timeout",
        ),
    ],
)
def test_a_refusal_says_what_where_and_what_to_do(asked: Any, message: str) -> None:
    assert message in refusal(asked)


def test_half_precision_is_raw_only() -> None:
    served = serve([TensorSpec("x", "FP16", (2,))])
    expected = "FP16 has no typed contents at $.inputs[0].contents\nhint: send 'x' in raw_input_contents"
    assert refusal(request(tensor(datatype="FP16", fp32_contents=[1, 2])), served) == expected
    call = GrpcCodec(served).read(request(tensor(datatype="FP16"), raw=[b"\0\x3c\0\0"]))
    assert call.inputs.raws == [b"\0\x3c\0\0"]


def test_a_small_integer_is_never_cut_to_size() -> None:
    text = refusal(
        request(tensor(datatype="INT8", int_contents=[1, 200])), serve([TensorSpec("x", "INT8", (2,))])
    )
    assert text == (
        "expected INT8, got 200 at $.inputs[0].contents.int_contents[1]\nhint: 'x' takes whole numbers from -128 to 127"
    )


def test_too_many_rows_are_refused() -> None:
    served = serve(batch=Batch(max_rows=2))
    with pytest.raises(RequestTooLarge, match="3 rows in one request, the limit of 'eta' is 2"):
        GrpcCodec(served).read(request(tensor(shape=[3, 2]), raw=[bytes(24)]))


def test_parameters_have_their_plain_values() -> None:
    asked = request(parameters={"a": {"bool_param": True}, "b": {"uint64_param": 1 << 63}, "c": {}})
    assert values_of(asked.parameters) == {"a": True, "b": 1 << 63, "c": None}
    call = GrpcCodec(serve()).read(
        request(tensor(), raw=[bytes(8)], parameters={"timeout": {"int64_param": 2500}})
    )
    assert call.timeout_s == 0.0025


def test_the_reply_has_the_outputs_that_were_asked_for_in_that_order() -> None:
    codec = GrpcCodec(serve())
    answer = Answer([bytes(16), b"\1\0\0\0a\0\0\0\0"], [(1,), ()], 2)
    for names, outputs in (((), ["y", "z"]), (("z",), ["z"]), (("z", "y"), ["z", "y"])):
        asked = request(
            tensor(shape=[2, 2]), raw=[bytes(16)], id="q", outputs=[{"name": name} for name in names]
        )
        reply = codec.write(answer, codec.read(asked))
        assert (reply.model_name, reply.model_version, reply.id) == ("eta", "3", "q")
        assert [output.name for output in reply.outputs] == outputs
        raws = dict(zip(outputs, reply.raw_output_contents, strict=True))
        assert raws == {name: {"y": bytes(16), "z": b"\1\0\0\0a\0\0\0\0"}[name] for name in outputs}
        shapes = {"y": [2, 1], "z": [2]}
        assert [list(output.shape) for output in reply.outputs] == [shapes[name] for name in outputs]


def test_a_model_without_an_axis_for_rows_is_answered_without_one() -> None:
    codec = GrpcCodec(serve(outputs=[Y], batch=Batch(dimension="none")))
    call = codec.read(request(tensor(shape=[2]), raw=[bytes(8)]))
    assert call.inputs.rows == 1
    reply = codec.write(Answer([bytes(8)], [(1,)], 1), call)
    assert list(reply.outputs[0].shape) == [1]


# Both forms agree ----------------------------------------------------------------------------------

FIELDS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "BOOL": "bool_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def values_for(datatype: str) -> st.SearchStrategy[Any]:
    if datatype == "BYTES":
        return st.binary(max_size=8)
    if datatype == "BOOL":
        return st.booleans()
    if datatype in INTEGERS:
        limits = np.iinfo(NUMPY[datatype])  # type: ignore[type-var]  # an integer dtype
        return st.integers(int(limits.min), int(limits.max))
    return st.floats(width=32 if datatype == "FP32" else 64, allow_nan=False)


@given(st.data())
def test_typed_and_raw_contents_are_the_same_bits(data: st.DataObject) -> None:
    datatype: Datatype = data.draw(st.sampled_from([name for name in get_args(Datatype) if name in FIELDS]))
    rows = data.draw(st.integers(1, 3))
    values = data.draw(st.lists(values_for(datatype), min_size=2 * rows, max_size=2 * rows))
    codec = GrpcCodec(serve([TensorSpec("x", datatype, (2,), allow_nan=datatype in FLOATS)]))
    array = np.empty(len(values), object)
    array[:] = values
    raw = to_raw(array if datatype == "BYTES" else array.astype(NUMPY[datatype]), datatype)
    head = {"name": "x", "datatype": datatype, "shape": [rows, 2]}
    typed = request({**head, "contents": {FIELDS[datatype]: values}})
    packed = request(head, raw=[raw])
    assert codec.read(typed).inputs == codec.read(packed).inputs
    assert codec.read(typed).inputs.raws == [raw]


@given(
    st.lists(
        st.fixed_dictionaries({
            "name": st.sampled_from(["x", "y", ""]),
            "datatype": st.sampled_from(["FP32", "BYTES", "", "INT8"]),
            "shape": st.lists(st.integers(-2, 3) | st.integers(-(2**63), 2**63 - 1), max_size=4),
        }),
        max_size=3,
    ),
    st.lists(st.binary(max_size=20), max_size=3),
    st.binary(max_size=12),
)  # fmt: skip
def test_lying_shapes_and_torn_bytes_give_nothing_but_refusals(
    tensors: list[dict[str, Any]], raws: list[bytes], torn: bytes
) -> None:
    codec = GrpcCodec(serve([X, TensorSpec("y", "BYTES", (-1,))]))
    whole = request(*tensors, raw=raws).SerializeToString()
    for data in (whole, whole[: len(whole) // 2], whole + torn, torn):
        try:
            call = codec.read(parse(Request, data))
        except InvalidRequest:
            continue
        assert call.inputs.rows >= 1


def test_a_shape_whose_product_overflows_is_refused() -> None:
    served = serve([TensorSpec("y", "BYTES", (-1, -1))])
    big = 2**62
    with pytest.raises(InvalidInput, match="BYTES elements"):
        GrpcCodec(served).read(request(tensor("y", "BYTES", [1, big, big]), raw=[b""]))
