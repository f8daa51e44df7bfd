"""The Open Inference Protocol over REST, as a running server speaks it: right answers, and refusals that help."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from parbake.contract.model import Batch, TensorSpec
from parbake.contract.tensors import to_raw
from parbake.testing import Server, serving
from tests.echo import write_echo
from tests.functions import X, write_function, write_scaled
from tests.sockets import Client, connected, request
from tests.traffic import Call, Noted, answer, infer

REFUSES = """
def predict(x):
    if (x == 666).any():
        raise ValueError("no such age")
    if (x == 667).any():
        raise RuntimeError("a secret of the model")
    if (x == 668).any():
        raise SystemExit(3)
    return x * 2
"""
MANY = (
    TensorSpec("x", "FP32", (2,)), TensorSpec("words", "BYTES", (-1,)), TensorSpec("n", "INT64"),
    TensorSpec("ok", "BOOL"), TensorSpec("half", "FP16", (2,)),
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http")
    bundles = [
        write_scaled(folder / "scaled.bundle", 2),
        write_echo(folder, "echo", MANY),
        write_function(folder, REFUSES, name="refuses"),
        write_function(
            folder, "def predict(x):\n    return x * 2\n", name="alone", batch=Batch(dimension="none")
        ),
    ]
    with serving(*(bundle.path for bundle in bundles), workers=1, max_body_bytes=1_000_000) as running:
        yield running
        # Whatever was asked: nothing that it did not expect.
        log = running.log()
        assert "Traceback" not in log
        assert "request.failed" not in log


@pytest.fixture
def call(server: Server) -> Iterator[Call]:
    with Call(server.url) as here:
        yield here


def test_server_and_models_introduce_themselves(call: Call) -> None:
    assert call("/v2/health/live").json() == {"live": True}
    assert call("/v2/health/ready").json() == {"ready": True}
    assert call("/v2").json()["name"] == "parbake"
    metadata = call("/v2/models/scaled").json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert metadata["parameters"]["mode"] == "dynamic"
    assert call("/v2/models/scaled/versions/1").json() == metadata
    assert call("/v2/models/scaled/ready").json() == {"name": "scaled", "ready": True}
    assert call("/v2/models/scaled/versions/1/ready").status == 200
    assert call("/v2/models/scaled/config").json()["input"][0]["dims"] == [2]
    names = [item["name"] for item in call("/v2/models/stats").json()["model_stats"]]
    assert names == ["scaled", "echo", "refuses", "alone"]


def test_the_pages_of_health_have_heads(server: Server) -> None:
    with connected(server.port) as client:
        for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/scaled", "/metrics"):
            reply = client.send(request(path, method="HEAD", length=False)).reply(to_head=True)
            assert reply.status == 200
            assert int(reply.headers["content-length"]) > 0
        assert client.send(request("/v2/health/live", method="GET", length=False)).reply().json() == {
            "live": True
        }


def test_all_datatypes_go_in_and_out_as_json_and_binary(call: Call) -> None:
    given: dict[str, Any] = {
        "x": np.array([[1.5, -2.0], [3.0, 4.0]], "f4"),
        "words": np.array([["a", "é", ""], ["b", "c", "ö"]], dtype=object),
        "n": np.array([2**62, -1]),
        "ok": np.array([True, False]),
        "half": np.array([[1, 2], [3, 65504]], "f2"),
    }
    tensors = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(given[spec.name].shape),
            "data": given[spec.name].tolist(),
        }
        for spec in MANY
    ]
    plain = call("/v2/models/echo/infer", json.dumps({"id": "7", "inputs": tensors}).encode())
    reply = plain.json()
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("7", "echo", "1")
    for spec, output in zip(MANY, reply["outputs"], strict=True):
        assert output["name"] == f"{spec.name}_out"
        assert output["shape"] == list(given[spec.name].shape)
        assert output["data"] == given[spec.name].reshape(-1).tolist()
    raws = [to_raw(given[spec.name], spec.datatype) for spec in MANY]
    binary = [
        {**{k: v for k, v in tensor.items() if k != "data"}, "parameters": {"binary_data_size": len(raw)}}
        for tensor, raw in zip(tensors, raws, strict=True)
    ]
    head = json.dumps({"inputs": binary, "parameters": {"binary_data_output": True}}).encode()
    noted = call(
        "/v2/models/echo/infer", head + b"".join(raws), {"inference-header-content-length": str(len(head))}
    )
    assert noted.headers["content-type"] == "application/octet-stream"
    size = int(noted.headers["inference-header-content-length"])
    assert [
        output["parameters"]["binary_data_size"] for output in json.loads(noted.body[:size])["outputs"]
    ] == list(map(len, raws))
    assert noted.body[size:] == b"".join(raws)


def test_one_row_and_many_have_the_same_answers(call: Call) -> None:
    rows = np.random.default_rng(3).normal(size=(50, 2)).astype("f4")
    alone = [answer(call("/v2/models/scaled/infer", infer([float(v) for v in row]))) for row in rows]
    together = answer(call("/v2/models/scaled/infer", infer([float(v) for v in rows.reshape(-1)])))
    assert (
        [value for row in alone for value in row] == together == (rows * 2).reshape(-1).astype(float).tolist()
    )


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_are_packed_both_ways(call: Call, encoding: str, pack: Any) -> None:
    body = infer([1.0, 2.0] * 500)
    noted = call(
        "/v2/models/scaled/infer", pack(body), {"content-encoding": encoding, "accept-encoding": encoding}
    )
    assert noted.headers["content-encoding"] == encoding
    content = gzip.decompress(noted.body) if encoding == "gzip" else zlib.decompress(noted.body)
    assert json.loads(content)["outputs"][0]["data"] == [2.0, 4.0] * 500
    # What is short is not worth it.
    assert (
        "content-encoding"
        not in call("/v2/models/scaled/infer", infer((1, 2)), {"accept-encoding": encoding}).headers
    )


def test_a_model_without_a_batch_dimension_answers_one_row(call: Call) -> None:
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}).encode()
    output = call("/v2/models/alone/infer", body).json()["outputs"][0]
    assert output == {"name": "y", "datatype": "FP32", "shape": [2], "data": [2.0, 4.0]}


def test_urls_may_be_written_with_escapes_or_as_a_proxy_does(server: Server) -> None:
    with connected(server.port) as client:
        for path in (
            "/v2/models/sc%61led/infer",
            "/v2/models/%73caled/versions/%31/infer",
            "http://somewhere.example/v2/models/scaled/infer",
            "/v2/models/scaled/infer?trace=1",
        ):
            assert client.send(request(path, infer((1, 2)))).reply().json()["outputs"][0]["data"] == [
                2.0,
                4.0,
            ]
        people = client.send(request("/predict/sc%61led", b'{"left": 1, "right": 2}')).reply()
        assert people.json() == {"y": [2.0, 4.0]}


BAD: list[tuple[str, str, bytes, dict[str, str], int, str, str]] = [
    # What is wrong, path, body, headers, status, code, what stands in the error
    ("no json", "/v2/models/scaled/infer", b"{", {}, 400, "malformed_body", "not JSON"),
    ("no utf-8", "/v2/models/scaled/infer", b"\xff\xff", {}, 400, "malformed_body", "not JSON"),
    ("nothing", "/v2/models/scaled/infer", b"", {}, 400, "malformed_body", "not JSON"),
    ("deep", "/v2/models/scaled/infer", b"[" * 100_000, {}, 400, "", ""),
    ("wrong name", "/v2/models/scaled/infer", infer((1, 2)).replace(b'"x"', b'"z"'), {}, 400, "invalid_input", "no input 'z'"),
    ("wrong type", "/v2/models/scaled/infer", infer((1, 2)).replace(b"FP32", b"FP64"), {}, 400, "invalid_input", "expected FP32"),
    ("wrong shape", "/v2/models/scaled/infer", infer((1, 2)).replace(b"[1, 2]", b"[2, 1]"), {}, 400, "invalid_input", "expected shape [any, 2]"),
    ("NaN", "/v2/models/scaled/infer", infer((1, 2)).replace(b"[1, 2]}", b'[1, "NaN"]}'), {}, 400, "invalid_input", "got 'NaN' at $.inputs[0].data[1]"),
    ("a word", "/v2/models/scaled/infer", infer((1, 2)).replace(b"[1, 2]}", b'[1, "old"]}'), {}, 400, "invalid_input", "expected FP32, got 'old' at $.inputs[0].data[1]"),
    ("unknown field", "/v2/models/scaled/infer", b'{"inputs":[],"rows":1}', {}, 400, "invalid_input", "unknown field"),
    ("too many rows", "/v2/models/scaled/infer", infer([1.0, 2.0] * 5000), {}, 413, "too_large", "5000 rows in one request"),
    ("too large", "/v2/models/scaled/infer", b"x" * 1_000_001, {}, 413, "too_large", "the limit is 1000000"),
    ("a bomb", "/v2/models/scaled/infer", gzip.compress(bytes(10_000_000), mtime=0), {"content-encoding": "gzip"}, 413, "too_large", "unpacks to more than"),
    ("torn gzip", "/v2/models/scaled/infer", gzip.compress(b"hello", mtime=0)[:9], {"content-encoding": "gzip"}, 400, "malformed_body", "cut short"),
    ("unknown encoding", "/v2/models/scaled/infer", b"{}", {"content-encoding": "zstd"}, 400, "malformed_body", "not known"),
    ("lying header", "/v2/models/scaled/infer", b"{}", {"inference-header-content-length": "99"}, 400, "malformed_body", "the body has 2 bytes"),
    ("no number", "/v2/models/scaled/infer", b"{}", {"inference-header-content-length": "-1"}, 400, "malformed_body", "whole number"),
    ("deadline", "/v2/models/scaled/infer", infer((1, 2)), {"parbake-deadline-ms": "soon"}, 400, "invalid_input", "whole number"),
    ("model", "/v2/models/nobody/infer", infer((1, 2)), {}, 404, "model_not_found", "no model 'nobody'"),
    ("version", "/v2/models/scaled/versions/9/infer", infer((1, 2)), {}, 404, "version_not_found", "no version '9'"),
    ("url", "/v3/models", b"", {}, 404, "route_not_found", "no such URL"),
    ("url of a model", "/v2/models/scaled/train", b"", {}, 404, "route_not_found", "no such URL"),
    ("the row", "/v2/models/refuses/infer", infer((666, 1)), {}, 422, "row_rejected", "the model refused the row: no such age"),
    ("the model", "/v2/models/refuses/infer", infer((667, 1)), {}, 500, "model_failed", "'refuses' failed on this input"),
    ("the model ends", "/v2/models/refuses/infer", infer((668, 1)), {}, 500, "model_failed", "'refuses' failed on this input"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_refused_by_name_and_disturbs_nobody(
    server: Server,
    call: Call,
    path: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    code: str,
    message: str,
) -> None:
    noted = call(path, body, headers)
    assert noted.status == status, noted
    refusal = noted.json()
    assert refusal["code"] == (code or refusal["code"])
    assert message in refusal["error"]
    for word in ("Traceback", 'File "', "secret", ".py"):
        assert word not in noted.body.decode()
    if code == "model_failed":
        # The log has under this number what the caller is not told.
        assert refusal["correlation_id"] in refusal["hint"]
        assert refusal["correlation_id"] in server.log()
    with Call(server.url) as other:
        assert answer(other("/v2/models/scaled/infer", infer((1, 2)))) == [2.0, 4.0]


def test_a_wrong_method_is_told_the_right_one(call: Call) -> None:
    for method, path, allowed in [
        ("GET", "/v2/models/scaled/infer", "POST"),
        ("DELETE", "/v2/models/scaled", "GET, HEAD"),
        ("POST", "/v2/health/live", "GET, HEAD"),
        ("GET", "/v2/repository/models/scaled/load", "POST"),
    ]:
        noted = call(path, None, method=method)
        assert (noted.status, noted.json()["code"]) == (405, "method_not_allowed")
        assert noted.headers["allow"] == allowed


def test_a_bad_row_fails_alone_though_others_are_in_its_batch(server: Server) -> None:
    with connected(server.port) as client:
        rows = [(1.0, 2.0), (666.0, 1.0), (3.0, 4.0), (667.0, 1.0), (5.0, 6.0)] * 6
        client.send(*(request("/v2/models/refuses/infer", infer(row)) for row in rows))
        for row in rows:
            reply = client.reply()
            if row[0] == 666:
                assert reply.status == 422
            elif row[0] == 667:
                assert reply.status == 500
            else:
                assert reply.json()["outputs"][0]["data"] == [2 * row[0], 2 * row[1]]


def test_a_request_with_a_deadline_that_is_too_short_is_refused(call: Call) -> None:
    noted: Noted = call("/v2/models/scaled/infer", infer((1, 2), parameters={"timeout": 1}))
    assert (noted.status, noted.json()["code"]) == (504, "deadline_exceeded")
    assert noted.headers["retry-after"] == "1"
    zero = call("/v2/models/scaled/infer", infer((1, 2), parameters={"timeout": 0}))
    assert answer(zero) == [2.0, 4.0]


def test_a_pipeline_of_everything_is_answered_in_order(server: Server) -> None:
    with connected(server.port) as client:
        asked: list[tuple[bytes, int]] = []
        for i in range(30):
            asked += [
                (request("/v2/models/scaled/infer", infer((i, 1))), 200),
                (request("/v2/models/refuses/infer", infer((i, 1))), 200),
                (request("/v2/health/ready", method="GET", length=False), 200),
                (request("/v2/models/nobody/infer", infer((i, 1))), 404),
                (request("/metrics", method="GET", length=False), 200),
            ]
        client.send(*(data for data, _ in asked))
        assert [status_of(client) for _ in asked] == [status for _, status in asked]


def status_of(client: Client) -> int:
    return client.reply().status


def test_the_columns_of_the_contract_are_those_of_the_form_for_people(call: Call) -> None:
    assert call("/predict/scaled", json.dumps([dict(zip(X.columns, (1, 2), strict=True))] * 2).encode()).json() == [
        {"y": [2.0, 4.0]}, {"y": [2.0, 4.0]},
    ]  # fmt: skip
