"""The short way: whatever body comes, in whatever order, it answers what the careful way does, or leaves it to it."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parbake.contract.model import Batch, Contract, TensorSpec
from parbake.contract.record import Records
from parbake.errors import InvalidRequest
from parbake.serving.model import Answer
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.transports.http.oip import InferCall, InferCodec
from parbake.transports.inputs import Inputs

X = TensorSpec("x", "FP32", (2,))


def served(
    *inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "FP32", (2,)),), **rest: Any
) -> ServedVersion:
    contract = Contract("eta", inputs or (X,), outputs, steps=(), purpose="tests", owner="tests", **rest)
    return ServedVersion(
        "eta",
        "1",
        contract,
        "sha256:0",
        mode="dynamic",
        table=None,
        batcher=None,
        deadline_s=1.0,
        stats=Stats(),
    )


def careful(codec: InferCodec, body: bytes) -> tuple[bytes, str] | None:
    """What the careful way reads, if it is one row that asks for nothing special."""
    try:
        call = codec.read(body, None)
    except InvalidRequest:
        return None
    if call.inputs.rows != 1 or call.wanted is not None or call.timeout_s:
        return None
    return call.inputs.raws[0], call.id


def agree(codec: InferCodec, body: bytes) -> None:
    short = codec.read_row(body)
    if short is not None:
        assert short == careful(codec, body), body


NUMBERS = [0, -0.0, 1, 2**53 + 1, 2**64, 10**30, 3.4e38, 1e-320, 65504]
ODD: list[Any] = [3.5e38, 1e300, 65520, True, None, "1", "NaN", [], {}]
LITERALS = [b"-0", b"1e400", b"-1E-400", b"1.", b".5", b"01", b"1e", b"NaN", b"9" * 400, b"0.1e1", b"1e+2"]
KEYS = ["name", "shape", "datatype", "data", "parameters", "d\\u0061ta"]
EXTRAS = [
    '"id":""', '"id":"7"', '"id":"\\"data\\":[5,6]"', '"outputs":[]', '"parameters":{}', '"parameters":{"timeout":5}',
    '"inputs":[]', '"extra":1', '"id":null',
]  # fmt: skip


def seldom(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 9)) == 9


@st.composite
def lists(draw: st.DrawFn) -> bytes:
    """The text of a list of values, mostly two numbers."""
    if seldom(draw):
        return b"[" + b",".join(draw(st.lists(st.sampled_from(LITERALS), min_size=1, max_size=3))) + b"]"
    number = st.one_of(st.floats(-100, 100), st.sampled_from(NUMBERS))
    items: list[Any] = draw(st.lists(number, min_size=2, max_size=2))
    if seldom(draw):
        items[draw(st.integers(0, 1))] = draw(st.sampled_from(ODD))
    if seldom(draw):
        items = items * draw(st.integers(0, 2))
    return json.dumps(items).replace(", ", draw(st.sampled_from([",", ", ", " ,\n\t"]))).encode()


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A request: mostly whole, with its keys in any order, now and then twice, or with something wrong in it."""
    parts = {"name": '"x"', "shape": "[1,2]", "datatype": '"FP32"', "data": draw(lists()).decode()}
    if seldom(draw):
        wrong = {
            "name": ['"data"', '"\\u0078"'],
            "shape": ["[1, 2]", "[2]", "[]", "[1,2.0]", "[1,-2]"],
            "datatype": ['"FP64"'],
        }
        key = draw(st.sampled_from(sorted(wrong)))
        parts[key] = draw(st.sampled_from(wrong[key]))
    members = list(parts.items())
    if seldom(draw):
        value = st.sampled_from(["[1,2]", "{}", '"x"', "[9,9]", "[]", '"FP32"'])
        members.append((draw(st.sampled_from(KEYS)), draw(value)))
    space = draw(st.sampled_from(["", " ", "\n  "]))
    tensor = ",".join(f'"{name}":{space}{value}' for name, value in draw(st.permutations(members)))
    outer = [f'"inputs":{space}[{{{tensor}}}]']
    if draw(st.integers(0, 3)) == 3:
        outer.append(draw(st.sampled_from(EXTRAS)))
    return (
        "{" + ",".join(draw(st.permutations(outer))) + "}" + draw(st.sampled_from(["", "", "", "\n", " x"]))
    ).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request, seldom with a few bytes changed."""
    body = bytearray(draw(bodies()))
    if seldom(draw):
        at = draw(st.integers(0, len(body)))
        pieces = [b"", b"[", b"]", b'"', b",", b"1", b"}", b"\xff", b"\0", b'"data"']
        body[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from(pieces))
    return bytes(body)


@pytest.mark.parametrize("dimension", ["any", "one", "none"])
@given(requests=st.lists(damaged(), min_size=1, max_size=8))
def test_the_short_way_reads_what_the_careful_way_does(dimension: Any, requests: list[bytes]) -> None:
    # One after another through the same codec: what it remembers of one must not change how it reads the next.
    codec = InferCodec(served(batch=Batch(dimension=dimension)))
    for body in requests:
        agree(codec, body if dimension != "none" else body.replace(b"[1,2]", b"[2]"))


@pytest.mark.parametrize(("dimension", "shape"), [("any", b"[1,2]"), ("one", b"[1,2]"), ("none", b"[2]")])
def test_a_row_goes_the_short_way_whatever_its_batch_dimension(dimension: Any, shape: bytes) -> None:
    codec = InferCodec(served(batch=Batch(dimension=dimension)))
    for text, row in ((b"[1,2]", (1, 2)), (b"[3,4]", (3, 4))):
        body = b'{"inputs":[{"name":"x","shape":%b,"datatype":"FP32","data":%b}]}' % (shape, text)
        assert codec.read_row(body) == (struct.pack("<2f", *row), "") == careful(codec, body)
        assert codec.read_row(body.replace(shape, b"[2,2]")) is None


PLAIN = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":%b}]}'


@given(st.lists(lists(), min_size=1, max_size=8))
def test_a_remembered_frame_changes_no_answer(texts: list[bytes]) -> None:
    codec = InferCodec(served())
    assert codec.read_row(PLAIN % b"[1.0, 2.0]") == (struct.pack("<2f", 1, 2), "")
    for text in texts:
        agree(codec, PLAIN % text)


@pytest.mark.parametrize(
    "body",
    [
        # The key stands twice: the last one counts, wherever the frame was cut.
        b'{"inputs":[{"data":[7,7],"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}',
        b'{"inputs":[{"data":[1,2],"name":"x","shape":[1,2],"datatype":"FP32","data":[7,7]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","data":[1,2],"shape":[1,2]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","data":[1,2],"shape":[9,9],"shape":[1,2]}]}',
        b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","d\\u0061ta":[1,2]}]}',
        b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[3,4],"d\\u0061ta":[1,2]}]}',
        b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}],"id":""}',
        b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}],"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[5,6]}]}',
    ],
)
@given(text=lists())
@example(text=b"[5,6]")
@example(text=b'[5,6],"data":[7,8]')
@example(text=b'[5,6],"shape":[9,9]')
@example(text=b"[[5,6]]")
@example(text=b"[]")
def test_no_body_teaches_a_frame_that_lies(body: bytes, text: bytes) -> None:
    codec = InferCodec(served())
    agree(codec, body)
    for old in (b"[1,2]", b"[7,7]", b"[3,4]", b"[5,6]"):
        agree(codec, body.replace(old, text))
    agree(codec, PLAIN % text)


def test_an_input_that_is_called_data_is_read() -> None:
    codec = InferCodec(served(TensorSpec("data", "FP32", (2,))))
    for text in (b"[1,2]", b"[3,4]", b"[5]"):
        for body in (
            b'{"inputs":[{"name":"data","shape":[1,2],"datatype":"FP32","data":%b}]}' % text,
            b'{"inputs":[{"data":%b,"shape":[1,2],"datatype":"FP32","name":"data"}]}' % text,
            b'{"inputs":[{"data":%b,"name":"data","shape":[1,2],"datatype":"FP32"}]}' % text,
        ):
            agree(codec, body)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@given(numbers=st.lists(st.floats(width=64), min_size=2, max_size=2))
def test_numbers_have_the_same_bits_on_both_ways(datatype: Any, numbers: list[float]) -> None:
    codec = InferCodec(served(TensorSpec("x", datatype, (2,))))
    body = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 2], "datatype": datatype, "data": numbers}]}
    ).encode()
    for _ in range(2):
        assert codec.read_row(body) == careful(codec, body)


@pytest.mark.parametrize(
    ("specs", "rest"),
    [
        ((X, TensorSpec("z", "FP32", (1,))), {}),
        ((TensorSpec("x", "INT64", (2,)),), {}),
        ((TensorSpec("x", "FP32", (-1,)),), {}),
        ((TensorSpec("x", "BYTES", (2,)),), {}),
    ],
)
def test_other_contracts_have_no_short_way(specs: tuple[TensorSpec, ...], rest: dict[str, Any]) -> None:
    assert not InferCodec(served(*specs, **rest)).has_short_way


VALUES: dict[str, st.SearchStrategy[bytes]] = {
    "FP16": st.floats(width=16).map(lambda number: np.float16(number).tobytes()),
    "FP32": st.floats(width=32).map(lambda number: np.float32(number).tobytes()),
    "FP64": st.floats().map(lambda number: np.float64(number).tobytes()),
    "INT64": st.integers(-(2**63), 2**63 - 1).map(lambda number: np.int64(number).tobytes()),
}
OUTPUTS: list[tuple[TensorSpec, ...]] = [
    (TensorSpec("y", "FP32", (2,)),),
    (TensorSpec("y", "FP64"),),
    (TensorSpec("label", "INT64"), TensorSpec("p%d null", "FP32", (3,)), TensorSpec("h", "FP16", (1, 2))),
]


@pytest.mark.parametrize("dimension", ["any", "one", "none"])
@pytest.mark.parametrize("outputs", OUTPUTS)
@given(rows=st.integers(1, 4), request_id=st.sampled_from(["", "7", 'a"%d']), data=st.data())
def test_replies_of_the_short_way_say_what_the_careful_one_says(
    dimension: Any, outputs: tuple[TensorSpec, ...], rows: int, request_id: str, data: st.DataObject
) -> None:
    version = served(outputs=outputs, batch=Batch(dimension=dimension))
    codec = InferCodec(version)
    assert codec.has_short_way
    columns: list[list[bytes]] = []
    for spec in outputs:
        number = VALUES[spec.datatype]
        size = max(spec.elements, 1)
        columns.append(
            [b"".join(data.draw(st.lists(number, min_size=size, max_size=size))) for _ in range(rows)]
        )
    records = Records(version.contract)
    shapes = tuple(spec.shape for spec in outputs)
    expected: list[bytes] = []
    for row in zip(*columns, strict=True):
        call = InferCall(Inputs([], 1, ()), request_id)
        payload, _ = codec.write(Answer(row, shapes, 1), call)
        expected.append(payload)
        head, _, body = codec.write_row(records.join(row, shapes), request_id).partition(b"\r\n\r\n")
        assert body == payload
        assert b"content-length: %d" % len(payload) in head
        assert msgspec.json.decode(body)["outputs"][0]["name"] == outputs[0].name
    if not request_id:
        whole = codec.write_rows([b"".join(column) for column in columns])
        if whole is None:
            assert any(b"NaN" in text or b"Infinity" in text for text in expected)
        else:
            assert [reply.partition(b"\r\n\r\n")[2] for reply in whole] == expected
