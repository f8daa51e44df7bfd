"""A fault stays in its room: processes are killed under load, and only who needed them notices, for a moment."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parbake.app.supervisor import Change, Status, VersionStatus
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_function, write_scaled
from tests.traffic import Call, answer, bake_rows, calling, infer, is_there, once, rows, wait_for

BAKED = [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]


def status(server: Server) -> Status:
    return client.status(port=server.port)


def version(server: Server, name: str) -> VersionStatus:
    return next(version for version in status(server).versions if version.name == name)


def test_a_killed_runner_does_not_stop_baked_answers_nor_other_models(tmp_path: Path) -> None:
    sound = write_scaled(tmp_path / "sound.bundle", 2, name="sound")
    killed = write_scaled(tmp_path / "killed.bundle", 3, name="killed")
    table = bake_rows(killed, BAKED, tmp_path / "killed.table")
    with (
        serving(
            sound.path, killed.path, "--table", f"killed={table}", placement="process", workers=1, head_rows=0
        ) as server,
        calling(
            server.url,
            rows("sound", (1.0, 2.0), (8.0, 9.0)),
            rows("killed", *BAKED),
            rows("killed", (8.0, 9.0), (7.0, 6.0)),
            rows("killed", (8.0, 9.5)),
        ) as (other, baked, *rest),
    ):
        for round_ in (1, 2):
            (pid,) = version(server, "killed").runner_pids
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda n=round_: version(server, "killed").runner_restarts == n)  # type: ignore[misc]
            wait_for(lambda: status(server).spare_pid)
            for caller in (other, baked, *rest):
                caller.wait(20)
        status_after = version(server, "killed")
    assert status_after.runner_restarts == 2
    for caller, factor in ((other, 2), (baked, 3)):
        assert caller.noted
        for noted in caller.noted:
            left, right = answer(noted)
            assert (left / factor, right / factor) in [*BAKED, (8.0, 9.0)]
    for caller in rest:
        # Who was let in before the process ended is answered when it is back.
        assert max(noted.ended - noted.began for noted in caller.noted) < 1.0
        down_since: float | None = None
        for noted in caller.noted:
            if noted.status == 200:
                if down_since is not None:
                    # The one second that the design allows; it takes a tenth of it where nothing else runs.
                    assert noted.ended - down_since < 1.0
                    down_since = None
                continue
            assert noted.status == 503, noted
            assert noted.headers["retry-after"] == "1"
            assert noted.json()["code"] == "runner_down"
            assert "is being started again" in noted.json()["error"]
            down_since = down_since or noted.began
        assert down_since is None


def test_of_two_runners_one_goes_on_while_the_other_is_started_again(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with (
        serving(bundle.path, placement="process", runners=2, workers=1) as server,
        calling(server.url, *[rows("scaled", (1.0, float(i))) for i in range(4)]) as callers,
    ):
        first, second = version(server, "scaled").runner_pids
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: version(server, "scaled").runner_restarts == 1)
        assert second in version(server, "scaled").runner_pids
        for caller in callers:
            caller.wait(20)
    for caller in callers:
        failed = [noted for noted in caller.noted if noted.status != 200]
        # What the one that died had been given was given to the other.
        assert not failed


def test_a_row_that_ends_the_process_is_its_own_callers_trouble(tmp_path: Path) -> None:
    source = "import os\ndef predict(x):\n    if (x == 666).any():\n        os._exit(3)\n    return x * 2\n"
    bundle = write_function(tmp_path, source)
    with serving(bundle.path, workers=1) as server:
        call = Call(server.url)
        for _ in range(3):
            poisoned = call("/v2/models/function/infer", infer((666, 1)))
            assert (poisoned.status, poisoned.json()["code"]) == (422, "row_quarantined")
            wait_for(lambda: call("/v2/models/function/infer", infer((1, 2))).status == 200)
        # It was given a second chance, and from then on it was known.
        assert version(server, "function").runner_restarts == 2
        call.close()


def test_a_row_that_ends_the_process_takes_no_neighbour_with_it(tmp_path: Path) -> None:
    source = (
        "import os, time\ndef predict(x):\n    time.sleep(0.05)\n"
        "    if (x == 666).any():\n        os._exit(3)\n    return x * 2\n"
    )
    bundle = write_function(tmp_path, source)
    asked = [(float(i), 1.0) for i in range(24)] + [(666.0, 1.0)]
    with serving(bundle.path, workers=1) as server, ThreadPoolExecutor(len(asked)) as crowd:
        statuses: list[int] = []
        for _ in range(2):
            noted = list(
                crowd.map(lambda row: once(server.url, "/v2/models/function/infer", infer(row)), asked)
            )
            for row, one in zip(asked[:-1], noted[:-1], strict=True):
                if one.status == 503:
                    # It came when nobody was there, and was told to come again.
                    assert one.json()["code"] == "runner_down"
                else:
                    assert answer(one) == [2 * row[0], 2.0]
            assert (noted[-1].status, noted[-1].json()["code"]) == (422, "row_quarantined")
            statuses = [one.status for one in noted[:-1]]
            wait_for(lambda: once(server.url, "/v2/models/function/infer", infer((1, 2))).status == 200)
        # The second time, nobody notices anything any more.
        assert statuses == [200] * 24
        assert version(server, "function").runner_restarts <= 4


def test_a_spare_that_was_killed_is_no_loss(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, placement="process", workers=1) as server:
        wait_for(lambda: status(server).spare_pid)
        spare = status(server).spare_pid
        assert spare
        os.kill(spare, signal.SIGKILL)
        wait_for(lambda: not is_there(spare))
        os.kill(version(server, "scaled").runner_pids[0], signal.SIGKILL)
        wait_for(lambda: version(server, "scaled").runner_restarts == 1)
        call = Call(server.url)
        wait_for(lambda: call("/v2/models/scaled/infer", infer((1, 2))).status == 200)
        wait_for(lambda: status(server).spare_pid not in (None, spare))
        call.close()


def test_a_runner_never_comes_back_as_another_model(tmp_path: Path) -> None:
    # Somebody has put a new bundle under the old path, and not yet said so.
    path = tmp_path / "scaled.bundle"
    table = bake_rows(write_scaled(path, 2), BAKED, tmp_path / "scaled.table")
    with serving(path, table=table, placement="process", workers=1) as server:
        call = Call(server.url)
        new = write_scaled(path, 5, replace=True)
        os.kill(version(server, "scaled").runner_pids[0], signal.SIGKILL)
        wait_for(lambda: "runner.refused" in server.log())
        assert "now holds bundle" in server.log()
        refused = call("/v2/models/scaled/infer", infer((8, 9)))
        assert (refused.status, refused.json()["code"]) == (503, "runner_down")
        assert answer(call("/v2/models/scaled/infer", infer(BAKED[0]))) == [2.0, 4.0]
        assert call("/v2/health/ready").status == 503
        fresh = bake_rows(new, BAKED, tmp_path / "new.table")
        client.reload([Change(name="scaled", table=str(fresh))], port=server.port)
        for row in [(8.0, 9.0), BAKED[0]]:
            assert answer(call("/v2/models/scaled/infer", infer(row))) == [5 * row[0], 5 * row[1]]
        assert call("/v2/health/ready").status == 200
        call.close()


@pytest.mark.parametrize("placement", ["inline", "process"])
def test_a_killed_front_is_started_again_and_its_clients_connect_again(
    tmp_path: Path, placement: str
) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with (
        serving(bundle.path, placement=placement, workers=2) as server,
        calling(server.url, *[rows("scaled", (1.0, float(i))) for i in range(4)]) as callers,
    ):
        before = status(server)
        assert len(before.front_pids) == 2
        for killed in (1, 2):
            os.kill(status(server).front_pids[0], signal.SIGKILL)
            wait_for(lambda n=killed: status(server).front_restarts == n)  # type: ignore[misc]
            for caller in callers:
                caller.wait(20)
        after = status(server)
        assert len(after.front_pids) == 2
        assert not set(after.front_pids) & set(before.front_pids[:1])
    broken = 0
    for caller in callers:
        for noted in caller.noted:
            if noted.status == 0:
                broken += 1
            else:
                # A front that is not ready yet takes no connection: nobody is told to come back later.
                assert answer(noted)[0] == 2.0
    assert 1 <= broken <= 8


def test_when_the_only_front_is_killed_clients_wait_a_moment(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, workers=1) as server:
        call = Call(server.url)
        assert call("/v2/models/scaled/infer", infer((1, 2))).status == 200
        os.kill(status(server).front_pids[0], signal.SIGKILL)
        time.sleep(0.05)
        assert call("/v2/health/ready").status in (0, 200)
        # The connection waits in the queue of the listening socket, which the supervisor holds open.
        assert answer(call("/v2/models/scaled/infer", infer((1, 2)))) == [2.0, 4.0]
        call.close()


def test_no_process_outlives_the_supervisor(tmp_path: Path) -> None:
    sleeper = write_function(
        tmp_path, "import time\ndef predict(x):\n    time.sleep(600)\n    return x\n", name="sleeper"
    )
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    with serving(bundle.path, sleeper.path, placement="process", workers=2) as server:
        wait_for(lambda: status(server).spare_pid)
        now = status(server)
        pids = [*now.front_pids, *(pid for v in now.versions for pid in v.runner_pids), now.spare_pid]
        assert len(pids) == 5
        # One of them is at work, deep in a call.
        with calling(server.url, rows("scaled", (1.0, 2.0))):
            asleep = Call(server.url, timeout_s=0.2)
            assert asleep("/v2/models/sleeper/infer", infer((1, 2))).status == 0
            server.process.kill()
            server.process.wait()
            wait_for(lambda: not any(is_there(pid) for pid in pids if pid), f"for {pids} to end")
