"""`make bench`'s program runs, and prints and writes figures that can be. How good they are is not for tests to say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench import models
from bench.clients import Own, Wrk
from bench.contenders import BARE, OWN_PYTHON, PATH, ROSTER, memory_mib, start
from bench.machine import Machine
from bench.path import WAYS
from bench.path import Bench as Walk
from bench.payloads import bodies, calls, check
from bench.processes import cpu_seconds, peer, with_descendants
from bench.report import Section, Table, at_least, at_most, fill, keep
from bench.venvs import PEERS, NotInstalled, python_of, version_of
from parbake.testing import serving
from tests.traffic import wait_for

ROOT = Path(__file__).parents[2]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The program, with ``--quick``."""
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments), "--quick"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_pages_have_the_figures_that_were_measured() -> None:
    sections = msgspec.json.decode((ROOT / "docs" / "benchmarks.json").read_bytes(), type=list[Section])
    keys = {section.key for section in sections}
    for path in (ROOT / "docs").rglob("*.md"):
        text = path.read_text()
        assert set(re.findall(r"<!-- measured: (\S+) -->", text)) <= keys, path
        assert fill(text, sections) == text, f"{path}: not the figures of docs/benchmarks.json"


def test_the_path_between_two_sockets_is_walked_in_every_way(tmp_path: Path) -> None:
    packed = models.logistic_regression(tmp_path / "logistic", 80)
    for way in WAYS:
        # It compares answers with the model's, and raises where there are too few.
        walk = Walk(packed, way, tmp_path, 8)
        walk.ask(80)
        walk.drain()
        walk.close()


@pytest.mark.needs("fastapi", "uvicorn")
def test_it_measures_everything_and_writes_a_page(tmp_path: Path) -> None:
    done = bench("--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    sections = {section["key"]: section for section in json.loads((tmp_path / "benchmarks.json").read_text())}
    assert list(sections) == ["http", "head", "advise", "cold-start", "many", "size", "bake", "judge"]
    (figures,) = sections["http"]["figures"].values()
    servers = {item["server"] for item in figures["series"]}
    assert {"dynamic, inline", "dynamic, in a runner process", "table hit, hybrid mode"} < servers
    assert any("FastAPI" in server for server in servers)
    for item in figures["series"]:
        assert all(rate > 0 for rate in item["requests_per_s"])
        # What reads a request is not quicker than what does not, but windows are short and machines are busy.
        assert all(0 < ratio < 10 for ratio in item["requests_per_s_to_bare"])
        assert all(0 < p50 <= p99 for p50, p99 in zip(item["p50_ms"], item["p99_ms"], strict=True))
    for found in sections["cold-start"]["figures"].values():
        assert all(0 < seconds < 60 for seconds in found["seconds"])
    assert {"onnxruntime", "numpy", "pyarrow", "parbake"} <= set(sections["size"]["figures"]["bytes"])
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.count("\n## ") == 8
    for target in (
        "table hit, hybrid mode: requests/s / bare",
        "dynamic, inline: requests/s / FastAPI",
        "base install",
    ):
        assert re.search(
            rf"^\| {re.escape(target)} \| at \w+ [\d.]+ \| [\d,.]+( MB)? \| ", page, re.MULTILINE
        ), page
        assert target in done.stdout


def test_the_race_runs_without_any_peer_and_says_who_is_missing(tmp_path: Path) -> None:
    done = bench("race", "--peers", "", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (section,) = json.loads((tmp_path / "benchmarks.json").read_text())
    assert section["key"] == "race"
    (figures,) = section["figures"].values()
    ran = {(item["server"], item["protocol"], item["connections"]) for item in figures["series"]}
    for protocol in ("json", "binary", "grpc"):
        assert {
            ("parbake, table hit", protocol, 64),
            ("parbake, dynamic, inline", protocol, 64),
        } < ran
    assert ("parbake, dynamic, in a process", "json", 64) in ran
    assert ("parbake, everything on, table hit", "json", 1) in ran
    for item in figures["series"]:
        assert item["failed"] == 0
        assert all(rate > 0 for rate in item["requests_per_s"])
        assert 10 < item["memory_mib"] < 10_000
    page = (tmp_path / "benchmarks.md").read_text()
    assert "bare loop and parser, constant answer" in page
    assert "| everything on, table hit: requests/s / bare | at least 0.6 |" in page


def test_a_peer_is_not_installed_by_a_look(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled, match="make race"):
        python_of("mosec", install=False, say=print, venvs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_peer_has_a_server_and_exact_versions() -> None:
    folders = {item.folder for item in ROSTER}
    assert folders == {"bentoml", "fastapi", "litserve", "mlserver", "mosec", "ray_serve", "triton"}
    for item in ROSTER:
        assert (PEERS / item.folder / "server.py").is_file()
        assert version_of(item.folder, item.distribution)
        assert version_of(item.folder, "onnxruntime") == version_of("mosec", "onnxruntime")
        for line in (PEERS / item.folder / "requirements.txt").read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), (item.folder, line)


@pytest.mark.needs("fastapi", "uvicorn")
def test_a_server_that_answers_wrongly_does_not_race(tmp_path: Path) -> None:
    packed = models.logistic_regression(tmp_path / "logistic", 50)
    wrong = replace(packed, answers=[[1.0 - value for value in answer] for answer in packed.answers])
    with peer(PEERS / "fastapi" / "server.py", str(packed.onnx)) as (_, port):
        check(packed, "json", port, PATH, range(8))
        with pytest.raises(RuntimeError, match=r"row 0: answered .*, the model says"):
            check(wrong, "json", port, PATH, range(8))


def test_calls_over_grpc_are_counted_and_each_answer_is_compared(tmp_path: Path) -> None:
    packed = models.logistic_regression(tmp_path / "logistic", 50)
    requests = bodies(packed, "grpc")
    with serving(packed.bundle, workers=1, grpc=True) as server:
        port = int(server.grpc.rpartition(":")[2])
        found = calls(packed, requests, port, 4, 0.2)
        assert found.right > 0
        assert found.requests > 0
        assert (found.wrong, found.failed) == (0, 0)
        assert 0 < found.p50_ms <= found.p99_ms
        wrong = replace(packed, answers=packed.answers[1:] + packed.answers[:1])
        assert calls(wrong, requests, port, 4, 0.2).wrong > 0
        unknown = (bodies(packed, "grpc")[0].replace(b"eta", b"nix"),)
        lost = calls(replace(packed, answers=packed.answers[:1]), unknown, port, 1, 0.1)
        assert lost.failed > 0
        assert lost.right == 0


def test_a_frozen_peer_takes_no_time_and_goes_on_afterwards(tmp_path: Path) -> None:
    packed = models.logistic_regression(tmp_path / "logistic", 50)
    server = start(replace(BARE, restless=True), packed, OWN_PYTHON, tmp_path / "bare")
    try:
        server.wait(packed)
        assert memory_mib(server) > 1
        server.freeze()
        wait_for(lambda: Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        server.thaw()
        check(packed, "json", server.port, PATH, range(4), BARE.tolerance)
    finally:
        server.close()
    assert not Path(f"/proc/{server.pid}").exists()


def test_a_section_that_was_not_measured_again_stays_on_the_page(tmp_path: Path) -> None:
    machine = Machine("a processor", 2, 4.0, "Linux", "CPython 3.12", {}, "2026-01-01")

    def section(key: str, value: str) -> Section:
        return Section(key, key, "how.", (Table("t", ("a", "b"), (("row", value),)),), (), machine)

    for key, value in (("size", "1"), ("http", "2"), ("size", "3")):
        keep(section(key, value), tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert re.findall(r"\| row \| (\d) \|", page) == ["2", "3"]


def test_a_target_is_met_at_its_limit_and_not_beyond_it() -> None:
    assert at_least("x", 0.5, 0.5).met
    assert not at_least("x", 0.49, 0.5).met
    assert at_most("x", 1.5, 1.5).met
    assert not at_most("x", 1.51, 1.5).met


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed: apt install wrk")
def test_wrk_sends_the_bodies_and_counts_replies_and_the_server_its_time() -> None:
    with peer(PEERS / "bare" / "server.py") as (process, port):
        before = cpu_seconds(with_descendants(process.pid))
        speed = Wrk().put(port, "/", (b'{"a": 1}', b'{"b": "\\n%d"}'), 2, 1)
        assert speed.requests_per_s > 0
        assert 0 < speed.p50_ms <= speed.p99_ms
        assert cpu_seconds((process.pid,)) > before


@pytest.mark.parametrize(
    "client",
    [
        Own,
        pytest.param(
            Wrk,
            marks=pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed: apt install wrk"),
        ),
    ],
)
def test_a_replay_sends_each_request_once_and_ends_with_the_last(client: type[Own | Wrk]) -> None:
    bodies = (b'{"a": 1}', b'{"b": "\\n%d"}')
    order = (0, 1, 1) * 1000
    with peer(PEERS / "bare" / "server.py") as (_, port):
        began = time.monotonic()
        whole = client().replay(port, "/", bodies, order, 4, 60, mark=1500)
        passed = time.monotonic() - began
        part = client().replay(port, "/", bodies, order * 1000, 4, 1, mark=300)
        unmarked = client().replay(port, "/", bodies, order, 4, 60)

    assert whole.whole
    # Those under way at the beginning and at the end may be in it or not.
    assert 0.9 * len(order) <= whole.requests <= len(order) + 2 * 4
    assert 0 < whole.marked_s < whole.seconds < passed < 50
    assert not part.whole
    assert 0 < part.requests < len(order) * 1000
    assert 0 < part.marked_s < part.seconds
    assert unmarked.marked_s == 0.0
