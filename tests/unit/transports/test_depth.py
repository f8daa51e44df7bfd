"""JSON without end: whoever nests as deep as he can is refused, and takes neither stack nor memory with him."""

from __future__ import annotations

import msgspec
import pytest

from parbake.errors import InvalidInput, MalformedBody
from parbake.transports.admin import ReloadRequest
from parbake.transports.http.oip import InferRequest, decode_json
from parbake.transports.http.router import ControlRequest, IndexRequest

DEPTH = 1_000_000
LISTS = b"[" * DEPTH + b"]" * DEPTH
OBJECTS = b'{"a":' * DEPTH + b"1" + b"}" * DEPTH
BODIES = {
    "lists": LISTS,
    "objects": OBJECTS,
    "without an end": b"[" * DEPTH,
    "parameters": b'{"inputs":[],"parameters":' + OBJECTS + b"}",
    "a parameter": b'{"inputs":[],"parameters":{"x":' + LISTS + b"}}",
    "data": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + LISTS + b"}]}",
    "changes": b'{"changes":' + LISTS + b"}",
}


@pytest.mark.parametrize("kind", [InferRequest, IndexRequest, ControlRequest, ReloadRequest])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_nesting_without_end_is_refused(kind: type[msgspec.Struct], body: bytes) -> None:
    with pytest.raises((InvalidInput, MalformedBody)):
        decode_json(msgspec.json.Decoder(kind), body)
