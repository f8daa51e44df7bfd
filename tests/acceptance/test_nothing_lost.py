"""Under load: kill a runner, change bundles and tables, stop. Callers must not notice, or be told honestly."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import parbake
from parbake.testing import Server, serving
from parbake.transports import client
from tests.conftest import Parbake
from tests.traffic import Caller, calling, once, predict

BAKED = [{"x": [float(i), 1.0]} for i in range(8)]
UNBAKED = [{"x": [float(i), -1.0]} for i in range(100, 108)]

Pack = Callable[[str, float, str], Path]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """``pack(name, factor, folder)``: a model that multiplies two numbers by a factor."""

    def make(name: str, factor: float, folder: str) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Mul", ["x", "factor"], ["y"])],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
            [numpy_helper.from_array(np.array([factor], np.float32), "factor")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / f"{folder}.onnx")
        example = {"x": np.array([[1, 2], [3, 4.5]], np.float32)}
        parbake.pack(
            tmp_path / f"{folder}.onnx",
            name=name,
            example=example,
            purpose="tests",
            owner="tests",
            out=tmp_path / folder,
        )
        return tmp_path / folder

    return make


def bake(parbake: Parbake, bundle: Path, table: str) -> Path:
    """Bake the rows of `BAKED`."""
    folder = bundle.parent
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BAKED))
    done = parbake("bake", bundle, "--input", "rows.jsonl", "--out", table)
    assert done.returncode == 0, done.stderr
    return folder / table


def multiplied(row: dict[str, list[float]], factor: float) -> dict[str, Any]:
    """What the model answers."""
    return {"y": [value * factor for value in row["x"]]}


def runners_of(server: Server, name: str) -> tuple[int, ...]:
    """Process numbers of a deployment's runners."""
    return next(v.runner_pids for v in client.status(port=server.port).versions if v.name == name)


def test_a_killed_runner_stops_nobody_else(pack: Pack, parbake: Parbake) -> None:
    # Given two models in processes of their own, one with a table
    first, second = pack("first", 2, "first.bundle"), pack("second", 3, "second.bundle")
    table = bake(parbake, first, "first.table")
    with serving(first, second, placement="process", table=f"first={table}", head_rows=0) as server:
        asked = predict("second", *UNBAKED), predict("first", *BAKED), predict("first", *UNBAKED)
        (killed,) = runners_of(server, "first")

        # When the runner of the one with the table is killed under load
        with calling(server.url, *asked) as (other, baked, tail):
            time.sleep(0.5)
            at = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            time.sleep(2.5)

        # Then the other model and the baked rows have not noticed, with many answers since
        for caller, rows, factor in ((other, UNBAKED, 3.0), (baked, BAKED, 2.0)):
            assert caller.failures == []
            assert sum(noted.ended > at for noted in caller.noted) > 50
            assert all(
                noted.json() == multiplied(rows[i % 8], factor) for i, noted in enumerate(caller.noted)
            )

        # And the rest waited, or got 503 with Retry-After, for less than a second
        assert {noted.status for noted in tail.failures} <= {503}
        assert all(int(noted.headers["retry-after"]) >= 1 for noted in tail.failures)
        assert all(noted.json()["code"] == "runner_down" for noted in tail.failures)
        last = max([at, *(noted.ended for noted in tail.failures)])
        back = next(noted.ended for noted in tail.noted if noted.status == 200 and noted.ended > last)
        assert back - at < 1.0
        assert runners_of(server, "first") != (killed,)


def test_a_new_bundle_and_a_new_table_go_under_a_running_server_unnoticed(
    pack: Pack, parbake: Parbake
) -> None:
    # Given a server with a table, under load on rows that are baked and rows that are not
    old, new = pack("eta", 2, "old.bundle"), pack("eta", 5, "new.bundle")
    table, newer = bake(parbake, old, "old.table"), bake(parbake, new, "new.table")
    with serving(old, table=table, placement="process", head_rows=0) as server:
        with calling(server.url, predict("eta", *BAKED), predict("eta", *UNBAKED)) as callers:
            # When the table alone does not fit the new bundle, it is refused and nothing changes
            refused = parbake("reload", "--port", str(server.port), "--table", newer)
            assert refused.returncode != 0
            assert "baked by" in refused.stderr

            # And when bundle and table are put in together, again and again
            for bundle, its_table in [(new, newer), (old, table), (new, newer)]:
                done = parbake("reload", bundle, "--port", str(server.port), "--table", its_table)
                assert done.returncode == 0, done.stderr
                time.sleep(0.2)
            swapped = time.monotonic()
            time.sleep(0.3)

        # Then no request failed, and every answer is exactly one of the two models'
        for caller, rows in zip(callers, (BAKED, UNBAKED), strict=True):
            assert caller.failures == []
            for number, noted in enumerate(caller.noted):
                row = rows[number % 8]
                assert noted.json() in (multiplied(row, 2), multiplied(row, 5))
                if noted.ended > swapped + 0.1:
                    assert noted.json() == multiplied(row, 5)


def test_everything_accepted_is_answered_when_the_server_is_told_to_stop(pack: Pack) -> None:
    # Given a server under load
    bundle = pack("eta", 2, "eta.bundle")
    with serving(bundle, placement="process") as server:
        with calling(server.url, *[predict("eta", *UNBAKED)] * 8) as callers:
            time.sleep(0.3)

            # When it gets SIGTERM
            status = server.stop(signal.SIGTERM)

        # Then it ends well, and no connection broke before it had its answer
        assert status == 0
        for caller in callers:
            failed = [noted for noted in caller.failures if b"Refused" not in noted.body]
            assert failed == []
            assert len(caller.noted) > 3


def test_no_process_outlives_a_killed_supervisor(pack: Pack) -> None:
    bundle = pack("eta", 2, "eta.bundle")
    with serving(bundle, placement="process") as server:
        status = client.status(port=server.port)
        pids = [*status.front_pids, *status.versions[0].runner_pids]
        if status.spare_pid is not None:
            pids.append(status.spare_pid)
        server.stop(signal.SIGKILL)
        limit = time.monotonic() + 10
        while any(alive(pid) for pid in pids) and time.monotonic() < limit:
            time.sleep(0.02)
        assert [pid for pid in pids if alive(pid)] == []


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_signal_ends_the_server_at_once(pack: Pack, tmp_path: Path) -> None:
    # Given a model that takes its time, and somebody who waits for it
    (tmp_path / "sleeper_of_tests.py").write_text(
        "import time\n\n\ndef nap(x):\n    time.sleep(float(x[0, 0]))\n    return x\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        bundle = parbake.pack(
            "sleeper_of_tests:nap",
            name="nap",
            example={"x": np.zeros((2, 1))},
            purpose="tests",
            owner="tests",
            out=tmp_path / "nap.bundle",
        )
    finally:
        sys.path.remove(str(tmp_path))
    with serving(bundle.path) as server:
        caller = Caller(server.url, predict("nap", {"x": 0.0}, {"x": 20.0}), 0.0)
        caller.wait(1)
        time.sleep(0.2)

        # When it is told to stop, and told again
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        status = server.stop(signal.SIGTERM, timeout_s=5)
        caller.stop()

        # Then it has not waited
        assert status != 0


def test_a_reload_by_name_leaves_the_others_as_they_are(pack: Pack, parbake: Parbake, tmp_path: Path) -> None:
    # Given two models, and new bundles under both paths
    one, two = pack("one", 2, "one.bundle"), pack("two", 2, "two.bundle")
    with serving(one, two) as server:
        for name, path in (("one", one), ("two", two)):
            fresh = pack(name, 7, f"{name}.new")
            path.rename(tmp_path / f"{name}.old")
            fresh.rename(path)

        # When one of them is reloaded by its name
        done = parbake("reload", "one", "--port", str(server.port))

        # Then the other has not changed
        assert done.returncode == 0, done.stderr
        assert ask(server, "one") == multiplied(UNBAKED[0], 7)
        assert ask(server, "two") == multiplied(UNBAKED[0], 2)


def test_a_front_that_finds_another_bundle_says_so_and_a_reload_heals_it(
    pack: Pack, parbake: Parbake, tmp_path: Path
) -> None:
    # Given a server whose bundle was replaced on disk
    bundle = pack("eta", 2, "eta.bundle")
    with serving(bundle, workers=1) as server:
        fresh = pack("eta", 7, "eta.new")
        bundle.rename(tmp_path / "eta.old")
        fresh.rename(bundle)

        # When the front is killed
        (front,) = client.status(port=server.port).front_pids
        os.kill(front, signal.SIGKILL)

        # Then callers are told to try again, and are not answered by a model that nobody released
        limit = time.monotonic() + 20
        told: Any = None
        while told is None and time.monotonic() < limit:
            told = refusal(server, "eta")
        assert told is not None
        assert told["code"] == "not_ready"

        # And a reload puts it right
        done = parbake("reload", "--port", str(server.port))
        assert done.returncode == 0, done.stderr
        assert ask(server, "eta") == multiplied(UNBAKED[0], 7)


def test_a_table_that_is_no_longer_fresh_is_not_answered_from(
    pack: Pack, parbake: Parbake, tmp_path: Path
) -> None:
    # Given a contract that lets a prediction hold for some seconds
    pack("eta", 2, "unused")
    bundle = parbake_pack_fresh(tmp_path)
    table = bake(parbake, bundle, "eta.table")
    with serving(bundle, mode="static", table=table) as server:
        assert ask(server, "eta", BAKED[0]) == multiplied(BAKED[0], 2)

        # Then it is answered until they are over, and refused by name afterwards
        limit = time.monotonic() + 30
        told: Any = None
        while told is None and time.monotonic() < limit:
            told = refusal(server, "eta", BAKED[0])
            time.sleep(0.1)
        assert told is not None
        assert told["code"] == "key_not_baked"
        assert "older than the 8 s" in told["error"]


def parbake_pack_fresh(folder: Path) -> Path:
    """The doubling model, with a freshness of 8 seconds."""
    bundle = parbake.pack(
        folder / "unused.onnx",
        name="eta",
        example={"x": np.array([[1, 2], [3, 4.5]], np.float32)},
        purpose="tests",
        owner="tests",
        freshness_s=8,
        out=folder / "fresh.bundle",
    )
    return bundle.path


def ask(server: Server, name: str, row: Any = UNBAKED[0]) -> Any:
    """One answer."""
    noted = once(server.url, f"/predict/{name}", json.dumps(row).encode())
    assert noted.status == 200, noted
    return noted.json()


def refusal(server: Server, name: str, row: Any = UNBAKED[0]) -> Any:
    """The body of a refusal, or None where there was an answer or no connection."""
    noted = once(server.url, f"/predict/{name}", json.dumps(row).encode())
    return noted.json() if noted.status >= 400 else None
