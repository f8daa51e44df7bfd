"""`parbake advise`, as a person runs it: on a trace, on a prediction log, and on a running server."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from parbake.app.measure import examples_of, quick_table, table_row_bytes
from parbake.cli.exits import Exit
from parbake.contract.bundle import StoredBundle
from parbake.testing import serving
from tests.conftest import Parbake


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two thousand requests for fifty keys."""
    keys = np.random.default_rng(1).zipf(1.5, 2000) % 50
    path = tmp_path / "asked.trace"
    path.write_bytes(keys.astype(">u4").tobytes())
    return path


@pytest.mark.needs("matplotlib")
def test_a_bundle_and_a_trace_are_enough_for_an_advice(
    parbake: Parbake, doubler_bundle: StoredBundle, trace: Path, tmp_path: Path
) -> None:
    words = ("--budget", "0.1,0.5", "--connections", "4", "--picture", "advice.svg")
    said = parbake("advise", doubler_bundle.path, "--trace", trace, *words)

    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert lines[0] == "traffic      2,000 requests (trace asked.trace)"
    assert lines[1].startswith("cardinality  50 different keys; 2.5 % of the requests")
    assert lines[2].startswith("peakedness   0.")
    for way in ("dynamic", "static", "hybrid 10 %", "hybrid 50 %"):
        assert any(line[4:].startswith(way) for line in lines), way
    assert sum(line.startswith("*   ") for line in lines) == 1
    assert said.stdout.isascii()
    assert "coverage curve" in (tmp_path / "advice.svg").read_text()
    assert said.stderr == "picture: advice.svg\n"


def test_as_json_the_advice_has_every_option_with_its_figures(
    parbake: Parbake, doubler_bundle: StoredBundle, trace: Path
) -> None:
    words = ("--rate", "50", "--price-core-hour", "0.1", "--connections", "4", "--json")
    said = parbake("advise", doubler_bundle.path, "--trace", trace, *words)

    advice = json.loads(said.stdout)
    options = advice["recommendation"]["options"]
    assert {option["mode"] for option in options} == {"dynamic", "static", "hybrid"}
    assert options[0] == advice["recommendation"]["best"]
    assert all(0 < option["p50_s"] <= option["p99_s"] for option in options)
    assert all(option["rate_per_s"] == 50 for option in options)
    assert advice["prices"] == {"core_hour": 0.1, "gb_month": 0.1, "given": True}
    assert advice["traffic"]["distinct"] == {"value": 50.0, "error": 0.0}


def test_without_traffic_or_a_bundle_it_says_what_to_give(
    parbake: Parbake, doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.trace"
    torn.write_bytes(b"12345")

    for words, complaint in (
        ((doubler_bundle.path, "--trace", torn), "a trace of 4-byte numbers has 5 bytes"),
        (("--trace", torn), "no bundle is given"),
        ((doubler_bundle.path, "--trace", torn, "--log", tmp_path), "both a trace and a log are given"),
        ((doubler_bundle.path, "--trace", torn, "--verify", "1"), "--verify watches a running server"),
        ((doubler_bundle.path, "--trace", torn, "--budget", "0,2"), "a share is above 0 and at most 1"),
    ):
        said = parbake("advise", *words)
        assert said.returncode == Exit.USAGE
        assert complaint in said.stderr


def test_a_running_server_is_advised_and_held_against_its_prediction(
    parbake: Parbake, doubler_bundle: StoredBundle
) -> None:
    with serving(doubler_bundle.path, mode="hybrid", workers=1) as server:
        stop = threading.Event()

        def ask() -> None:
            random = np.random.default_rng(5)
            while not stop.is_set():
                row = [float(random.zipf(1.5) % 1000), 1.0]
                tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": row}
                body = json.dumps({"inputs": [tensor]}).encode()
                url = f"{server.url}/v2/models/doubler/infer"
                request = urllib.request.Request(url, body, {"content-type": "application/json"})
                urllib.request.urlopen(request, timeout=10).close()

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            verified = parbake("advise", "--port", str(server.port), "--verify", "2", "--json")
            advised = parbake("advise", "--port", str(server.port), "--connections", "4")
        finally:
            stop.set()
            asking.join()

    assert verified.returncode == 0, verified.stderr
    checks = {check["what"]: check for check in json.loads(verified.stdout)["checks"]}
    assert list(checks)[:2] == ["coverage", "p50 in the server"]
    assert checks["coverage"]["predicted"] == pytest.approx(checks["coverage"]["observed"], rel=0.3)
    assert advised.returncode == 0, advised.stderr
    assert "(doubler, as it is served)" in advised.stdout.splitlines()[0]


def test_the_size_of_a_table_is_predicted_within_a_twentieth(
    doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    examples = examples_of(doubler_bundle)
    keys = [int(i).to_bytes(16, "big") for i in range(30_000)]

    predicted = table_row_bytes(doubler_bundle.contract, examples, tmp_path) * len(keys)
    real = quick_table(doubler_bundle, keys, [examples.records[0]] * len(keys), tmp_path / "real.table")

    assert predicted == pytest.approx(real, rel=0.05)
