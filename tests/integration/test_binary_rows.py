"""Single rows as raw bytes: however often a client has sent the same JSON before them, the answer is the same."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parbake.contract.model import TensorSpec
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import Call, Noted, bake_rows

PATH = "/v2/models/scaled/infer"


def ask(call: Call, values: list[float], path: str = PATH, *, binary: bool = True, **more: object) -> Noted:
    """One row as raw bytes."""
    raw = struct.pack(f"<{len(values)}f", *values)
    tensor = {
        "name": "x", "datatype": "FP32", "shape": [1, len(values)], "parameters": {"binary_data_size": len(raw)},
    }  # fmt: skip
    parameters = {"binary_data_output": True} if binary else {}
    head = json.dumps({"inputs": [tensor], "parameters": parameters, **more}).encode()
    return call(path, head + raw, {"inference-header-content-length": str(len(head))})


def values_of(noted: Noted) -> list[float]:
    assert noted.status == 200, noted
    if "inference-header-content-length" not in noted.headers:
        data: list[float] = noted.json()["outputs"][0]["data"]
        return data
    size = int(noted.headers["inference-header-content-length"])
    assert json.loads(noted.body[:size])["outputs"][0]["parameters"] == {
        "binary_data_size": len(noted.body) - size
    }
    found: list[float] = np.frombuffer(noted.body[size:], "<f4").tolist()
    return found


@pytest.mark.parametrize("mode", ["dynamic", "hybrid", "static"])
@pytest.mark.parametrize("placement", ["inline", "process"])
@pytest.mark.parametrize("binary", [True, False])
def test_the_answer_is_the_same_each_time(tmp_path: Path, mode: str, placement: str, binary: bool) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    rows = [(float(i), -1.0) for i in range(6)]
    table = ["--table", str(bake_rows(bundle, rows, tmp_path / "t"))] if mode != "dynamic" else []
    with (
        serving(bundle.path, arguments=table, mode=mode, placement=placement, workers=1) as server,
        Call(server.url) as call,
    ):
        for left, right in [*rows, *rows]:
            assert values_of(ask(call, [left, right], binary=binary)) == [2 * left, -2.0]
        # With an id of its own, and another way round.
        for number in range(4):
            noted = ask(call, [1.0, -1.0], binary=binary, id=f"n{number // 2}")
            assert values_of(noted) == [2.0, -2.0]
            end = int(noted.headers.get("inference-header-content-length", len(noted.body)))
            assert json.loads(noted.body[:end])["id"] == f"n{number // 2}"
        page = call("/metrics").body.decode()
    assert 'parbake_requests_total{deployment="scaled",outcome="ok",reason="",version="1"} 16.0' in page


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("binary")
    specs = [TensorSpec("x", "FP32", (2,))]
    bundle = write_function(folder, "def predict(x):\n    return x * 2\n", name="scaled", inputs=specs)
    with serving(bundle.path, workers=1, head_rows=0) as running:
        yield running


@settings(max_examples=60)
@example([([0.0, 2.0**127], {})])
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(width=32), min_size=1, max_size=3),
            st.sampled_from(
                [{}, {"id": "a"}, {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}]
            ),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_comes_before_a_request_changes_nothing_for_it(
    server: Server, requests: list[tuple[list[float], dict[str, Any]]]
) -> None:
    with Call(server.url) as call:
        for values, more in [request for request in requests for _ in range(3)]:
            noted = ask(call, values, **more)
            if len(values) == 2 and all(np.isfinite(values)):
                # Twice a large one is infinite, here and there.
                with np.errstate(over="ignore"):
                    expected = (np.array(values, np.float32) * np.float32(2)).tolist()
                assert values_of(noted) == expected
            else:
                assert noted.status == 400, (values, noted)
                assert noted.json()["path"].startswith("$.inputs[0]")


def test_a_sum_that_is_too_large_is_no_reason_to_refuse(server: Server) -> None:
    with Call(server.url) as call:
        for _ in range(4):
            assert values_of(ask(call, [1.5e38, 1.5e38])) == pytest.approx([3e38, 3e38])


def test_a_fallback_answers_raw_bytes_too(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2, default={"y": [-1.0, -1.0]})
    with (
        serving(
            bundle.path, placement="process", fallback="default", workers=1, mode="dynamic", deadline_ms=500
        ) as server,
        Call(server.url) as call,
    ):
        for _ in range(4):
            assert values_of(ask(call, [1.0, 2.0])) == [2.0, 4.0]
        (version,) = client.status(port=server.port).versions
        os.kill(version.runner_pids[0], signal.SIGSTOP)
        noted = ask(call, [1.0, 2.0])
        assert values_of(noted) == [-1.0, -1.0]
        assert noted.headers["parbake-fallback"] == "default"
