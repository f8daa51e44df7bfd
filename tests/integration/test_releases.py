"""A version is released on a running server: by the judge, by hand, and back, without a failed request."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from parbake.app.releases import Back, ReleaseStatus, Wanted
from parbake.errors import Conflict, GateRefused, VersionNotFound
from parbake.release.judge import Margins
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import Call, answer, calling, infer, rows, wait_for

PATH = "/v2/models/scaled/infer"
SOON = Margins(requests=150)
SERVED = [(n / 256, 1.0) for n in range(1, 600)]


@contextmanager
def served(folder: Path, bundle: Path, **options: Any) -> Iterator[Server]:
    with serving(bundle, workers=1, state_dir=folder / "state", **options) as server:
        yield server


def deploy(server: Server, bundle: Path, version: str = "2", **rest: Any) -> ReleaseStatus:
    return client.release("scaled", Wanted(version, str(bundle), **rest), port=server.port)


def status(server: Server) -> ReleaseStatus:
    return client.release_status("scaled", port=server.port)


def factors(server: Server) -> set[float]:
    with Call(server.url) as call:
        return {answer(call(PATH, infer(row)))[0] / row[0] for row in SERVED[:40]}


def history(folder: Path) -> list[str]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "parbake",
            "history",
            "scaled",
            "--state-dir",
            str(folder / "state"),
            "--json",
        ],
        capture_output=True,
        check=True,
    )
    return [event["what"] for event in json.loads(done.stdout)]


def test_all_at_once_and_back_in_no_time(tmp_path: Path) -> None:
    two, three = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3))
    with (
        served(tmp_path, two) as server,
        calling(server.url, *(rows("scaled", row) for row in SERVED[:3])) as callers,
    ):
        found = deploy(server, three, why="it is better", by="ada")
        assert (found.state, found.version, found.champion) == ("live", "2", "1")
        assert found.gate is not None
        assert found.gate.ok
        assert factors(server) == {3}
        with pytest.raises(Conflict, match="already"):
            deploy(server, three)
        back = client.rollback("scaled", Back(by="ada", why="it is not"), port=server.port)
        assert (back.champion, back.version) == ("1", "2")
        assert back.seconds < 1
        assert factors(server) == {2}
        with pytest.raises(VersionNotFound):
            client.rollback("scaled", Back(to="7"), port=server.port)
        for caller in callers:
            caller.wait(20)
    assert all(noted.status == 200 for caller in callers for noted in caller.noted)


def test_a_good_version_goes_all_the_way_by_itself(tmp_path: Path) -> None:
    two = write_scaled(tmp_path / "2.bundle", 2).path
    # The same predictions from another bundle.
    again = write_scaled(tmp_path / "again.bundle", 2, owner="others@parbake.example").path
    with (
        served(tmp_path, two) as server,
        calling(server.url, *(rows("scaled", row) for row in SERVED[:8])) as callers,
    ):
        deploy(
            server,
            again,
            kind="canary",
            steps=(0.0, 0.3, 0.7, 1.0),
            margins=Margins(requests=50, p50=5, p99=20),
        )
        with pytest.raises(Conflict, match="is being released"):
            deploy(server, again, version="3")
        wait_for(lambda: status(server).state == "live")
        assert factors(server) == {2}
        with Call(server.url) as call:
            assert call(PATH, infer(SERVED[0])).json()["model_version"] == "2"
        for caller in callers:
            caller.wait(20)
    assert all(noted.status == 200 for caller in callers for noted in caller.noted)


def test_a_version_with_other_predictions_is_rolled_back_and_the_reason_is_kept(tmp_path: Path) -> None:
    two, nine = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 9))
    with (
        served(tmp_path, two) as server,
        calling(server.url, *(rows("scaled", *SERVED[n::3]) for n in range(3))) as callers,
    ):
        deploy(
            server, nine, kind="canary", steps=(0.5, 1.0), margins=Margins(requests=100_000, p50=5, p99=20)
        )
        wait_for(lambda: status(server).state == "rolled_back")
        assert factors(server) == {2}
        for caller in callers:
            caller.wait(20)
        what = history(tmp_path)
    assert all(noted.status == 200 for caller in callers for noted in caller.noted)
    assert "verdict.roll_back" in what
    assert what[-1] == "release.rolled_back"


def test_a_version_that_must_not_is_refused_with_what_speaks_against_it(tmp_path: Path) -> None:
    two = write_scaled(tmp_path / "2.bundle", 2).path
    nobodys = write_scaled(tmp_path / "3.bundle", 3, owner="").path
    with served(tmp_path, two) as server:
        with pytest.raises(GateRefused, match="metadata"):
            deploy(server, nobodys)
        assert factors(server) == {2}
        found = deploy(server, nobodys, waive=("metadata",), why="tonight only", by="ada")
        assert found.state == "live"
        assert "waiver" in history(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_started_again_goes_on_with_the_release(tmp_path: Path, how: signal.Signals) -> None:
    two, three = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3))
    with served(tmp_path, two) as server:
        deploy(server, three, kind="canary", steps=(0.5, 1.0), margins=Margins(requests=100_000))
        assert factors(server) == {2, 3}
        server.process.send_signal(how)
        server.process.wait(60)
    with served(tmp_path, two) as server:
        assert factors(server) == {2, 3}
        client.promote("scaled", Back(by="ada"), port=server.port)
        assert factors(server) == {3}
    # What is live is served, though the command names the bundle that was live before.
    with served(tmp_path, two) as server:
        assert factors(server) == {3}
        assert client.rollback("scaled", Back(), port=server.port).champion == "1"
        assert factors(server) == {2}


def test_a_version_that_only_shadows_answers_nobody(tmp_path: Path) -> None:
    two = write_scaled(tmp_path / "2.bundle", 2).path
    broken = write_function(tmp_path, "def predict(x):\n    raise ValueError('no')\n", name="scaled").path
    with (
        served(tmp_path, two) as server,
        calling(server.url, *(rows("scaled", row) for row in SERVED[:4])) as callers,
    ):
        deploy(
            server,
            broken,
            kind="shadow",
            steps=(0.0,),
            waive=("goldens", "latency", "memory", "schema"),
            why="to see it fail",
        )
        wait_for(lambda: status(server).state == "rolled_back")
        for caller in callers:
            caller.wait(20)
    assert all(noted.status == 200 and answer(noted)[0] for caller in callers for noted in caller.noted)
