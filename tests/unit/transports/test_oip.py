"""Inference requests over REST, read with care: every fault is named with its path, its value and the remedy."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import Batch, Contract, Key, TensorSpec
from parbake.contract.tensors import to_raw
from parbake.errors import InvalidInput, InvalidRequest, MalformedBody, ParbakeError, RequestTooLarge
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.transports.http.oip import InferCall, InferCodec, Places, flatten
from parbake.transports.inputs import Inputs

X = TensorSpec("x", "FP32", (2,))
AGE = TensorSpec("age", "INT8")
NAME = TensorSpec("name", "BYTES")
FLAG = TensorSpec("flag", "BOOL")
GAPPY = TensorSpec("gappy", "FP64", (2,), allow_nan=True)


def codec_of(
    *inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (X,), mode: Any = "dynamic", **rest: Any
) -> InferCodec:
    contract = Contract("eta", inputs or (X,), outputs, steps=(), purpose="tests", owner="tests", **rest)
    return InferCodec(
        ServedVersion(
            "eta",
            "1",
            contract,
            "sha256:0",
            mode=mode,
            table=None,
            batcher=None,
            deadline_s=1.0,
            stats=Stats(),
        )
    )


def tensor(
    name: str, datatype: str, shape: list[int], data: object = None, **parameters: object
) -> dict[str, Any]:
    given: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
    if data is not None:
        given["data"] = data
    if parameters:
        given["parameters"] = parameters
    return given


def read(codec: InferCodec, *tensors: dict[str, Any], **rest: object) -> InferCall:
    return codec.read(json.dumps({"inputs": tensors, **rest}).encode(), None)


def test_inputs_come_in_any_order_flat_or_nested() -> None:
    codec = codec_of(X, AGE, NAME, FLAG)
    call = read(
        codec,
        tensor("flag", "BOOL", [2], [True, False]),
        tensor("name", "BYTES", [2], ["a", "é"]),
        tensor("x", "FP32", [2, 2], [[1, 2], [3.5, 4]]),
        tensor("age", "INT8", [2], [-128, 127]),
        id="seven",
    )
    assert call.inputs.rows == 2
    assert call.inputs.shapes == ((2,), (), (), ())
    x, age, name, flag = call.inputs.raws
    assert x == np.array([1, 2, 3.5, 4], "<f4").tobytes()
    assert (age, flag) == (b"\x80\x7f", b"\1\0")
    assert name == b"\1\0\0\0a\2\0\0\0\xc3\xa9"
    assert (call.id, call.wanted, call.timeout_s) == ("seven", None, 0.0)


@given(st.integers(1, 4), st.data())
def test_binary_and_json_give_the_same_rows(rows: int, data: st.DataObject) -> None:
    codec = codec_of(X, NAME)
    x = np.array(
        data.draw(st.lists(st.floats(-9, 9, width=32), min_size=2 * rows, max_size=2 * rows)), "f4"
    ).reshape(rows, 2)
    names = np.array(data.draw(st.lists(st.text(max_size=4), min_size=rows, max_size=rows)), dtype=object)
    plain = read(
        codec,
        tensor("x", "FP32", [rows, 2], x.reshape(-1).tolist()),
        tensor("name", "BYTES", [rows], names.tolist()),
    )
    raws = [to_raw(x, "FP32"), to_raw(names, "BYTES")]
    for binary in ((0,), (1,), (0, 1)):
        tensors = [
            tensor("x", "FP32", [rows, 2], x.tolist()),
            tensor("name", "BYTES", [rows], names.tolist()),
        ]
        for at in binary:
            del tensors[at]["data"]
            tensors[at]["parameters"] = {"binary_data_size": len(raws[at])}
        head = json.dumps({"inputs": tensors}).encode()
        call = codec.read(head + b"".join(raws[at] for at in binary), len(head))
        assert call.inputs == plain.inputs


ROW = tensor("x", "FP32", [1, 2], [1.0, 2.0])
ONE = "$.inputs[0]"


def x(shape: list[int], data: object = None, **parameters: object) -> dict[str, Any]:
    return {"inputs": [tensor("x", "FP32", shape, data, **parameters)]}


def row(**more: object) -> dict[str, Any]:
    return {"inputs": [ROW], **more}


# Request, path, what stands in the message, what stands in the hint.
FAULTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "$", "missing required field inputs", ""),
    (row(extra=1), "$", "unknown field extra", ""),
    ({"inputs": [{**ROW, "unit": "m"}]}, ONE, "unknown field unit", ""),
    ({"inputs": "x"}, "$.inputs", "Expected array, got str", ""),
    ({"inputs": []}, "$.inputs", "input 'x' is missing", "x FP32 [any, 2]"),
    ({"inputs": [ROW, ROW]}, "$.inputs[1].name", "'x' is given twice", ""),
    ({"inputs": [tensor("z", "FP32", [1], [1])]}, f"{ONE}.name", "no input 'z'", "its inputs are x FP32 [any, 2]"),
    ({"inputs": [tensor("x" * 999, "FP32", [1], [1])]}, f"{ONE}.name", "no input 'xxx", ""),
    ({"inputs": [tensor("x", "FP64", [1, 2], [1, 2])]}, f"{ONE}.datatype", "got 'FP64'", "send 'x' as FP32"),
    (x([1, 3], [1, 2, 3]), f"{ONE}.shape", "expected shape [any, 2] for input 'x', got [1, 3]", "number of rows"),
    (x([2], [1, 2]), f"{ONE}.shape", "got [2]", "number of rows"),
    (x([-1, 2], []), f"{ONE}.shape", "got [-1, 2]", ""),
    (x([0, 2], []), f"{ONE}.shape", "has no rows", "at least one row"),
    (x([], []), f"{ONE}.shape", "got []", ""),
    (x([1, 2], [1]), f"{ONE}.data", "shape [1, 2] takes 2 values, got 1", ""),
    (x([1, 2], [1, 2, 3]), f"{ONE}.data", "takes 2 values, got 3", ""),
    (x([2, 2], [[1, 2], [3]]), f"{ONE}.data[1]", "expected 2 values as in shape [2, 2], got 1 values", ""),
    (x([2, 2], [[1, 2, 3], [4]]), f"{ONE}.data[0]", "expected 2 values as in shape [2, 2], got 3 values", ""),
    (x([2, 2], [[1, 2], 3]), f"{ONE}.data[1]", "expected 2 values as in shape [2, 2], got int", ""),
    (x([2, 2], [[1, 2], [3, [4]]]), f"{ONE}.data[1][1]", "nested deeper", ""),
    (x([1, 2], [1, "old"]), f"{ONE}.data[1]", "expected FP32, got 'old'", "send 'x' as FP32"),
    (x([2, 2], [[1, 2], [3, "old"]]), f"{ONE}.data[1][1]", "got 'old'", ""),
    (x([1, 2], [1, None]), f"{ONE}.data[1]", "got None", "--allow-nan"),
    (x([1, 2], ["NaN", 1]), f"{ONE}.data[0]", "got 'NaN'", "--allow-nan"),
    (x([1, 2], [1, 1e39]), f"{ONE}.data[1]", "got 1e+39", ""),
    (x([1, 2], [True, 1]), f"{ONE}.data[0]", "got True", ""),
    (x([1, 2], {"a": 1}), f"{ONE}.data", "expected a list, got dict", ""),
    (x([1, 2]), f"{ONE}.data", "'x' has no data", ""),
    (row(outputs=[{"name": "z"}]), "$.outputs[0].name", "no output 'z'", "its outputs are x"),
    (row(outputs=[{"name": "x"}, {"name": "x"}]), "$.outputs[1].name", "asked for twice", ""),
    (row(outputs=[{"name": "x", "parameters": {"binary_data": 1}}]), "$.outputs[0].parameters.binary_data",
     "true or false", ""),
    (row(outputs=[{"name": "x", "parameters": {"classification": 3}}]), "$.outputs[0].parameters.classification",
     "not supported", "probabilities"),
    (row(parameters={"binary_data_output": "yes"}), "$.parameters.binary_data_output", "true or false", ""),
    (row(parameters={"timeout": -1}), "$.parameters.timeout", "got '-1'", ""),
    (row(parameters={"timeout": 10**400}), "$.parameters.timeout", "microseconds as a whole number", ""),
    (row(parameters={"sequence_id": 7}), "$.parameters.sequence_id", "not supported", ""),
    (x([1, 2], shared_memory_region="r"), f"{ONE}.parameters.shared_memory_region", "not supported", "send the tensor"),
    (x([1, 2], [1, 2], binary_data_size=0), ONE, "both data and binary_data_size", ""),
    (x([1, 2], binary_data_size=8), f"{ONE}.parameters.binary_data_size", "is 8, 0 bytes are left", ""),
    (x([1, 2], binary_data_size=["long" * 100]), f"{ONE}.parameters.binary_data_size", "bytes are left", ""),
]  # fmt: skip


def check(codec: InferCodec, request: dict[str, Any], path: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        codec.read(json.dumps(request).encode(), None)
    assert caught.value.path == path
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(("request_", "path", "message", "hint"), FAULTS)
def test_a_fault_is_named_with_its_path_value_and_remedy(
    request_: dict[str, Any], path: str, message: str, hint: str
) -> None:
    check(codec_of(), request_, path, message, hint)


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        (AGE, 128, "expected INT8, got 128"),
        (AGE, 1.0, "expected INT8, got 1.0"),
        (AGE, True, "expected INT8, got True"),
        (NAME, 7, "expected BYTES, got 7"),
        (FLAG, 1, "expected BOOL, got 1"),
        (TensorSpec("n", "UINT64"), -1, "expected UINT64, got -1"),
        (TensorSpec("n", "UINT64"), 2**64, "expected UINT64, got 18446744073709551616"),
        (TensorSpec("h", "FP16"), 65520, "expected FP16, got 65520"),
    ],
)
def test_a_value_that_the_datatype_cannot_hold_is_shown(spec: TensorSpec, data: object, message: str) -> None:
    request = {"inputs": [tensor(spec.name, spec.datatype, [2], [data, data])]}
    check(codec_of(spec), request, f"{ONE}.data[0]", message, f"send '{spec.name}' as {spec.datatype}")


def test_inputs_must_agree_on_the_number_of_rows_and_be_whole() -> None:
    codec = codec_of(X, AGE)
    check(codec, row(), "$.inputs", "input 'age' is missing", "age INT8 [any]")
    both = {"inputs": [ROW, tensor("age", "INT8", [2], [1, 2])]}
    check(codec, both, "$.inputs[1].shape", "has 2 rows, the one before has 1", "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nope",
        b'{"inputs":[}',
        b"\xff\xfe",
        b'{"inputs":' + b"[" * 100_000,
        b'"' + b"\\ud800" + b'"',
        b"1 2",
    ],
)
def test_what_is_not_json_is_malformed(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec_of().read(body, None)
    # What is JSON, but no object, is told so with its path.
    assert isinstance(caught.value, MalformedBody) or caught.value.path.startswith("$")


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        codec_of(NAME).read(
            b'{"inputs":[{"name":"name","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}', None
        )


def test_missing_values_are_read_where_the_contract_allows_them() -> None:
    call = read(
        codec_of(GAPPY), tensor("gappy", "FP64", [3, 2], [None, 1.0, "NaN", "Infinity", "-Infinity", 2])
    )
    values = np.frombuffer(call.inputs.raws[0])
    assert np.isnan(values[[0, 2]]).all()
    assert values[[1, 3, 4, 5]].tolist() == [1.0, np.inf, -np.inf, 2.0]
    with pytest.raises(InvalidInput, match="expected FP64, got 'nan'"):
        read(codec_of(GAPPY), tensor("gappy", "FP64", [1, 2], ["nan", 1]))


@pytest.mark.parametrize(
    ("spec", "raw", "path", "message"),
    [
        (
            X,
            struct.pack("<2f", 1, float("nan")),
            "$.inputs[0].data[1]",
            "holds nan and the contract allows only finite",
        ),
        (X, struct.pack("<2f", float("inf"), 1), "$.inputs[0].data[0]", "holds inf"),
        (X, b"\0" * 7, "$.inputs[0]", "shape [1, 2] of FP32 takes 8 bytes, input 'x' has 7"),
        (TensorSpec("x", "BOOL", (2,)), b"\1\2", "$.inputs[0].data[1]", "holds the byte 2, expected 0 or 1"),
        (TensorSpec("x", "BYTES", (2,)), b"\1\0\0\0a", "$.inputs[0]", "takes 2 BYTES elements, got 1"),
        (
            TensorSpec("x", "BYTES", (2,)),
            b"\xff\xff\xff\xffa",
            "$.inputs[0]",
            "claims 4294967295 bytes, 1 are left",
        ),
        (TensorSpec("x", "BYTES", (2,)), b"\1\0", "$.inputs[0]", "cut short"),
        (TensorSpec("x", "BYTES", (2,)), b"\0" * 12, "$.inputs[0]", "4 bytes left over"),
    ],
)
def test_binary_data_is_held_against_the_contract(
    spec: TensorSpec, raw: bytes, path: str, message: str
) -> None:
    head = json.dumps({"inputs": [tensor("x", spec.datatype, [1, 2], binary_data_size=len(raw))]}).encode()
    with pytest.raises(InvalidInput) as caught:
        codec_of(spec).read(head + raw, len(head))
    assert caught.value.path == path
    assert message in caught.value.message


def test_binary_data_that_belongs_to_nobody_is_refused() -> None:
    head = json.dumps({"inputs": [ROW]}).encode()
    with pytest.raises(MalformedBody, match="3 bytes of binary data belong to no input"):
        codec_of().read(head + b"abc", len(head))
    with pytest.raises(MalformedBody, match="inference-header-content-length is 999, the body has"):
        codec_of().read(head, 999)


def test_too_many_rows_name_the_limit_and_the_way_out() -> None:
    codec = codec_of(batch=Batch(max_rows=2))
    with pytest.raises(RequestTooLarge, match=r"3 rows in one request, the limit of 'eta' is 2") as caught:
        read(codec, tensor("x", "FP32", [3, 2], [[1, 2]] * 3))
    assert "parbake bake" in caught.value.hint


def test_a_shape_made_to_keep_the_server_busy_is_refused_at_once() -> None:
    started = time.perf_counter()
    for shape in ([2**62] * 200_000, [10**4000] * 30, [1, 10**4000]):
        with pytest.raises(ParbakeError) as caught:
            read(codec_of(), tensor("x", "FP32", shape, [1, 2]))
        assert isinstance(caught.value, InvalidRequest)
    assert time.perf_counter() - started < 20


def test_far_too_many_values_are_refused_before_they_are_read() -> None:
    body = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1' + b",1" * 2_000_000 + b"]}]}"
    with pytest.raises(InvalidInput, match=r"takes 2 values, got 2000001"):
        codec_of().read(body, None)


def test_static_mode_needs_only_what_makes_the_key() -> None:
    codec = codec_of(X, NAME, mode="static", key=Key(columns=("name",)))
    call = read(codec, tensor("name", "BYTES", [2], ["a", "b"]))
    assert call.inputs.rows == 2
    assert call.inputs.raws == [b"", b"\1\0\0\0a\1\0\0\0b"]
    with pytest.raises(InvalidInput, match="'name' is missing"):
        read(codec, ROW)


def test_a_model_without_a_batch_dimension_takes_one_row_without_its_axis() -> None:
    codec = codec_of(X, TensorSpec("n", "INT64"), batch=Batch(dimension="none"))
    call = read(codec, tensor("x", "FP32", [2], [1, 2]), tensor("n", "INT64", [], [7]))
    assert (call.inputs.rows, call.inputs.shapes) == (1, ((2,), ()))
    payload, _ = codec.write(Answer([call.inputs.raws[0]], [(2,)], 1), call)
    assert msgspec.json.decode(payload)["outputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}
    ]
    with pytest.raises(InvalidInput, match=r"expected shape \[2\] for input 'x', got \[1, 2\]"):
        read(codec, tensor("x", "FP32", [1, 2], [1, 2]), tensor("n", "INT64", [], [7]))


def test_open_shapes_are_whatever_the_request_says() -> None:
    codec = codec_of(TensorSpec("t", "INT64", (-1, 2)))
    call = read(codec, tensor("t", "INT64", [1, 3, 2], [[[1, 2], [3, 4], [5, 6]]]))
    assert call.inputs.shapes == ((3, 2),)
    assert read(codec, tensor("t", "INT64", [2, 0, 2], [])).inputs.raws == [b""]


OUTPUTS = (TensorSpec("p", "FP32", (2,)), TensorSpec("label", "BYTES"), TensorSpec("ok", "BOOL"))
ANSWER = Answer(
    [struct.pack("<4f", 0.25, float("nan"), float("inf"), -0.0), b"\1\0\0\0a\2\0\0\0\xc3\xa9", b"\1\0"],
    [(2,), (), ()],
    2,
)


def test_a_reply_names_model_version_id_and_outputs() -> None:
    codec = codec_of(outputs=OUTPUTS)
    payload, json_bytes = codec.write(ANSWER, InferCall(Inputs([], 2, ()), "seven"))
    assert json_bytes is None
    assert json.loads(payload) == {
        "model_name": "eta",
        "model_version": "1",
        "id": "seven",
        "outputs": [
            {"name": "p", "datatype": "FP32", "shape": [2, 2], "data": [0.25, "NaN", "Infinity", -0.0]},
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["a", "é"]},
            {"name": "ok", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        ],
    }


def test_outputs_come_as_they_were_asked_for() -> None:
    codec = codec_of(outputs=OUTPUTS)
    call = read(codec, ROW, outputs=[{"name": "ok"}, {"name": "p", "parameters": {"binary_data": True}}])
    payload, json_bytes = codec.write(ANSWER, call)
    assert json_bytes is not None
    reply = json.loads(payload[:json_bytes])
    assert [output["name"] for output in reply["outputs"]] == ["ok", "p"]
    assert reply["outputs"][1]["parameters"] == {"binary_data_size": 16}
    assert payload[json_bytes:] == ANSWER.raws[0]
    everything, json_bytes = codec.write(ANSWER, read(codec, ROW, parameters={"binary_data_output": True}))
    assert everything[json_bytes:] == b"".join(ANSWER.raws)


def test_bytes_that_are_no_text_can_only_be_had_as_binary_data() -> None:
    codec = codec_of(outputs=OUTPUTS)
    answer = Answer([ANSWER.raws[0], b"\1\0\0\0\xff\0\0\0\0", ANSWER.raws[2]], ANSWER.shapes, 2)
    with pytest.raises(InvalidRequest, match="'label' is not UTF-8 text") as caught:
        codec.write(answer, read(codec, ROW))
    assert "binary_data" in caught.value.hint
    payload, json_bytes = codec.write(answer, read(codec, ROW, parameters={"binary_data_output": True}))
    assert payload[json_bytes:].endswith(b"\1\0\0\0\xff\0\0\0\0\1\0")


@given(st.lists(st.integers(0, 3), max_size=4), st.data())
def test_nested_lists_are_flattened_and_each_value_keeps_its_path(
    shape: list[int], data: st.DataObject
) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    nested = array.tolist()
    if not shape:
        nested = [nested]
        shape = [1]
        array = array.reshape(1)
    flat, places = flatten(nested, shape, "$")
    assert flat == array.reshape(-1).tolist()
    assert len(places) == len(flat)
    for value, place in zip(flat, places, strict=True):
        here: Any = nested
        for step in place[1:].replace("]", "").split("[")[1:]:
            here = here[int(step)]
        assert here == value
    assert list(places[1:]) == list(places)[1:]


def test_places_end_where_the_values_do() -> None:
    with pytest.raises(IndexError):
        Places("$", [2], 2)[2]
