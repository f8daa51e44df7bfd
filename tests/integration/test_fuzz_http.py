"""Raw bytes against a real server: it answers or hangs up, logs no traceback, and serves the next connection."""

from __future__ import annotations

import gzip
import json
import re
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parbake.contract.model import TensorSpec
from parbake.testing import Server, serving
from tests.echo import write_echo

ROW = json.dumps({"x": [1.5, 2.5]}).encode()
INFER = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.5]}]}
).encode()
BINARY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}
).encode()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


WHOLE = [
    post("/predict/echo", ROW),
    post("/v2/models/echo/infer", INFER),
    post("/v2/models/echo/infer", gzip.compress(INFER), "content-encoding: gzip"),
    post("/v2/models/echo/infer", BINARY + bytes(8), f"inference-header-content-length: {len(BINARY)}"),
    post("/predict/echo", ROW, "expect: 100-continue"),
    post("/v2/repository/index", b'{"ready": true}'),
    b"POST /predict/echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(ROW), ROW),
    b"GET /v2/health/ready HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /openapi.json HTTP/1.0\r\n\r\n",
    b"HEAD /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
]  # fmt: skip

TOKENS = [
    b"\r\n", b"\r", b"\n", b"\0", b": ", b"%", b"%00", b"/../", b"//", b"?", b"\xff", b"content-length: 5\r\n",
    b"content-length: 99999999999999999999\r\n", b"content-length: -1\r\n", b"transfer-encoding: chunked\r\n",
    b"transfer-encoding: gzip, chunked\r\n", b"connection: upgrade\r\nupgrade: websocket\r\n", b"HTTP/1.1", b"HTTP/2.0",
    b"inference-header-content-length: 7\r\n", b"parbake-deadline-ms: 0\r\n", b"content-encoding: br\r\n",
    b"ffffffff\r\n", b"x: " + b"y" * 9000 + b"\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = write_echo(tmp_path_factory.mktemp("fuzz"), "echo", [TensorSpec("x", "FP32", (2,))])
    with serving(bundle.path, max_body_bytes=5000) as running:
        yield running
        log = running.log()
        for word in ("Traceback", "request.failed", "Fatal error", "exception"):
            assert word not in log


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """Whole requests one after another, edited in a few places, in the pieces in which they are sent."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(WHOLE), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        until = at + draw(st.integers(0, 6))
        data[at:until] = draw(st.sampled_from([b"", *TOKENS]) | st.binary(max_size=4))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    return [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def talk(server: Server, pieces: list[bytes]) -> bytes:
    """Send the pieces and give what comes back within a moment."""
    got = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(0.02)
            while data := connection.recv(65536):
                got += data
        except OSError:
            # Refused in the middle, or nothing to say: both are the server's right.
            return got
    return got


@settings(max_examples=150)
@given(conversations())
def test_whatever_bytes_come_the_next_caller_is_answered(server: Server, pieces: list[bytes]) -> None:
    got = talk(server, pieces)
    assert not got or got.startswith(b"HTTP/1.1 ")
    statuses = re.findall(rb"(?:^|[}\n])HTTP/1\.1 (\d{3}) ", got)
    assert not {b"500", b"501", b"502"} & set(statuses)
    request = urllib.request.Request(f"{server.url}/predict/echo", ROW)
    with urllib.request.urlopen(request, timeout=5) as reply:
        assert json.load(reply) == {"x_out": [1.5, 2.5]}


@pytest.mark.parametrize("whole", WHOLE, ids=lambda whole: whole.partition(b" HTTP")[0].decode())
def test_requests_are_answered_whole_and_byte_by_byte(server: Server, whole: bytes) -> None:
    for pieces in ([whole], [whole[i : i + 1] for i in range(len(whole))]):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            for piece in pieces:
                connection.sendall(piece)
            assert re.match(rb"HTTP/1\.1 (200|100) ", connection.recv(65536))
