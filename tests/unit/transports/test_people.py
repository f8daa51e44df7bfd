"""Rows by column name: what is read, what is answered, and what is said about a row that does not fit."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parbake.contract.datatypes import FLOATS, INTEGERS, NUMPY, Datatype
from parbake.contract.model import Batch, Contract, Key, TensorSpec
from parbake.contract.tensors import from_raw, to_raw
from parbake.errors import (
    InvalidRequest,
    KeyNotBaked,
    MalformedBody,
    ParbakeError,
    RequestTooLarge,
)
from parbake.serving.model import Answer
from parbake.serving.service import Mode, ServedVersion
from parbake.serving.stats import Stats
from parbake.tables.memory import MemoryTable
from parbake.transports.http.oip import InferCodec
from parbake.transports.http.people import PeopleCodec, columns_of, example_row

FLOWER = TensorSpec("x", "FP32", (2,), columns=("petal length", "width"), unit="cm")
SHOP = (
    TensorSpec("city", "BYTES", (1,)),
    TensorSpec("age", "FP32", (1,), unit="years"),
    TensorSpec("visits", "INT8", ()),
    TensorSpec("member", "BOOL", (1,)),
)
PRICE = TensorSpec("price", "FP64", (1,))


def serve(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec] = (PRICE,),
    *,
    mode: Mode = "dynamic",
    table: MemoryTable | None = None,
    **rest: Any,
) -> ServedVersion:
    contract = Contract(
        "shop", tuple(inputs), tuple(outputs), steps=(), purpose="tests", owner="tests", **rest
    )
    return ServedVersion(
        "shop", "1", contract, "sha256:0", mode=mode, table=table, batcher=None, deadline_s=1.0, stats=Stats()
    )


def read(served: ServedVersion, body: Any) -> tuple[list[bytes], int]:
    call = PeopleCodec(served).read(body if isinstance(body, bytes) else json.dumps(body).encode(), None)
    return call.inputs.raws, call.inputs.rows


def refusal(served: ServedVersion, body: Any) -> ParbakeError:
    with pytest.raises(ParbakeError) as caught:
        read(served, body)
    return caught.value


# Requests ------------------------------------------------------------------------------------------


def test_a_row_is_an_object_by_column_name() -> None:
    raws, rows = read(serve(SHOP), {"age": 41.5, "city": "Gdańsk", "visits": -3, "member": True})
    assert rows == 1
    assert raws == ["\x07\0\0\0Gdańsk".encode(), struct.pack("<f", 41.5), b"\xfd", b"\x01"]


def test_several_rows_are_a_list() -> None:
    raws, rows = read(serve([FLOWER]), [{"petal length": 1, "width": 2.5}, {"width": 4, "petal length": 3}])
    assert rows == 2
    assert raws == [struct.pack("<4f", 1, 2.5, 3, 4)]


def test_a_tensor_without_column_names_is_a_nested_list() -> None:
    image = TensorSpec("image", "UINT8", (2, 3))
    raws, _ = read(serve([image]), {"image": [[1, 2, 3], [4, 5, 6]]})
    assert raws == [bytes([1, 2, 3, 4, 5, 6])]


def test_an_open_size_is_that_of_the_rows() -> None:
    served = serve([TensorSpec("tokens", "INT64", (-1,))])
    call = PeopleCodec(served).read(b'[{"tokens": [1, 2, 3]}, {"tokens": [4, 5, 6]}]', None)
    assert call.inputs.shapes == ((3,),)
    error = refusal(served, [{"tokens": [1, 2, 3]}, {"tokens": [4]}])
    assert str(error) == (
        "this row has a list of shape [1], the first has a list of shape [3] at $[1].tokens\n"
        "hint: send rows of different shapes in separate requests"
    )


def test_columns_with_the_same_name_in_two_matrices_go_by_the_names_of_the_matrices() -> None:
    twins = [TensorSpec(name, "FP32", (2,), columns=("u", "v")) for name in ("first", "second")]
    raws, _ = read(serve(twins), {"first": [1, 2], "second": [3, 4]})
    assert raws == [struct.pack("<2f", 1, 2), struct.pack("<2f", 3, 4)]


def test_a_name_may_hold_any_sign() -> None:
    odd = [TensorSpec(name, "INT8", ()) for name in ('say "hi"', "back\\slash", "a:b", "", "ключ")]
    raws, _ = read(serve(odd), {spec.name: i for i, spec in enumerate(odd)})
    assert raws == [bytes([i]) for i in range(len(odd))]


def test_missing_values_are_null_or_a_word_where_the_contract_allows_them() -> None:
    served = serve(
        [TensorSpec("age", "FP32", (1,), allow_nan=True), TensorSpec("city", "BYTES", (), allow_nan=True)]
    )
    rows = [{"age": age, "city": None} for age in (None, "NaN", "Infinity", "-Infinity", 3, 0.5)]
    raws, _ = read(served, rows)
    ages = np.frombuffer(raws[0], "<f4")
    assert np.array_equal(
        ages, np.array([math.nan, math.nan, math.inf, -math.inf, 3, 0.5], "f4"), equal_nan=True
    )
    assert raws[1] == bytes(4 * len(rows))


def test_static_mode_needs_only_the_columns_of_the_key() -> None:
    matrix = TensorSpec("x", "FP32", (3,), columns=("store", "day", "stock"))
    inputs = (matrix, TensorSpec("city", "BYTES", ()), TensorSpec("note", "BYTES", ()))
    key = Key(columns=("city", "day"))
    full = serve(inputs, key=key)
    static = serve(inputs, key=key, mode="static", table=MemoryTable("sha256:0", {}))
    assert list(example_row(columns_of(static))) == ["day", "city"]
    row = {"store": 5, "day": 7, "stock": 2, "city": "Bonn", "note": "x"}
    keys = full.keys.of(*read(full, row))
    assert static.keys.of(*read(static, {"day": 7, "city": "Bonn"})) == keys
    assert static.keys.of(*read(static, [{"city": "Bonn", "day": 7, "stock": 9}])) == keys
    assert static.keys.of(*read(static, row)) == keys
    assert refusal(static, {"day": 7}).message == '"city" is missing'
    assert refusal(static, {"day": 7, "city": "Bonn", "note": 3}).path == "$.note"


def test_static_mode_says_which_row_was_never_baked() -> None:
    static = serve(SHOP, mode="static", table=MemoryTable("sha256:0", {}))
    call = PeopleCodec(static).read(json.dumps(example_row(columns_of(static))).encode(), None)
    with pytest.raises(
        KeyNotBaked, match=r"row 0 .* is not in the prediction table of 'shop', which has 0 keys"
    ):
        static.predict(call.inputs.raws, call.inputs.rows, call.inputs.shapes, 0.0, lambda _: None)


# Refusals ------------------------------------------------------------------------------------------

NUMBERS: list[Datatype] = [datatype for datatype in get_args(Datatype) if datatype in FLOATS | INTEGERS]
ROW = {"city": "Bonn", "age": 41.5, "visits": 3, "member": True}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", 'the body is empty at $\nhint: for example {"city": "text", "age": 0, "visits": 0, "member": false}'),
        (b"{", "the body is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        (b'{"city": "\xff"}', "the body is not UTF-8 text: invalid start byte at byte 10"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b'{"age": NaN}', 'NaN is no JSON number\nhint: send null, or "NaN" in quotes, where the contract allows'),
        (3, "expected a row as an object, or a list of rows, got 3 at $"),
        ([], "the list has no rows at $"),
        ([ROW, [1]], "expected a row as an object, got a list of 1 at $[1]"),
        ({**ROW, "age": "old"}, 'expected a number, got "old" at $.age\nhint: "age" is FP32: a number in years'),
        ({**ROW, "age": None}, "expected a number, got null at $.age"),
        ({**ROW, "age": True}, "expected a number, got true at $.age"),
        ({**ROW, "age": 1e39}, "expected a number, got 1e+39 at $.age\nhint: \"age\" is FP32: a number in years"),
        ({**ROW, "age": [41.5]}, "expected a number, got a list of 1 at $.age"),
        ({**ROW, "age": {"years": 41}}, "expected a number, got an object at $.age"),
        ({**ROW, "visits": 1.0}, "expected a whole number, got 1.0 at $.visits"),
        (
            {**ROW, "visits": 128},
            'expected a whole number, got 128 at $.visits\nhint: "visits" is INT8: a whole number from -128 to 127',
        ),
        ({**ROW, "visits": 10**300}, "expected a whole number, got 1000000"),
        ({**ROW, "member": 1}, "expected true or false, got 1 at $.member"),
        ({**ROW, "city": 5}, "expected text, got 5 at $.city"),
        ({**ROW, "city": "\ud800"}, 'expected text, got "\\ud800" at $.city'),
        ([ROW, {**ROW, "visits": "three"}], 'expected a whole number, got "three" at $[1].visits'),
        (
            {**ROW, "Age": 1},
            "model 'shop' has no column \"Age\" at $.Age\nhint: did you mean \"age\" where it says \"Age\"?",
        ),
        (
            [{**ROW, "zzz zzz": 1}],
            "has no column \"zzz zzz\" at $[0][\"zzz zzz\"]\nhint: a row has \"city\", \"age\"",
        ),
        ({"city": "Bonn", "age": 1}, '"visits", "member" are missing at $'),
    ],
)  # fmt: skip
def test_a_refusal_says_what_where_and_what_to_do(body: Any, message: str) -> None:
    assert message in str(refusal(serve(SHOP), body))


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 5000])
def test_a_number_that_nothing_holds_is_no_infinity(number: str) -> None:
    error = refusal(serve([TensorSpec("age", "FP64", (), allow_nan=True)]), f'{{"age": {number}}}'.encode())
    assert error.message == "expected a number, got a number out of range"
    assert error.path == "$.age"


@pytest.mark.parametrize("body", [b'{"age": 1, "age": 2}', b'{"age": 1, "a\\u0067e": 2}'])
def test_a_key_that_is_given_twice_is_refused(body: bytes) -> None:
    assert (
        str(refusal(serve([TensorSpec("age", "FP32", ())]), body))
        == '"age" is given twice at $.age\nhint: send it once'
    )


def test_colons_in_text_are_not_mistaken_for_keys() -> None:
    served = serve([TensorSpec("a", "BYTES", ()), TensorSpec("b", "BYTES", ())])
    assert read(served, {"a": ":", "b": ""})[0] == [b"\x01\0\0\0:", b"\0\0\0\0"]
    assert refusal(served, b'{"a": "", "b": "", "a": ""}').path == "$.a"


def test_lists_of_another_shape_are_refused() -> None:
    served = serve([TensorSpec("image", "UINT8", (2, 2))])
    for image, path in (
        ([[1, 2]], "$.image"),
        ([[1, 2], [3]], "$.image[1]"),
        ([[1, 2], 3], "$.image[1]"),
        ([[1, 2], [3, [4]]], "$.image[1][1]"),
        ([[1, 2], [3, 256]], "$.image[1][1]"),
        ({"a": 1}, "$.image"),
        (7, "$.image"),
        ([], "$.image"),
    ):
        assert refusal(served, {"image": image}).path == path


def test_too_many_rows_are_refused_by_name() -> None:
    error = refusal(serve([TensorSpec("age", "FP32", ())], batch=Batch(max_rows=2)), [{"age": 1}] * 3)
    assert isinstance(error, RequestTooLarge)
    assert error.message == "3 rows in one request, the limit of 'shop' is 2"


def test_binary_tensors_are_pointed_to_their_own_url() -> None:
    with pytest.raises(MalformedBody) as caught:
        PeopleCodec(serve(SHOP)).read(b"{}", 2)
    assert caught.value.hint == "send them to /v2/models/shop/infer"


# Answers -------------------------------------------------------------------------------------------


def written(outputs: Sequence[TensorSpec], tensors: Sequence[np.ndarray], body: Any) -> Any:
    served = serve([TensorSpec("age", "FP32", ())], outputs)
    codec = PeopleCodec(served)
    call = codec.read(json.dumps(body).encode(), None)
    raws = [to_raw(tensor, spec.datatype) for tensor, spec in zip(tensors, outputs, strict=True)]
    payload, binary = codec.write(Answer(raws, [t.shape[1:] for t in tensors], call.inputs.rows), call)
    assert binary is None
    return json.loads(payload)


def test_an_answer_has_the_form_of_the_question() -> None:
    outputs = [TensorSpec("label", "BYTES", (1,)), TensorSpec("odds", "FP64", (2,), labels=("no", "yes"))]
    tensors = [np.array([["yes"], ["no"]], object), np.array([[0.25, 0.75], [0.5, 0.5]])]
    first = {"label": "yes", "odds": {"no": 0.25, "yes": 0.75}}
    assert written(outputs, [tensor[:1] for tensor in tensors], {"age": 1}) == first
    assert written(outputs, [tensor[:1] for tensor in tensors], [{"age": 1}]) == [first]
    second = {"label": "no", "odds": {"no": 0.5, "yes": 0.5}}
    assert written(outputs, tensors, [{"age": 1}, {"age": 2}]) == [first, second]


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_outputs_without_labels_are_lists(rows: int | None) -> None:
    outputs = [TensorSpec("a", "INT64", (2,)), TensorSpec("b", "BOOL", (2, 2)), TensorSpec("c", "FP32", ())]
    tensors: list[np.ndarray] = [
        np.array([[1, 2]]), np.array([[[True, False], [False, True]]]), np.array([0.5], "f4"),
    ]  # fmt: skip
    row = {"a": [1, 2], "b": [[True, False], [False, True]], "c": 0.5}
    repeated = [np.repeat(tensor, rows or 1, axis=0) for tensor in tensors]
    body = {"age": 1} if rows is None else [{"age": 1}] * rows
    assert written(outputs, repeated, body) == (row if rows is None else [row] * rows)


@pytest.mark.parametrize("many", [False, True])
def test_what_is_no_finite_number_is_a_word(many: bool) -> None:
    outputs = [TensorSpec("odds", "FP32", (3,), labels=("a", "b", "c"))]
    tensor = np.array([[math.nan, math.inf, -math.inf]], "f4")
    answer = written(outputs, [tensor], [{"age": 1}] if many else {"age": 1})
    expected = {"odds": {"a": "NaN", "b": "Infinity", "c": "-Infinity"}}
    assert answer == ([expected] if many else expected)


def test_bytes_that_are_no_text_are_refused_with_the_way_to_get_them() -> None:
    with pytest.raises(InvalidRequest) as caught:
        written([TensorSpec("blob", "BYTES", ())], [np.array([b"\xff"], object)], {"age": 1})
    assert caught.value.hint == "ask /v2/models/shop/infer for it as binary data"


# Both ways agree, and agree with the protocol --------------------------------------------------------


def values_of(spec: TensorSpec) -> st.SearchStrategy[Any]:
    if spec.datatype == "BYTES":
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if spec.datatype == "BOOL":
        return st.booleans()
    if spec.datatype in INTEGERS:
        limits = np.iinfo(NUMPY[spec.datatype])  # type: ignore[type-var]  # an integer dtype
        return st.integers(int(limits.min), int(limits.max))
    width = {"FP16": 16, "FP32": 32}.get(spec.datatype, 64)
    numbers: st.SearchStrategy[Any] = st.floats(width=width, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]  # one of the widths
    numbers |= st.integers(-60_000, 60_000)
    return (
        numbers | st.none() | st.sampled_from(["NaN", "Infinity", "-Infinity"]) if spec.allow_nan else numbers
    )


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    datatype: Datatype = draw(st.sampled_from(get_args(Datatype)))
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=4))
    columns: tuple[str, ...] = ()
    if len(shape) == 1 and draw(st.booleans()):
        columns = tuple(f"{name}{i}" for i in range(shape[0]))
    return TensorSpec(name, datatype, shape, columns, allow_nan=datatype in FLOATS and draw(st.booleans()))


@st.composite
def requests(draw: st.DrawFn) -> tuple[ServedVersion, list[dict[str, Any]], list[list[Any]]]:
    """A served version, rows for it by column, and the same values flat by input."""
    inputs = draw(st.lists(specs(), min_size=1, max_size=4, unique_by=lambda spec: spec.name))
    served = serve(inputs)
    rows: list[dict[str, Any]] = []
    flat: list[list[Any]] = [[] for _ in inputs]
    for _ in range(draw(st.integers(1, 3))):
        row: dict[str, Any] = {}
        for column in columns_of(served):
            shape = () if column.single else column.spec.shape
            values = [draw(values_of(column.spec)) for _ in range(math.prod(shape))]
            flat[column.position] += values
            value: Any = np.array(values, dtype=object).reshape(shape).tolist() if shape else values[0]
            row[column.name] = value
        rows.append(row)
    return served, rows, flat


@given(requests())
def test_the_typed_and_the_careful_way_and_the_protocol_read_the_same_bits(
    request_: tuple[ServedVersion, list[dict[str, Any]], list[list[Any]]],
) -> None:
    served, rows, flat = request_
    codec = PeopleCodec(served)
    infer = {
        "inputs": [
            {"name": spec.name, "datatype": spec.datatype, "shape": [len(rows), *spec.shape], "data": values}
            for spec, values in zip(served.contract.inputs, flat, strict=True)
        ]
    }
    expected = InferCodec(served).read(json.dumps(infer).encode(), None).inputs
    bodies: list[Any] = [rows, rows[0]] if len(rows) == 1 else [rows]
    for body in bodies:
        for text in (json.dumps(body), json.dumps(body, ensure_ascii=False, separators=(",", ":"))):
            assert codec.read(text.encode(), None).inputs == expected
            assert codec._read_carefully(text.encode()).inputs == expected


@given(
    st.binary(max_size=60)
    | st.text(alphabet='{}[]":,0123456789eE.+-\\untrfalsxy ', max_size=40).map(str.encode)
)
@example(b'{"x": 1, "y": "\\u003a"}')
@example(b"\xef\xbb\xbf{}")
@example(b"\x00")
def test_whatever_is_sent_is_read_or_refused(body: bytes) -> None:
    served = serve([TensorSpec("x", "FP32", ()), TensorSpec("y", "BYTES", (), allow_nan=True)])
    try:
        call = PeopleCodec(served).read(body, None)
    except InvalidRequest:
        return
    assert call.inputs.rows >= 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=8,
)


@given(json_values)
def test_the_typed_way_accepts_nothing_that_the_careful_way_refuses(value: Any) -> None:
    served = serve(
        [TensorSpec("a", "FP32", ()), TensorSpec("b", "INT16", (2,)), TensorSpec("c", "BYTES", ())]
    )
    codec = PeopleCodec(served)
    body = json.dumps(value).encode()
    try:
        careful = codec._read_carefully(body)
    except ParbakeError as error:
        with pytest.raises(type(error)):
            codec.read(body, None)
    else:
        assert codec.read(body, None) == careful


@given(st.data())
def test_an_answer_read_back_has_the_same_bits(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from([TensorSpec("y", datatype, (2,)) for datatype in NUMBERS]))
    tensor = np.array([[data.draw(values_of(spec)) for _ in range(2)]], NUMPY[spec.datatype])
    back = np.array([written([spec], [tensor], {"age": 1})["y"]], NUMPY[spec.datatype])
    assert back.tobytes() == from_raw(to_raw(tensor, spec.datatype), spec.datatype, (1, 2)).tobytes()
