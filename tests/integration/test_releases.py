"""A version is released on a running server: by the judge, by hand, and back, without a failed request."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from parbake.app.releases import Back, ReleaseStatus, TuningChange, Wanted
from parbake.app.routes import RouteChange
from parbake.contract.bundle import Goldens
from parbake.contract.model import TensorSpec
from parbake.errors import Conflict, GateRefused, InvalidInput, ParbakeError, SettingsError, VersionNotFound
from parbake.release.database import open_database
from parbake.release.gate import GateReport
from parbake.release.judge import Decision, Margins
from parbake.serving.route import Arm, Route, Watch
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


def parbake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "parbake", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def events(folder: Path) -> list[Any]:
    with closing(open_database(f"sqlite:///{folder / 'state' / 'state.db'}", create=False)) as state:
        return list(msgspec.to_builtins(state.history("scaled")))


def history(folder: Path) -> list[str]:
    return [event["what"] for event in events(folder)]


def test_all_at_once_and_back_in_no_time(tmp_path: Path) -> None:
    two, three = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3))
    with (
        served(tmp_path, two) as server,
        calling(server.url, *(rows("scaled", row) for row in SERVED[:3])) as callers,
    ):
        found = deploy(server, three, why="it is better", by="ada")
        assert (found.state, found.version, found.champion, found.against) == ("live", "2", "2", "1")
        assert found.gate is not None
        assert found.gate.ok
        assert factors(server) == {3}
        with pytest.raises(Conflict, match="already"):
            deploy(server, three)
        back = client.rollback("scaled", Back(by="ada", why="it is not"), port=server.port)
        assert (back.champion, back.version) == ("1", "2")
        assert back.seconds > 0
        assert factors(server) == {2}
        by_hand = Route("scaled", "1", (Arm("1", 0.6), Arm("2", 0.4)))
        client.set_route("scaled", RouteChange(route=by_hand), port=server.port)
        with pytest.raises(Conflict) as found_out:
            client.rollback("scaled", Back(to="1"), port=server.port)
        assert "--kill" in found_out.value.hint
        client.set_route("scaled", RouteChange(remove=True), port=server.port)
        # What has been taken back may be tried again, although it is still loaded.
        again = deploy(server, three, kind="canary", steps=(0.5, 1.0), margins=Margins(requests=100_000))
        assert (again.state, again.champion, again.share) == ("running", "1", 0.5)
        assert client.rollback("scaled", Back(), port=server.port).champion == "1"
        # What is refused leaves no trace.
        known = history(tmp_path)
        with pytest.raises(SettingsError, match="nowhere"):
            deploy(server, three, "3", kind="canary", steps=(0.5, 1.0), watch=Watch(segment="nowhere"))
        with pytest.raises(Conflict, match="nothing to go back to"):
            deploy(server, two, "3")
        assert history(tmp_path) == known
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
    nobodys = write_scaled(tmp_path / "3.bundle", 3, owner="")
    foreign = write_function(tmp_path, "def predict(x):\n    raise ValueError('no')\n", name="other").path
    with served(tmp_path, two) as server:
        with pytest.raises(GateRefused, match="metadata") as refused:
            deploy(server, nobodys.path, why="tonight", by="ada")
        report = refused.value.report
        assert isinstance(report, GateReport)
        assert [check.name for check in report.refused] == ["metadata"]
        (event,) = events(tmp_path)
        assert (event["what"], event["version"], event["by"], event["why"], event["digest"]) == (
            "release.refused", "2", "ada", "tonight", nobodys.digest,
        )  # fmt: skip
        assert list(event["details"]["checks"]) == ["metadata"]
        # The bundle of another model is refused as that, whatever the gate would find in it.
        with pytest.raises(InvalidInput, match="is of another model: 'other'") as another:
            deploy(server, foreign)
        assert "parbake deploy other@2" in another.value.hint
        assert "--breaking" not in str(another.value)
        assert factors(server) == {2}
        found = deploy(server, nobodys.path, waive=("metadata",), why="tonight only", by="ada")
        assert found.state == "live"
        assert "waiver" in history(tmp_path)


def test_what_breaks_callers_or_has_no_owner_is_released_by_force_and_stands_in_history_and_inventory(
    tmp_path: Path,
) -> None:
    two = write_scaled(tmp_path / "2.bundle", 2).path
    wider = write_function(
        tmp_path, "def predict(x):\n    return x\n", name="scaled", inputs=(TensorSpec("x", "FP32", (3,)),),
        outputs=(TensorSpec("y", "FP32", (3,)),), owner="", goldens=Goldens(
            {"x": np.ones((2, 3), np.float32)}, {"y": np.ones((2, 3), np.float32)}
        ),
    ).path  # fmt: skip
    with served(tmp_path, two) as server:
        how = ("deploy", "scaled@2", str(wider), "--force", "--why", "agreed", "--port", str(server.port))
        refused = parbake(tmp_path, *how)
        assert refused.returncode == 1
        assert "schema" in refused.stderr
        assert "metadata" not in refused.stderr
        # A line for each check, as parbake gate has it, and how to let it pass.
        lines = [line.split()[:2] for line in refused.stdout.splitlines()]
        assert ["metadata", "waived"] in lines
        assert ["schema", "failed"] in lines
        assert "or --breaking; or --waive schema --why TEXT\n" in refused.stderr
        assert "error: version '2' of 'scaled' must not take traffic: schema did not pass\n" in refused.stderr
        assert [event["what"] for event in events(tmp_path)] == ["release.refused"]
        with pytest.raises(ValueError, match="needs a reason"):
            deploy(server, wider, breaking=True)
        done = parbake(tmp_path, *how, "--breaking", "--who", "ada")
        assert done.returncode == 0, done.stderr
        waived = [event for event in events(tmp_path) if event["what"] == "waiver"]
        assert {(event["details"]["check"], event["by"], event["why"]) for event in waived} == {
            ("metadata", "ada", "agreed"), ("schema", "ada", "agreed"),
        }  # fmt: skip
        shown = json.loads(
            parbake(
                tmp_path, "inventory", "--port", str(server.port), "--state-dir", "state", "--json"
            ).stdout
        )
        (item,) = [item for item in shown["items"] if item["version"] == "2"]
        assert {waiver["check"] for waiver in item["waivers"]} == {"metadata", "schema"}


def test_a_version_that_could_not_be_found_again_does_not_go_live(tmp_path: Path) -> None:
    two, three = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3))
    with served(tmp_path, two) as server:
        deploy(server, three, kind="canary", steps=(0.5, 1.0), margins=Margins(requests=100_000))
        assert factors(server) == {2, 3}
        shutil.rmtree(three)
        with pytest.raises(ParbakeError):
            client.promote("scaled", Back(by="ada"), port=server.port)
        assert factors(server) == {2}
        assert history(tmp_path)[-3:] == ["release.begun", "release.advanced", "release.rolled_back"]
        assert events(tmp_path)[-1]["version"] == "2"
        with pytest.raises(Conflict, match="no release"):
            client.promote("scaled", Back(), port=server.port)


def test_a_release_is_changed_while_it_runs_and_the_judge_goes_by_it(tmp_path: Path) -> None:
    two = write_scaled(tmp_path / "2.bundle", 2).path
    again = write_scaled(tmp_path / "again.bundle", 2, owner="others@parbake.example").path
    with (
        served(tmp_path, two) as server,
        calling(server.url, *(rows("scaled", *SERVED[n::8]) for n in range(8))) as callers,
    ):
        deploy(server, again, kind="canary", steps=(0.5, 1.0), margins=Margins(requests=10**9, p50=5, p99=20))
        port = ("--port", str(server.port))
        what = ("--set", "hold=on", "--set", "requests=20", "--set", "every=0s")
        done = parbake(tmp_path, "release", "scaled", *what, "--why", "few callers", "--who", "ada", *port)
        assert "hold=on" in done.stdout, done.stderr
        # By the requests that it needs now it is good enough, and it waits all the same.
        wait_for(lambda: (v := status(server).verdict) is not None and v.decision is Decision.PROMOTE)
        drawn = parbake(tmp_path, "release", "scaled", "--plot", str(tmp_path / "verdict.svg"), *port)
        assert "evidence of harm" in drawn.stdout, drawn.stderr
        assert "<svg" in (tmp_path / "verdict.svg").read_text()
        for name, value in (("p99", -1), ("p98", 0.1), ("requests", 0.5), ("timeout_ms", 0), ("hold", 1)):
            with pytest.raises(SettingsError):
                client.tune("scaled", TuningChange({name: value}), port=server.port)
        assert status(server).state == "running"
        # In an emergency the champion's bundle need not be where it was: it is loaded.
        two.rename(tmp_path / "away.bundle")
        client.tune("scaled", TuningChange({"kill": True}, by="bob"), port=server.port)
        with Call(server.url) as call:
            versions = {call(PATH, infer(row)).json()["model_version"] for row in SERVED[:40]}
        assert versions == {"1"}
        # The route is that of the release: its kill switch is the same one, and the next step would undo the rest.
        with pytest.raises(Conflict, match="the route is that of the release"):
            client.set_route("scaled", RouteChange(remove=True), port=server.port)
        with pytest.raises(Conflict, match="not 99"):
            client.set_route("scaled", RouteChange(killed=False, revision=99), port=server.port)
        parbake(tmp_path, "route", "scaled", "--no-kill", "--who", "eve", *port)
        assert not status(server).tuning.kill
        parbake(tmp_path, "route", "scaled", "--kill", "--who", "eve", *port)
        assert status(server).tuning.kill
        (tmp_path / "away.bundle").rename(two)
        client.tune("scaled", TuningChange({"kill": None, "hold": False}, by="bob"), port=server.port)
        wait_for(lambda: status(server).state == "live")
        changed = [event for event in events(tmp_path) if event["what"] == "parameters"]
        assert [(event["by"], event["why"]) for event in changed] == [
            ("ada", "few callers"), ("bob", ""), ("eve", ""), ("eve", ""), ("bob", ""),
        ]  # fmt: skip
        assert changed[0]["details"]["values"]["requests"] == 20
        with pytest.raises(Conflict, match="only hold"):
            client.tune("scaled", TuningChange({"p99": 0.5}), port=server.port)
        assert client.tune("scaled", TuningChange({"hold": True}), port=server.port).tuning.hold
        for caller in callers:
            caller.wait(20)
    assert all(noted.status == 200 for caller in callers for noted in caller.noted)


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
