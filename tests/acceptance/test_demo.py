"""The programs of `make demo` and `make demo-release` in a small setting: what they show is so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from bench.load import Load, put
from demo.comparison import Disagreement, held_against
from parbake.contract.bundle import StoredBundle
from parbake.release.database import open_database
from parbake.testing import serving

ROOT = Path(__file__).parents[2]
SMALL = ("--seconds", "1", "--trees", "20", "--popular", "300", "--port", "0")


def command(folder: Path, *more: str) -> list[str]:
    """The program in a small setting."""
    return [sys.executable, "-m", "demo", "--folder", str(folder), *SMALL, *more]


def table(text: str) -> dict[str, dict[str, str]]:
    """The printed table: cells by title, by mode."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("mode "))
    titles = re.split(r"  +", lines[start].strip())
    rows = [re.split(r"  +", line.strip()) for line in lines[start + 1 : start + 4]]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


@pytest.mark.needs("sklearn", "skl2onnx", "pandas")
def test_once_compares_the_three_modes_and_ends_by_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--once"),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "bit-equal to scikit-learn" in done.stdout
    rows = table(done.stdout)
    assert list(rows) == ["dynamic", "static", "hybrid"]
    assert {row["agreement"] for row in rows.values()} == {"100%"}
    assert all(float(row["requests/s"].replace(",", "")) > 0 for row in rows.values())
    assert rows["dynamic"]["coverage"] == "0%"
    assert 0 < int(rows["static"]["coverage"].rstrip("%")) < 100
    assert 0 < int(rows["hybrid"]["coverage"].rstrip("%")) < 100
    assert (rows["dynamic"]["404"], rows["hybrid"]["404"]) == ("-", "-")
    assert int(rows["static"]["404"].replace(",", "")) > 0


@pytest.mark.needs("sklearn", "skl2onnx", "pandas", "sqlalchemy")
def test_a_bad_version_is_taken_back_by_itself_a_good_one_goes_live_and_nobody_notices(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo.release", "--quick", "--folder", str(tmp_path / "demo")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    # It ends with another status where a request fails, or where coverage falls.
    assert done.returncode == 0, done.stdout + done.stderr
    bad, good = done.stdout.split("$ parbake deploy")[1:]
    # Each act says beforehand what there is to see.
    said = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    assert len(said) == 5
    assert "watch the judge take it back" in said[2]
    assert "digits: version 2 was rolled back\nversion 1 answers\n" in bad
    assert re.search(r"judge: roll back: outputs of post differ by 0\.\d+: more than 0\.1", bad)
    assert "digits: version 3 is live\n" in good
    figures = re.search(
        r"([\d,]+) requests meanwhile, none of them failed\. Coverage was ([\d.]+)% before the releases, and "
        r"never below ([\d.]+)% in any 1 s of them or in 500 requests, nor below ([\d.]+)% for a version alone",
        done.stdout,
    )
    assert figures, done.stdout
    requests, before, *lowest = (float(figure.replace(",", "")) for figure in figures.groups())
    assert requests > 1000
    assert 0 < 0.95 * before <= min(lowest)
    with closing(
        open_database(f"sqlite:///{tmp_path / 'demo' / 'state' / 'state.db'}", create=False)
    ) as store:
        events = [(e.what, e.version, e.by) for e in store.history("digits") if e.deployment]
        live = store.live("digits")
    assert ("release.rolled_back", "2", "parbake") in events
    assert live is not None
    assert (live.proposal.version, live.share) == ("3", 1.0)


@pytest.mark.needs("sklearn", "skl2onnx", "pandas")
def test_it_serves_until_ctrl_c_what_it_says_to_try(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if "until Ctrl-C" in line:
                break
        found = re.search(r"curl -s (\S+) -d @(\S+)", "".join(said))
        assert found, "".join(said)
        request = urllib.request.Request(found[1], Path(found[2]).read_bytes())
        with urllib.request.urlopen(request, timeout=30) as reply:
            answer = json.load(reply)
        assert answer["label"] in range(10)
        assert sum(answer["probability"].values()) == pytest.approx(1)
        # As a terminal does: to the program and to the server that it started.
        os.killpg(process.pid, signal.SIGINT)
        _, words = process.communicate(timeout=60)
        assert (process.returncode, words) == (0, "")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(found[1], timeout=5)


def test_one_wrong_answer_is_found_and_named(doubler_bundle: StoredBundle) -> None:
    bodies = tuple(
        json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": row}]}).encode()
        for row in ([1, 2], [3, 4])
    )
    with serving(doubler_bundle.path) as server:
        measured = put(
            Load(
                port=server.port,
                path="/v2/models/doubler/infer",
                bodies=bodies,
                order=(0, 0, 0, 1),
                connections=2,
                seconds=0.1,
                warm_up_s=0.1,
                expected=([[2.0, 4.0]], [[6.0, 8.25]]),
            )
        )
    assert measured.right > 0
    assert measured.wrong > 0
    assert measured.failed == 0
    assert measured.complaint == "body 1: expected [[6.0, 8.25]], got [[6.0, 8.0]]"
    with pytest.raises(Disagreement, match=r"expected \[\[6\.0, 8\.25\]\], got \[\[6\.0, 8\.0\]\]"):
        held_against("dynamic", measured, baked=set())


def test_a_request_that_fails_is_found_and_named(doubler_bundle: StoredBundle) -> None:
    with serving(doubler_bundle.path) as server:
        measured = put(
            Load(
                port=server.port,
                path="/v2/models/nobody/infer",
                bodies=(b"{}",),
                order=(0,),
                connections=1,
                seconds=0.1,
                warm_up_s=0.0,
            )
        )
    assert measured.right == 0
    assert measured.failed > 0
    assert measured.complaint.startswith("body 0: status 404, ")
