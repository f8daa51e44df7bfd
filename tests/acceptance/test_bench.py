"""`make bench`'s program runs, and prints and writes figures that can be. How good they are is not for tests to say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.clients import Wrk
from bench.http import PEERS
from bench.machine import Machine
from bench.processes import cpu_seconds, peer, with_descendants
from bench.report import Section, Table, at_least, at_most, keep

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


@pytest.mark.needs("fastapi", "uvicorn")
def test_it_measures_everything_and_writes_a_page(tmp_path: Path) -> None:
    done = bench("--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    sections = {section["key"]: section for section in json.loads((tmp_path / "benchmarks.json").read_text())}
    assert list(sections) == ["http", "head", "advise", "cold-start", "size", "bake"]
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
    assert page.count("\n## ") == 6
    for target in (
        "table hit, hybrid mode: requests/s / bare",
        "dynamic, inline: requests/s / FastAPI",
        "base install",
    ):
        assert re.search(
            rf"^\| {re.escape(target)} \| at \w+ [\d.]+ \| [\d,.]+( MB)? \| ", page, re.MULTILINE
        ), page
        assert target in done.stdout


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
    with peer(PEERS / "constant.py") as (process, port):
        before = cpu_seconds(with_descendants(process.pid))
        speed = Wrk().put(port, "/", (b'{"a": 1}', b'{"b": "\\n%d"}'), 2, 1)
        assert speed.requests_per_s > 0
        assert 0 < speed.p50_ms <= speed.p99_ms
        assert cpu_seconds((process.pid,)) > before
