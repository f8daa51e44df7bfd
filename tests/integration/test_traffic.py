"""A server measures its traffic and logs its predictions, whichever way they were asked for."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import urllib.request
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from parbake.contract.key import key_of
from parbake.errors import ServerNotFound
from parbake.monitoring.log import read_log
from parbake.monitoring.profile import TrafficProfile
from parbake.testing import Server, serving
from parbake.transports import statefile
from tests.functions import write_scaled
from tests.traffic import bake_rows, infer, once, wait_for

INFER = "/v2/models/scaled/infer"


def admin(server: Server, path: str) -> Any:
    running = statefile.find(server.port)
    request = urllib.request.Request(
        running.admin_url + path, headers={"authorization": f"Bearer {running.token}"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [row for table in read_log(folder) for row in table.to_pylist()]


def key(*values: float) -> bytes:
    return key_of(np.array(values, np.float32).tobytes())


def binary(*values: float) -> tuple[bytes, dict[str, str]]:
    """A request of one row as raw bytes."""
    raw = np.array(values, np.float32).tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + raw, {"Inference_Header_Content_Length": str(len(head))}


@pytest.mark.parametrize("mode", ["dynamic", "static", "hybrid"])
def test_every_row_is_in_the_log_once(tmp_path: Path, mode: str) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, [(1, 2), (3, 4)], tmp_path / "table")
    folder = tmp_path / "log"
    with serving(
        bundle.path,
        mode=mode,
        table=str(table),
        prediction_log=str(folder),
        log_inputs="plain",
        log_outputs=True,
    ) as server:
        for _ in range(3):
            assert once(server.url, INFER, infer((1, 2))).status == 200
        body, headers = binary(3, 4)
        assert once(server.url, INFER, body, **headers).status == 200
        assert once(server.url, "/predict/scaled", b'{"left": 1, "right": 2}').status == 200
        assert once(server.url, INFER, infer((1, 2, 3, 4))).status == 200
        expected = 404 if mode == "static" else 200
        for _ in range(2):
            assert once(server.url, INFER, infer((7, 8))).status == expected
        assert once(server.url, INFER, infer((5, 6, 1, 2))).status == expected
        assert once(server.url, INFER, b"{").status == 400
    rows = logged(folder)
    where = Counter(row["where"] for row in rows)
    fresh = {
        "dynamic": {"model": 11, "refused": 1},
        "static": {"table": 7, "refused": 4},
        "hybrid": {"table": 8, "model": 2, "head": 1, "refused": 1},
    }[mode]
    assert where == fresh
    assert {row["deployment"] for row in rows} == {"scaled"}
    assert {row["mode"] for row in rows} == {mode}
    assert {row["digest"] for row in rows} == {bundle.digest}
    assert {row["status"] for row in rows if row["where"] != "refused"} == {"ok"}
    assert all(row["milliseconds"] > 0 for row in rows)
    counts = Counter(row["key"] for row in rows if row["where"] != "refused")
    assert counts[key(1, 2)] == 5 + (mode != "static")
    assert counts[key(3, 4)] == 2
    for row in rows:
        if row["where"] != "refused":
            (raw,) = row["inputs"]
            values = np.frombuffer(raw, np.float32)
            assert row["key"] == key(*values)
            assert np.frombuffer(row["outputs"], np.float32).tolist() == (values * 2).tolist()


@pytest.mark.parametrize("mode", ["dynamic", "static", "hybrid"])
def test_rows_that_are_answered_together_are_logged_each_with_its_own_answer(
    tmp_path: Path, mode: str
) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    baked = [(n, 1) for n in range(0 if mode == "dynamic" else 20)]
    table = str(bake_rows(bundle, baked, tmp_path / "table")) if baked else None
    folder = tmp_path / "log"
    with (
        serving(
            bundle.path,
            mode=mode,
            table=table,
            prediction_log=str(folder),
            log_inputs="plain",
            log_outputs=True,
        ) as server,
        ExitStack() as stack,
    ):
        sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(8)
        ]
        for _ in range(3):
            for number, one in enumerate(sockets):
                for at in range(5):
                    n = (number * 5 + at) % (20 if mode == "static" else 40)
                    body = infer((n, 1))
                    one.sendall(
                        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
                        % (INFER.encode(), len(body), body)
                    )
            for one in sockets:
                seen = b""
                while seen.count(b"HTTP/1.1 200 OK") < 5 or not seen.endswith(b"}]}"):
                    seen += one.recv(65536)
    rows = logged(folder)
    assert len(rows) == 120
    for row in rows:
        values = np.frombuffer(row["inputs"][0], np.float32)
        assert row["key"] == key(*values)
        assert np.frombuffer(row["outputs"], np.float32).tolist() == (values * 2).tolist()
    per_key = Counter(row["key"] for row in rows)
    assert set(per_key.values()) == {6 if mode == "static" else 3}


def test_keys_only_unless_more_is_asked_for(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, mode="hybrid", prediction_log=str(tmp_path / "log"), workers=2) as server:
        for number in range(40):
            once(server.url, INFER, infer((number % 4, 1)))
        page = once(server.url, "/metrics").body.decode()
        assert "parbake_log_rows_total" in page
    rows = logged(tmp_path / "log")
    assert len(rows) == 40
    assert {row["inputs"] for row in rows} == {row["outputs"] for row in rows} == {None}
    assert len({row["key"] for row in rows}) == 4
    assert pa.types.is_timestamp(next(read_log(tmp_path / "log")).schema.field("time").type)


def test_the_log_outlives_a_killed_front(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    folder = tmp_path / "log"
    with serving(bundle.path, prediction_log=str(folder), workers=1) as server:
        for number in range(30):
            once(server.url, INFER, infer((number, 1)))
        wait_for(lambda: len(logged(folder)) == 30)
        (front,) = admin(server, "/admin/status")["front_pids"]
        os.kill(front, signal.SIGKILL)
        wait_for(lambda: once(server.url, INFER, infer((99, 1))).status == 200)
    assert len(logged(folder)) == 31


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ServerNotFound, match="the prediction log cannot be written"),
        serving(bundle.path, prediction_log=str(tmp_path / "file")),
    ):
        pass


def test_the_traffic_is_measured_over_all_fronts(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    weights = 1 / np.arange(1, 101)
    drawn = np.random.default_rng(0).choice(100, 600, p=weights / weights.sum())
    with serving(bundle.path, workers=2) as server:
        for number in drawn:
            assert once(server.url, INFER, infer((float(number), 1.0))).status == 200
        report = admin(server, "/admin/traffic")["scaled"]
        traffic = report["traffic"]
        distinct, counts = np.unique(drawn, return_counts=True)
        assert traffic["requests"] == 600
        assert traffic["cardinality"]["value"] == len(distinct)
        top = np.sort(counts)[::-1]
        for point in traffic["curve"]:
            assert point["share"] == pytest.approx(top[: point["keys"]].sum() / 600)
        assert 0.3 < traffic["peakedness"] < 0.9
        page = once(server.url, "/metrics").body.decode()
        assert f'parbake_traffic_keys{{deployment="scaled"}} {float(len(distinct))}' in page


def test_a_profile_is_for_others_to_merge(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path) as server:
        once(server.url, INFER, infer((1, 1, 2, 2)))
        profile = TrafficProfile.from_bytes(
            base64.b64decode(admin(server, "/admin/traffic")["scaled"]["profile"])
        )
    assert profile.requests == 2


def test_nothing_is_kept_where_nothing_is_wanted(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, "--no-traffic-profile") as server:
        once(server.url, INFER, infer((1, 1)))
        assert admin(server, "/admin/traffic") == {}
