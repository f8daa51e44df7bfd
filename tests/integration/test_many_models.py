"""Many models on one machine: loaded when they are wanted, put away for others, each group in a process of its own."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parbake.app.supervisor import Change, Status, VersionStatus
from parbake.errors import ServerNotFound
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import large_bundle, write_function, write_scaled
from tests.traffic import Ask, Call, answer, bake_rows, calling, infer, is_there, once, rows, wait_for

MB = 1024 * 1024

Deployments = list[dict[str, object]]


def status(server: Server) -> Status:
    return client.status(port=server.port)


def version(server: Server, name: str) -> VersionStatus:
    return next(version for version in status(server).versions if version.name == name)


def states(server: Server) -> dict[str, str]:
    return {version.name: version.state for version in status(server).versions}


def scaled(folder: Path, count: int) -> list[Path]:
    """Models m1, m2, ... that multiply by 1, 2, ..."""
    return [write_scaled(folder / f"m{i}.bundle", i, name=f"m{i}").path for i in range(1, count + 1)]


def config(folder: Path, deployments: Sequence[dict[str, object]], **server: object) -> tuple[str, ...]:
    """Arguments for a server of these deployments, all loaded on demand."""

    def toml(values: dict[str, object]) -> str:
        return "".join(
            f"{key} = {str(value).lower() if isinstance(value, bool | int) else repr(str(value))}\n"
            for key, value in values.items()
        )

    text = "[server]\n" + toml(server)
    for deployment in deployments:
        text += "\n[[deployments]]\n" + toml({"load": "on-demand", **deployment})
    path = folder / "parbake.toml"
    path.write_text(text)
    return ("--config", str(path))


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(pid)


def one_model_bytes(folder: Path) -> int:
    """Memory of one of `scaled`, as the server measures it."""
    with serving(*scaled(folder, 3), load="on-demand", workers=1) as server:
        for i in (1, 2, 3):
            assert once(server.url, f"/v2/models/m{i}/infer", infer((1, 2))).status == 200
        # The first one comes with what the libraries need once.
        return min(version.memory_bytes for version in status(server).versions)


def anything_of(count: int, seed: int) -> Ask:
    """One of so many models, at random."""
    rng = random.Random(seed)
    return lambda number: (f"/v2/models/m{rng.randint(1, count)}/infer", infer((1, 2)))


def test_models_sleep_until_they_are_asked_for(tmp_path: Path) -> None:
    with serving(*scaled(tmp_path, 4), load="on-demand", workers=2) as server, Call(server.url) as call:
        assert call("/v2/health/ready").status == 200
        assert set(states(server).values()) == {"asleep"}
        for i in (1, 3):
            assert call(f"/v2/models/m{i}/ready").status == 200
            assert answer(call(f"/v2/models/m{i}/infer", infer((1, 2)))) == [i, 2 * i]
        assert states(server) == {"m1": "loaded", "m2": "asleep", "m3": "loaded", "m4": "asleep"}
        wait_for(lambda: version(server, "m1").last_used)
        assert version(server, "m1").memory_bytes > 0
        assert version(server, "m1").runner_pids == version(server, "m3").runner_pids
        assert version(server, "m2").runner_pids == ()
        page = call("/metrics").body.decode()
        assert "parbake_models_loaded 2.0" in page
        assert "parbake_model_loads_total 2.0" in page
        assert 'parbake_request_duration_seconds_bucket{deployment="m1"' in page
        assert 'parbake_request_duration_seconds_bucket{deployment="m2"' not in page


def test_models_are_put_away_and_loaded_under_load_without_a_failed_request(tmp_path: Path) -> None:
    size = one_model_bytes(tmp_path / "size")
    bundles = scaled(tmp_path, 12)
    with (
        serving(*bundles, load="on-demand", workers=2, memory_bytes=6 * size) as server,
        calling(server.url, *[anything_of(12, seed) for seed in range(4)]) as callers,
    ):
        for caller in callers:
            caller.wait(150)
        now = status(server)
    assert sum(version.evictions for version in now.versions) > 20
    assert sum(version.memory_bytes for version in now.versions) <= 6 * size
    for caller in callers:
        assert not caller.failures
        for noted in caller.noted:
            left, right = answer(noted)
            assert right == 2 * left


def test_rooms_that_are_killed_while_models_come_and_go_lose_nobodys_request(tmp_path: Path) -> None:
    size = one_model_bytes(tmp_path / "size")
    bundles = scaled(tmp_path, 12)
    with (
        serving(*bundles, load="on-demand", workers=2, memory_bytes=8 * size) as server,
        calling(server.url, *[anything_of(12, seed) for seed in range(4)]) as callers,
    ):
        for killed in (1, 2, 3):
            for pid in status(server).room_pids:
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda n=killed: version(server, "m1").runner_restarts >= n)  # type: ignore[misc]
            for caller in callers:
                caller.wait(30)
        assert server.log().count("room.ended") >= 3
    for caller in callers:
        assert not caller.failures
        for noted in caller.noted:
            left, right = answer(noted)
            assert right == 2 * left


def test_pinned_models_are_there_from_the_start_and_stay(tmp_path: Path) -> None:
    size = one_model_bytes(tmp_path / "size")
    bundles = scaled(tmp_path, 8)
    deployments: Deployments = [{"bundle": path, "pinned": path.stem == "m1"} for path in bundles]
    arguments = config(tmp_path, deployments, memory_bytes=3 * size, workers=1)
    with serving(arguments=arguments) as server, Call(server.url) as call:
        assert states(server)["m1"] == "pinned"
        for number in range(40):
            i = 2 + number % 7
            assert answer(call(f"/v2/models/m{i}/infer", infer((1, 2)))) == [i, 2 * i]
        found = version(server, "m1")
        assert (found.state, found.loads, found.evictions) == ("pinned", 1, 0)
        (pid,) = found.runner_pids
        os.kill(pid, signal.SIGKILL)
        # Nobody asks for it, and it is there again.
        wait_for(lambda: states(server)["m1"] == "pinned")
        wait_for(lambda: call("/v2/models/m1/infer", infer((1, 2))).status == 200)


def test_a_killed_room_comes_back_and_other_groups_do_not_notice(tmp_path: Path) -> None:
    bundles = scaled(tmp_path, 4)
    groups = ("ours", "ours", "theirs", "theirs")
    deployments: Deployments = [
        {"bundle": path, "group": group} for path, group in zip(bundles, groups, strict=True)
    ]
    asks = [rows(f"m{i}", (1.0, 2.0), (3.0, 4.0)) for i in (1, 2, 3, 4)]
    arguments = config(tmp_path, deployments, workers=1)
    with serving(arguments=arguments) as server, calling(server.url, *asks) as callers:
        ours, theirs = version(server, "m1").runner_pids, version(server, "m3").runner_pids
        assert ours == version(server, "m2").runner_pids != theirs == version(server, "m4").runner_pids
        for killed in (1, 2):
            os.kill(version(server, "m1").runner_pids[0], signal.SIGKILL)
            wait_for(lambda n=killed: version(server, "m1").runner_restarts == n)  # type: ignore[misc]
            for caller in callers:
                caller.wait(20)
        assert version(server, "m3").runner_pids == theirs
        assert version(server, "m3").runner_restarts == 0
    for i, caller in enumerate(callers, 1):
        # Those in the room that ended waited until it was there again.
        assert not caller.failures
        assert {answer(noted)[0] for noted in caller.noted} == {i, 3.0 * i}


def test_different_owners_never_share_a_process(tmp_path: Path) -> None:
    first = write_scaled(tmp_path / "first.bundle", 2, name="first", owner="first@parbake.example")
    second = write_scaled(tmp_path / "second.bundle", 3, name="second", owner="second@parbake.example")
    third = write_scaled(tmp_path / "third.bundle", 4, name="third", owner="second@parbake.example")
    with serving(first.path, second.path, third.path, load="on-demand", workers=1) as server:
        for name, factor in (("first", 2), ("second", 3), ("third", 4)):
            assert answer(once(server.url, f"/v2/models/{name}/infer", infer((1, 2))))[0] == factor
        assert version(server, "second").runner_pids == version(server, "third").runner_pids
        assert version(server, "first").runner_pids != version(server, "second").runner_pids


def test_memory_is_given_back_when_a_model_is_put_away(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for name in names:
        large_bundle(tmp_path / name, 64)
    deployments: Deployments = [{"bundle": tmp_path / name / "large.bundle", "name": name} for name in names]
    arguments = config(tmp_path, deployments, memory_bytes=100 * MB, workers=1)
    with serving(arguments=arguments) as server, Call(server.url, 60) as call:
        most = 0.0
        for number in range(9):
            assert call(f"/v2/models/{names[number % 3]}/infer", infer((1, 2))).status == 200
            (pid,) = status(server).room_pids
            most = max(most, resident_mb(pid))
        assert call("/v2/repository/models/c/unload", b"{}").status == 200
        assert call("/v2/repository/models/b/unload", b"{}").status == 200
        assert call("/v2/repository/models/a/unload", b"{}").status == 200
        wait_for(lambda: resident_mb(pid) < most - 60)


def test_memory_does_not_grow_with_the_number_of_fronts(tmp_path: Path) -> None:
    bundle = large_bundle(tmp_path, 64)
    with serving(bundle.path, load="on-demand", workers=3) as server, Call(server.url, 60) as call:
        before = [resident_mb(pid) for pid in status(server).front_pids]
        for _ in range(12):
            # Each on a connection of its own: all fronts take part.
            assert once(server.url, "/v2/models/large/infer", infer((1, 2))).status == 200
        assert call("/v2/models/large/infer", infer((1, 2))).status == 200
        now = status(server)
        assert len(now.room_pids) == 1
        assert resident_mb(now.room_pids[0]) > 64
        for pid, was in zip(now.front_pids, before, strict=True):
            assert resident_mb(pid) < was + 16


def test_a_slow_model_does_not_stop_its_neighbours(tmp_path: Path) -> None:
    slow = write_function(
        tmp_path, "import time\ndef predict(x):\n    time.sleep(2)\n    return x\n", name="slow"
    )
    quick = write_scaled(tmp_path / "quick.bundle", 2, name="quick")
    with serving(slow.path, quick.path, load="on-demand", workers=1) as server, ThreadPoolExecutor(1) as side:
        assert once(server.url, "/v2/models/quick/infer", infer((1, 2))).status == 200
        waiting = side.submit(once, server.url, "/v2/models/slow/infer", infer((1, 2)))
        wait_for(lambda: states(server)["slow"] == "loaded")
        began = time.monotonic()
        for _ in range(20):
            assert answer(once(server.url, "/v2/models/quick/infer", infer((1, 2)))) == [2, 4]
        assert time.monotonic() - began < 1.5
        assert answer(waiting.result()) == [1, 2]


def test_a_row_that_ends_a_room_takes_no_neighbour_into_quarantine(tmp_path: Path) -> None:
    poisoned = write_function(
        tmp_path,
        "import os, time\ndef predict(x):\n    time.sleep(0.02)\n    if (x == 666).any():\n"
        "        os._exit(3)\n    return x * 2\n",
        name="poisoned",
    )
    sleepy = write_function(
        tmp_path, "import time\ndef predict(x):\n    time.sleep(0.05)\n    return x * 2\n", name="sleepy"
    )
    neighbours = [rows("sleepy", (float(i), 1.0)) for i in range(3)] + [rows("m1", (1.0, 2.0))]
    with (
        serving(poisoned.path, sleepy.path, *scaled(tmp_path, 1), load="on-demand", workers=1) as server,
        calling(server.url, *neighbours) as callers,
    ):
        for _ in range(3):
            refused = once(server.url, "/v2/models/poisoned/infer", infer((666, 1)))
            assert (refused.status, refused.json()["code"]) == (422, "row_quarantined")
            assert answer(once(server.url, "/v2/models/poisoned/infer", infer((1, 2)))) == [2, 4]
        for caller in callers:
            caller.wait(3)
        assert version(server, "poisoned").runner_restarts == 2
    for caller in callers:
        assert not caller.failures


def test_a_model_that_hangs_takes_its_room_with_it_for_a_moment_only(tmp_path: Path) -> None:
    hangs = write_function(
        tmp_path,
        "import time\ndef predict(x):\n    if (x == 666).any():\n        time.sleep(600)\n    return x * 2\n",
        name="hangs",
    )
    bundles = [hangs.path, *scaled(tmp_path, 1)]
    with (
        serving(*bundles, load="on-demand", workers=1, deadline_ms=1500) as server,
        calling(server.url, rows("m1", (1.0, 2.0))) as (neighbour,),
    ):
        assert once(server.url, "/v2/models/hangs/infer", infer((666, 2))).status == 504
        wait_for(lambda: version(server, "m1").runner_restarts == 1)
        neighbour.wait(10)
        wait_for(lambda: once(server.url, "/v2/models/hangs/infer", infer((1, 2))).status == 200)
    assert all(noted.status in (200, 504) for noted in neighbour.noted)
    assert len(neighbour.failures) <= 1


def test_a_model_that_cannot_be_loaded_says_why_and_harms_nobody(tmp_path: Path) -> None:
    broken = write_function(tmp_path, "import nothing_of_that_name\n", name="broken")
    with (
        serving(broken.path, *scaled(tmp_path, 1), load="on-demand", workers=1) as server,
        Call(server.url) as call,
    ):
        for _ in range(3):
            refused = call("/v2/models/broken/infer", infer((1, 2)))
            assert (refused.status, refused.json()["code"]) == (503, "not_ready")
            assert "nothing_of_that_name" in refused.json()["error"]
        assert call("/v2/models/broken/ready").status == 503
        assert answer(call("/v2/models/m1/infer", infer((1, 2)))) == [1, 2]
        assert call("/v2/health/ready").status == 200
        mended = write_function(tmp_path, "def predict(x):\n    return x * 3\n", name="broken", replace=True)
        client.reload([Change(name="broken", bundle=str(mended.path))], port=server.port)
        assert answer(call("/v2/models/broken/infer", infer((1, 2)))) == [3, 6]


def test_a_model_larger_than_the_budget_is_refused_by_name(tmp_path: Path) -> None:
    large = large_bundle(tmp_path, 8)
    with (
        serving(large.path, *scaled(tmp_path, 1), load="on-demand", workers=1, memory_bytes=4 * MB) as server,
        Call(server.url) as call,
    ):
        refused = call("/v2/models/large/infer", infer((1, 2)))
        assert (refused.status, refused.json()["code"]) == (503, "not_ready")
        assert "the budget is 4194304" in refused.json()["error"]
        assert answer(call("/v2/models/m1/infer", infer((1, 2)))) == [1, 2]


def test_a_model_that_sleeps_still_answers_from_its_table(tmp_path: Path) -> None:
    bundle = write_scaled(tmp_path / "scaled.bundle", 2)
    table = bake_rows(bundle, [(1.0, 2.0)], tmp_path / "scaled.table")
    with serving(bundle.path, table=table, load="on-demand", workers=1, head_rows=0) as server:
        assert answer(once(server.url, "/v2/models/scaled/infer", infer((1, 2)))) == [2, 4]
        assert states(server) == {"scaled": "asleep"}
        assert answer(once(server.url, "/v2/models/scaled/infer", infer((3, 4)))) == [6, 8]
        assert states(server) == {"scaled": "loaded"}


def test_a_new_version_takes_the_place_of_a_loaded_one_without_a_failed_request(tmp_path: Path) -> None:
    path = tmp_path / "scaled.bundle"
    write_scaled(path, 2)
    with (
        serving(path, *scaled(tmp_path, 2), load="on-demand", workers=2) as server,
        calling(server.url, rows("scaled", (1.0, 2.0)), rows("scaled", (1.0, 2.0))) as callers,
    ):
        for factor in (3, 4, 5):
            write_scaled(path, factor, replace=True)
            client.reload([Change(name="scaled", bundle=str(path))], port=server.port)
            for caller in callers:
                caller.wait(10)
        assert states(server) == {"scaled": "loaded", "m1": "asleep", "m2": "asleep"}
    for caller in callers:
        assert not caller.failures
        factors = [answer(noted)[0] for noted in caller.noted]
        assert factors == sorted(factors)
        assert set(factors) == {2, 3, 4, 5}


def test_a_front_that_was_killed_finds_the_models_that_are_loaded(tmp_path: Path) -> None:
    with serving(*scaled(tmp_path, 2), load="on-demand", workers=1) as server:
        assert answer(once(server.url, "/v2/models/m2/infer", infer((1, 2)))) == [2, 4]
        os.kill(status(server).front_pids[0], signal.SIGKILL)
        wait_for(lambda: status(server).front_restarts == 1)
        assert answer(once(server.url, "/v2/models/m2/infer", infer((1, 2)))) == [2, 4]
        assert version(server, "m2").loads == 1


def test_no_room_outlives_the_supervisor(tmp_path: Path) -> None:
    with serving(*scaled(tmp_path, 1), load="on-demand", workers=1) as server:
        assert once(server.url, "/v2/models/m1/infer", infer((1, 2))).status == 200
        pids = status(server).room_pids
        assert pids
        server.process.kill()
        server.process.wait()
        for pid in pids:
            wait_for(lambda pid=pid: not is_there(pid))  # type: ignore[misc]


@pytest.mark.parametrize("option", ["pinned", "group"])
def test_what_only_concerns_models_on_demand_is_refused_for_others(tmp_path: Path, option: str) -> None:
    values: dict[str, object] = {"load": "always", option: True if option == "pinned" else "ours"}
    arguments = config(tmp_path, [{"bundle": scaled(tmp_path, 1)[0], **values}], workers=1)
    words = "which says nothing of a model that is always loaded"
    with pytest.raises(ServerNotFound, match=words), serving(arguments=arguments):
        pass
