"""The binary tensor data extension under fire: lying headers and torn data give refusals, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from parbake.contract.model import Contract, TensorSpec
from parbake.contract.tensors import to_raw
from parbake.errors import InvalidInput, InvalidRequest, MalformedBody
from parbake.serving.service import ServedVersion
from parbake.serving.stats import Stats
from parbake.transports.http.oip import InferCodec

INPUTS = (TensorSpec("x", "FP32", (2,)), TensorSpec("s", "BYTES", (-1,)), TensorSpec("b", "BOOL", ()))
CONTRACT = Contract("eta", INPUTS, (TensorSpec("y", "FP32", ()),), steps=(), purpose="tests", owner="tests")
CODEC = InferCodec(
    ServedVersion(
        "eta",
        "1",
        CONTRACT,
        "sha256:0",
        mode="dynamic",
        table=None,
        batcher=None,
        deadline_s=1.0,
        stats=Stats(),
    )
)

sizes = st.integers(-2, 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63, -(2**63), 10**30])
numbers = sizes | st.floats() | st.booleans() | st.none() | st.text(max_size=2)


def whole(rows: int) -> tuple[list[dict[str, Any]], bytes]:
    """The tensors of a request that fits, and their binary data."""
    parts = [
        ("x", "FP32", [rows, 2], to_raw(np.ones((rows, 2), "f4"), "FP32")),
        ("s", "BYTES", [rows, 1], to_raw(np.array([["über"]] * rows, object), "BYTES")),
        ("b", "BOOL", [rows], bytes(rows)),
    ]
    tensors = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for name, datatype, shape, raw in parts
    ]
    return tensors, b"".join(raw for *_, raw in parts)


def body(tensors: list[dict[str, Any]], binary: bytes) -> tuple[bytes, int]:
    head = json.dumps({"inputs": tensors}).encode()
    return head + binary, len(head)


def read(data: bytes, json_bytes: int | None) -> None:
    """Read a body: it fits the contract, or is refused."""
    try:
        inputs = CODEC.read(data, json_bytes).inputs
    except InvalidRequest:
        return
    assert inputs.rows >= 1
    assert len(inputs.raws[0]) == 8 * inputs.rows


@given(st.integers(1, 3))
def test_a_request_that_fits_is_read(rows: int) -> None:
    data, json_bytes = body(*whole(rows))
    assert CODEC.read(data, json_bytes).inputs.rows == rows


@given(st.data())
def test_whatever_the_header_claims_it_is_checked(data: st.DataObject) -> None:
    tensors, binary = whole(2)
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = data.draw(st.sampled_from(tensors))
        match data.draw(st.sampled_from(["size", "shape", "datatype", "name", "data", "drop"])):
            case "size":
                tensor["parameters"]["binary_data_size"] = data.draw(numbers)
            case "shape":
                tensor["shape"] = data.draw(st.lists(numbers, max_size=4))
            case "datatype":
                tensor["datatype"] = data.draw(st.sampled_from(["FP64", "BYTES", "INT8", "", "FP32"]))
            case "name":
                tensor["name"] = data.draw(st.sampled_from(["x", "s", "b", "", "y"]))
            case "data":
                tensor["data"] = data.draw(st.lists(numbers, max_size=4))
            case "drop":
                tensor["parameters"].pop("binary_data_size", None)
    binary = data.draw(st.sampled_from([binary, binary[:-1], binary + b"\0", b""]) | st.binary(max_size=60))
    read(*body(tensors, binary))


@given(st.integers(0, 400), st.binary(max_size=8), st.integers(-5, 500))
@example(0, b"", 0)
@example(0, b"\xff\xff\xff\xff", 0)
def test_a_body_cut_anywhere_is_refused_or_read(at: int, put: bytes, json_bytes: int) -> None:
    data, true_json_bytes = body(*whole(2))
    torn = data[:at] + put + data[at + len(put) :]
    read(torn, true_json_bytes)
    read(torn[:at], true_json_bytes)
    read(data, json_bytes)


@given(st.binary(max_size=40), st.integers(0, 60) | st.none())
def test_any_bytes_are_refused(data: bytes, json_bytes: int | None) -> None:
    with pytest.raises(InvalidRequest):
        CODEC.read(data, json_bytes)


def test_a_bytes_element_that_claims_four_gigabytes_allocates_nothing() -> None:
    tensors, _ = whole(1)
    raw = b"\xff\xff\xff\xff"
    tensors[1]["parameters"]["binary_data_size"] = len(raw)
    with pytest.raises(InvalidInput, match="BYTES element 0 claims 4294967295 bytes, 0 are left"):
        CODEC.read(*body(tensors, bytes(4) + bytes(4) + raw + bytes(1)))


def test_data_that_belongs_to_no_input_is_refused() -> None:
    tensors, binary = whole(1)
    with pytest.raises(MalformedBody, match="3 bytes of binary data belong to no input"):
        CODEC.read(*body(tensors, binary + b"abc"))
