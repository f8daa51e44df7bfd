"""A table that is changed where it lies, under the server that reads it: nobody dies, and nobody gets half of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parbake.tables.lease import take_lease
from parbake.tables.model import DATA
from parbake.testing import serving
from parbake.transports import client
from tests.functions import write_scaled
from tests.traffic import Call, answer, bake_rows, calling, infer, rows, wait_for

BAKED = [(float(i), 1.0) for i in range(2000)]
SCALED = "/v2/models/scaled/infer"

needs_leases = pytest.mark.skipif(not hasattr(__import__("fcntl"), "F_SETLEASE"), reason="leases are Linux's")


def cut(table: Path) -> None:
    """Take all but two pages off the data."""
    os.truncate(table / DATA, 8192)


def write_into(table: Path) -> None:
    """Change a byte in the middle, as a copy over it would."""
    with (table / DATA).open("r+b") as data:
        data.seek(20_000)
        data.write(b"\xff" * 100)


@needs_leases
@pytest.mark.parametrize("change", [cut, write_into])
def test_a_table_that_is_changed_is_let_go_of_first_and_the_model_answers(
    tmp_path: Path, change: object
) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    other = write_scaled(tmp_path / "other.bundle", 3, name="other")
    table = bake_rows(bundle, BAKED, tmp_path / "scaled.table")
    with (
        serving(bundle.path, other.path, "--table", f"scaled={table}", workers=2, head_rows=0) as server,
        calling(server.url, rows("scaled", *BAKED[::50]), rows("other", *BAKED[::50])) as callers,
    ):
        before = client.status(port=server.port)
        assert callable(change)
        change(table)
        for caller in callers:
            caller.wait(200)
        after = client.status(port=server.port)
        log = server.log()
        assert after.front_pids == before.front_pids
        assert "table.lost" in log
        # A sound one comes in by a reload.
        bake_rows(bundle, BAKED, tmp_path / "scaled.table", replace=True)
        client.reload(port=server.port)
        assert client.status(port=server.port).versions[0].table_rows == len(BAKED)
    for caller, factor in zip(callers, (2, 3), strict=True):
        assert caller.failures == []
        for noted in caller.noted:
            left, right = answer(noted)
            assert (left / factor, right) in {(x, factor * 1.0) for x, _ in BAKED[::50]}


@needs_leases
def test_static_mode_says_that_its_table_was_changed_and_is_not_ready(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, BAKED, tmp_path / "scaled.table")
    with serving(bundle.path, "--table", table, mode="static", workers=1) as server, Call(server.url) as call:
        # The reply to these bytes is remembered from the second time on.
        assert [answer(call(SCALED, infer(BAKED[7]))) for _ in range(3)] == [[14.0, 2.0]] * 3
        cut(table)
        refused = call(SCALED, infer(BAKED[7]))
        assert (refused.status, refused.json()["code"]) == (503, "not_ready")
        assert "was changed where it lies" in refused.json()["error"]
        assert call("/v2/health/ready").status == 503


@pytest.mark.parametrize("mode", ["hybrid", "static"])
def test_a_front_that_starts_late_does_without_what_is_torn_and_serves_the_rest(
    tmp_path: Path, mode: str
) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    other = write_scaled(tmp_path / "other.bundle", 3, name="other")
    table = bake_rows(bundle, BAKED, tmp_path / "scaled.table")
    config = tmp_path / "parbake.toml"
    config.write_text(
        f"[[deployments]]\nbundle = '{bundle.path}'\nmode = '{mode}'\ntable = '{table}'\n"
        f"[[deployments]]\nbundle = '{other.path}'\nmode = 'dynamic'\n"
    )
    with serving(config=config, workers=1) as server, Call(server.url) as call:
        (front,) = client.status(port=server.port).front_pids
        os.kill(front, signal.SIGKILL)
        cut(table)
        wait_for(lambda: client.status(port=server.port).front_restarts == 1)
        wait_for(lambda: call("/v2/models/other/infer", infer((1, 2))).status == 200)
        noted = call(SCALED, infer(BAKED[7]))
        if mode == "hybrid":
            assert answer(noted) == [14.0, 2.0]
        else:
            assert (noted.status, noted.json()["code"]) == (503, "not_ready")
        assert "front.without_models" in server.log()


@needs_leases
def test_a_lease_is_broken_before_the_file_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    lease = take_lease(path)
    if lease is None:
        pytest.skip("this file system gives no leases")
    told: list[bool] = []

    def give_up(*_: object) -> None:
        told.append(lease.broken)
        assert path.stat().st_size == 100
        lease.close()

    before = signal.signal(signal.SIGIO, give_up)
    try:
        assert not lease.broken
        # By another process, as it would be: it is held up until the lease is given back.
        code = f"import os; os.truncate({str(path)!r}, 10)"
        other = subprocess.Popen([sys.executable, "-c", code])
        wait_for(lambda: other.poll() is not None)
    finally:
        signal.signal(signal.SIGIO, before)
    assert other.returncode == 0
    assert told == [True]
    assert path.stat().st_size == 10
    assert take_lease(tmp_path / "none") is None
