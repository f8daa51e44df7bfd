"""Metrics and statistics: what was sent is what was counted, exactly, over all fronts and all that happened to them."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from parbake.app.supervisor import Change
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.sockets import connected, request
from tests.traffic import Call, bake_rows, calling, infer, once, rows, wait_for

ROWS = [(1.0, 2.0), (3.0, 4.0)]
REFUSES = """
def predict(x):
    if (x == 666).any():
        raise ValueError("no such age")
    if (x == 667).any():
        raise RuntimeError("broken")
    return x * 2
"""


class Page:
    """A page of metrics, with sums over what is not asked for."""

    def __init__(self, server: Server) -> None:
        text = once(server.url, "/metrics").body.decode()
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def __call__(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_every_request_is_counted_once_where_it_belongs(tmp_path: Path, workers: int) -> None:
    bundle = write_function(tmp_path, REFUSES, name="eta")
    table = bake_rows(bundle, ROWS, tmp_path / "eta.table")
    path = "/v2/models/eta/infer"
    with serving(bundle.path, table=table, workers=workers, max_body_bytes=5000, head_rows=0) as server:
        # On connections of their own, so that both fronts get some.
        calls = [Call(server.url) for _ in range(6)]
        for call in calls:
            for _ in range(5):
                assert call(path, infer(ROWS[0])).status == 200
            assert call(path, infer([*ROWS[0], *ROWS[1], 9.0, 9.0])).status == 200
            assert call(path, infer((8, 9))).status == 200
            assert call(path, infer((8, 9), parameters={"timeout": 1})).status == 504
            assert call(path, infer((666, 9))).status == 422
            assert call(path, infer((667, 9))).status == 500
            assert call(path, b"{").status == 400
            assert call("/predict/eta", json.dumps({"left": 1, "right": 2}).encode()).status == 200
            assert call("/v2/models/nobody/infer", infer((1, 2))).status == 404
            assert call("/nowhere").status == 404
            call.close()
        for _ in range(2):
            with connected(server.port) as raw:
                assert raw.send(request(path, b"x" * 6000)).reply().status == 413
            with connected(server.port) as raw:
                assert raw.send(b"nonsense\r\n\r\n").reply().status == 400
        page = Page(server)
        stats = once(server.url, "/v2/models/eta/stats").json()["model_stats"][0]
        config = once(server.url, "/v2/models/eta/config").json()
    n = len(calls)
    eta = {"deployment": "eta", "version": "1"}
    assert page("parbake_fronts") == workers
    assert page("parbake_requests_total", **eta, outcome="ok") == 8 * n
    for reason in ("deadline_exceeded", "row_rejected", "model_failed", "malformed_body"):
        assert page("parbake_requests_total", **eta, outcome="error", reason=reason) == n, reason
    assert page("parbake_requests_total", **eta) == 12 * n
    nobody = {"deployment": "", "version": "", "outcome": "error"}
    assert page("parbake_requests_total", **nobody, reason="model_not_found") == n
    assert page("parbake_requests_total", **nobody, reason="route_not_found") == n
    assert page("parbake_requests_total", **nobody, reason="too_large") == 2
    assert page("parbake_requests_total", **nobody, reason="malformed_body") == 2
    assert page("parbake_rows_total", **eta) == (5 + 3 + 1 + 1) * n
    assert page("parbake_table_hits_total", **eta) == (5 + 2 + 1) * n
    for stage, requests in {"parse": 8 * n, "total": 8 * n, "queue": 2 * n, "model": 2 * n}.items():
        assert page("parbake_request_duration_seconds_count", **eta, stage=stage) == requests, stage
        assert page("parbake_request_duration_seconds_bucket", **eta, stage=stage, le="+Inf") == requests
        assert page("parbake_request_duration_seconds_sum", **eta, stage=stage) > 0
    # The model ran for the row that was not baked, alone and in company; failed batches are not its work.
    assert page("parbake_batch_rows_count", **eta) == 2 * n
    assert page("parbake_batch_rows_sum", **eta) == 2 * n
    assert page("parbake_table_rows", **eta) == 2
    assert page("parbake_version_info", **eta, mode="hybrid", digest=bundle.digest) == 1
    assert page("parbake_runners_up", **eta) == 1
    assert stats["inference_count"] == 10 * n
    assert stats["execution_count"] == 2 * n
    assert stats["inference_stats"]["success"]["count"] == 8 * n
    assert stats["inference_stats"]["fail"]["count"] == 4 * n
    assert stats["inference_stats"]["cache_hit"]["count"] == 8 * n
    assert stats["last_inference"] > 1_600_000_000_000
    assert config["backend"] == "python"


def test_counts_only_grow_whatever_is_killed_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "scaled.bundle"
    write_scaled(path, 2)
    with (
        serving(path, placement="process", workers=2) as server,
        calling(server.url, *[rows("scaled", (1.0, float(i))) for i in range(3)]) as callers,
    ):
        seen = [0.0]

        def look() -> float:
            seen.append(Page(server)("parbake_requests_total", deployment="scaled"))
            assert seen[-1] >= seen[-2]
            return seen[-1]

        def restarts() -> tuple[float, float]:
            page = Page(server)
            return page("parbake_front_restarts_total"), page(
                "parbake_runner_restarts_total", deployment="scaled"
            )

        for _ in range(10):
            look()
        for killed in (1, 2):
            before = look()
            os.kill(client.status(port=server.port).front_pids[0], signal.SIGKILL)
            wait_for(lambda n=killed, b=before: look() > b and restarts()[0] == n)  # type: ignore[misc]
        os.kill(client.status(port=server.port).versions[0].runner_pids[0], signal.SIGKILL)
        wait_for(lambda: look() and restarts() == (2, 1))
        write_scaled(path, 3, replace=True)
        client.reload([Change(bundle=str(path))], port=server.port)
        before = look()
        wait_for(lambda: look() > before + 10)
        # The processes are other ones now, and so they are after a kill of one of these.
        assert restarts() == (2, 1)
        os.kill(client.status(port=server.port).versions[0].runner_pids[0], signal.SIGKILL)
        wait_for(lambda: look() and restarts() == (2, 2))
        assert client.status(port=server.port).versions[0].runner_restarts == 2
        for caller in callers:
            caller.wait(5)
    # Refusals are answers too: those of the moment without a runner.
    answered = sum(noted.status > 0 for caller in callers for noted in caller.noted)
    # Of a front that is killed, what it counted since somebody last looked is lost; nothing is counted twice.
    assert seen[-1] <= answered + 5


def test_counts_of_connections_and_of_the_plan_are_those_of_now(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, workers=2) as server:
        with connected(server.port) as one, connected(server.port) as two:
            for connection in (one, two):
                connection.send(request("/v2/health/live", method="GET", length=False)).reply()
            page = Page(server)
            assert page("parbake_connections") == 3
            assert page("parbake_plan_generation") == 1
            os.kill(client.status(port=server.port).front_pids[0], signal.SIGKILL)
            wait_for(lambda: client.status(port=server.port).front_restarts == 1)
        wait_for(lambda: Page(server)("parbake_connections") == 1)
        client.reload(port=server.port)
        assert Page(server)("parbake_plan_generation") == 2
        assert Page(server)("parbake_fronts") == 2


def test_both_doors_show_the_same_page(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, workers=1, admin_token="secret") as server:
        once(server.url, "/v2/models/scaled/infer", infer((1, 2)))
        serving_page = once(server.url, "/metrics")
        assert serving_page.headers["content-type"].startswith("text/plain; version=0.0.4")
        names = set(re.findall(r"^# TYPE (\w+)", serving_page.body.decode(), re.MULTILINE))
        from parbake.transports import statefile

        admin = statefile.find(server.port).admin_url
        assert once(admin, "/metrics").status == 403
        page = once(admin, "/metrics", authorization="Bearer secret")
        assert set(re.findall(r"^# TYPE (\w+)", page.body.decode(), re.MULTILINE)) == names
        assert (
            'parbake_requests_total{deployment="scaled",outcome="ok",reason="",version="1"} 1.0'
            in page.body.decode()
        )
