"""One row in each protocol that is raced in, and the values of an answer in each."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, TypeAlias

import msgspec
import numpy as np

from bench.load import JSON, Measured
from bench.models import Packed
from bench.rpc import Calls, call, close
from parbake.transports.grpc.messages import message

Protocol: TypeAlias = Literal["json", "binary", "bytes", "grpc"]
"""``binary`` is the binary data of the Open Inference Protocol, ``bytes`` nothing but float32."""

TOLERANCE: Final = 1e-4
_TIMEOUT_S: Final = 30.0
_HEADER_BYTES: Final = "inference-header-content-length"
_NUMPY: Final = {"FP32": np.float32, "FP64": np.float64}


def bodies(packed: Packed, protocol: Protocol) -> tuple[bytes, ...]:
    """One request for each row."""
    if protocol == "json":
        return packed.bodies
    if protocol == "bytes":
        return tuple(row.tobytes() for row in packed.rows)
    if protocol == "binary":
        head = _binary_head(packed)
        return tuple(head + row.tobytes() for row in packed.rows)
    request = message("ModelInferRequest")(model_name="eta")
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = "x", "FP32"
    tensor.shape.extend([1, packed.rows.shape[1]])
    request.raw_input_contents.append(b"")
    found = []
    for row in packed.rows:
        request.raw_input_contents[0] = row.tobytes()
        found.append(request.SerializeToString())
    return tuple(found)


def headers(packed: Packed, protocol: Protocol) -> dict[str, str]:
    """The headers of these requests over HTTP."""
    if protocol == "json":
        return dict(JSON)
    kind = {"content-type": "application/octet-stream"}
    return {**kind, _HEADER_BYTES: str(len(_binary_head(packed)))} if protocol == "binary" else kind


def _binary_head(packed: Packed) -> bytes:
    width = packed.rows.shape[1]
    return msgspec.json.encode(
        {
            "inputs": [
                {
                    "name": "x",
                    "shape": [1, width],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": 4 * width},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    )


def check(
    packed: Packed,
    protocol: Protocol,
    port: int,
    path: str,
    rows: Sequence[int],
    tolerance: float = TOLERANCE,
) -> None:
    """Ask for some rows one by one, then for all of them at the same time. Raises RuntimeError at a wrong answer."""
    requests = bodies(packed, protocol)
    if protocol == "grpc":
        for connections in (1, len(rows)):
            measured = calls(packed, requests, port, connections, 0.1, tolerance)
            if measured.wrong or measured.failed or not measured.right:
                raise RuntimeError(measured.complaint or "no answers")
        return
    extra = headers(packed, protocol)

    def ask(number: int) -> None:
        got = _ask(port, path, requests[number], extra, protocol)
        if not close(got, packed.answers[number], tolerance):
            raise RuntimeError(f"row {number}: answered {got}, the model says {packed.answers[number]}")

    for number in rows:
        ask(number)
    with ThreadPoolExecutor(len(rows)) as pool:
        list(pool.map(ask, rows))


def calls(
    packed: Packed,
    requests: Sequence[bytes],
    port: int,
    connections: int,
    seconds: float,
    tolerance: float = TOLERANCE,
) -> Measured:
    """Put a gRPC load on and check every answer."""
    return call(
        Calls(port, tuple(requests), connections, seconds, tuple(packed.answers), tolerance, warm_up_s=0.2)
    )


def _ask(port: int, path: str, body: bytes, extra: Mapping[str, str], protocol: Protocol) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", path, body, dict(extra))
        reply = connection.getresponse()
        data = reply.read()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {data[:300]!r}")
        return _values(data, reply.headers.get(_HEADER_BYTES), protocol)
    finally:
        connection.close()


def _values(data: bytes, head_bytes: str | None, protocol: Protocol) -> list[float]:
    if protocol == "bytes":
        return [float(value) for value in np.frombuffer(data, np.float32)]
    size = int(head_bytes) if head_bytes else len(data)
    (output,) = json.loads(data[:size])["outputs"]
    if "data" in output:
        values = np.asarray(output["data"], np.float64).reshape(-1)
    else:
        values = np.frombuffer(data[size:], _NUMPY[output["datatype"]]).astype(np.float64)
    return [float(value) for value in values]
