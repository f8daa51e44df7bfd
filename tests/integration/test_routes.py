"""Requests are shared out between two versions: sticky, counted, and changed under load without a failed one."""

from __future__ import annotations

import getpass
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from parbake.app.keys import add_key
from parbake.app.routes import RouteChange
from parbake.app.supervisor import Change
from parbake.cli.exits import Exit
from parbake.contract.model import TensorSpec
from parbake.errors import Conflict, InvalidInput, ModelNotFound
from parbake.runtime.observation import Bins
from parbake.serving.route import Arm, Route, Rule, Shadow, Watch
from parbake.testing import Server, serving
from parbake.transports import client
from tests.conftest import Parbake
from tests.functions import write_function, write_scaled
from tests.traffic import Call, Noted, answer, bake_rows, calling, infer, once, rows, wait_for

ROWS = [(float(n), float(n + 1)) for n in range(1, 60)]


def weights(*shares: float, **more: object) -> Route:
    arms = tuple(Arm(str(i + 1), share) for i, share in enumerate(shares))
    return Route("scaled", "1", arms, **more)  # type: ignore[arg-type]  # each test gives what fits


def use(server: Server, route: Route) -> int:
    status = client.set_route("scaled", RouteChange(route), port=server.port)
    assert status.route is not None
    return status.route.revision


def factor(noted: Noted, row: tuple[float, float]) -> float:
    """What an answer was multiplied by; fails where the version that it names has another number."""
    left, right = answer(noted)
    found = left / row[0]
    assert right == row[1] * found
    assert noted.json()["model_version"] == str(int(found) - 1)
    return found


def two(folder: Path) -> tuple[Path, Path]:
    """Version 1 doubles, version 2 trebles."""
    return tuple(write_scaled(folder / f"{n}.bundle", n).path for n in (2, 3))  # type: ignore[return-value]  # two


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_share_the_keys_out_and_what_was_asked_is_counted(tmp_path: Path, workers: int) -> None:
    with serving(*two(tmp_path), workers=workers) as server, Call(server.url) as call:
        # Without a route the last version answers.
        assert factor(call("/v2/models/scaled/infer", infer(ROWS[0])), ROWS[0]) == 3
        assert use(server, weights(0.7, 0.3)) == 1
        got = [factor(call("/v2/models/scaled/infer", infer(row)), row) for row in ROWS]
        again = [factor(call("/v2/models/scaled/infer", infer(row)), row) for row in ROWS]
        assert got == again
        assert set(got) == {2, 3}
        # By column name, too, with the same versions for the same rows.
        for row, expected in zip(ROWS, got, strict=True):
            noted = call("/predict/scaled", b'{"left": %f, "right": %f}' % row)
            assert noted.json()["y"][0] == row[0] * expected
        # Whoever names a version gets it.
        assert answer(call("/v2/models/scaled/versions/1/infer", infer(ROWS[0]))) == [2, 4]
        assert answer(call("/v2/models/scaled/versions/2/infer", infer(ROWS[0]))) == [3, 6]
        status = client.route("scaled", port=server.port)
        asked = Counter(str(int(factor) - 1) for factor in got)
        assert status.requests == {v: {"weights": 3 * n} for v, n in asked.items()}
        client.set_route("scaled", RouteChange(killed=True), port=server.port)
        assert {factor(call("/v2/models/scaled/infer", infer(row)), row) for row in ROWS} == {2}
        client.set_route("scaled", RouteChange(remove=True), port=server.port)
        assert {factor(call("/v2/models/scaled/infer", infer(row)), row) for row in ROWS} == {3}


def test_weights_are_changed_fifty_times_under_load_and_no_request_fails(tmp_path: Path) -> None:
    ask = rows("scaled", *ROWS)
    with serving(*two(tmp_path), workers=2, placement="process") as server:
        use(server, weights(1, 0))
        with calling(server.url, ask, ask, ask, pause_s=0.001) as callers:
            for n in range(50):
                share = (n % 11) / 10
                use(server, weights(1 - share, share))
            for caller in callers:
                caller.wait(10)
        status = client.route("scaled", port=server.port)
        assert status.route is not None
        assert status.route.revision == 51
        asked: Counter[str] = Counter()
        for caller in callers:
            assert caller.failures == []
            for n, noted in enumerate(caller.noted):
                factor(noted, ROWS[n % len(ROWS)])
                asked[noted.json()["model_version"]] += 1
        assert status.requests == {v: {"weights": n} for v, n in asked.items()}
        assert len(asked) == 2


def test_rules_go_by_header_parameter_and_entity(tmp_path: Path) -> None:
    ruled = weights(
        1,
        rules=(
            Rule("2", headers={"x-group": ("beta",)}),
            Rule("2", parameters={"try": ("new",)}),
            Rule("2", columns={"left": ("7",)}),
        ),
    )
    with serving(*two(tmp_path), workers=1) as server, Call(server.url) as call:
        use(server, ruled)
        url, row = "/v2/models/scaled/infer", (1.0, 2.0)
        assert answer(call(url, infer(row))) == [2, 4]
        assert answer(call(url, infer(row), {"X-Group": "beta"})) == [3, 6]
        assert answer(call(url, infer(row), {"X-Group": "alpha"})) == [2, 4]
        assert answer(call(url, infer(row, parameters={"try": "new"}))) == [3, 6]
        assert answer(call(f"{url}?try=new", infer(row))) == [3, 6]
        # The first row decides for all of a request.
        assert answer(call(url, infer((7, 1, 1, 1)))) == [21, 3, 3, 3]
        assert answer(call(url, infer((1, 1, 7, 1)))) == [2, 2, 14, 2]
        assert call("/predict/scaled", b'{"left": 7, "right": 1}').json()["y"] == [21, 3]


def test_a_route_that_cannot_be_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    with serving(*two(tmp_path), workers=1) as server, Call(server.url) as call:
        use(server, weights(1, 0))
        for route, says in [(weights(0.5, 0.25, 0.25), "no version '3'")]:
            with pytest.raises(InvalidInput, match=says):
                use(server, route)
        with pytest.raises(Conflict, match="at revision 1, not 7"):
            client.set_route("scaled", RouteChange(weights(0, 1), revision=7), port=server.port)
        with pytest.raises(ModelNotFound):
            client.route("nothing", port=server.port)
        assert {factor(call("/v2/models/scaled/infer", infer(row)), row) for row in ROWS} == {2}


def shadowed(**more: object) -> Route:
    return weights(1, shadows=(Shadow("2"),), **more)


def test_a_shadow_is_compared_row_by_row_and_no_caller_sees_it(tmp_path: Path) -> None:
    with serving(*two(tmp_path), workers=1) as server, Call(server.url) as call:
        use(server, shadowed(watch=Watch()))
        for row in ROWS:
            assert factor(call("/v2/models/scaled/infer", infer(row)), row) == 2
        wait_for(lambda: client.route("scaled", port=server.port).shadows["2"].answered == len(ROWS))
        status = client.route("scaled", port=server.port)
        counts = status.shadows["2"]
        assert (counts.asked, counts.failed, counts.dropped) == (len(ROWS), 0, 0)
        assert (counts.rows, counts.same_rows, counts.values) == (len(ROWS), 0, 2 * len(ROWS))
        # It trebles where the other doubles: they are one time the row apart.
        assert counts.difference == sum(map(sum, ROWS))
        assert counts.largest == max(map(max, ROWS))
        assert status.requests == {"1": {"weights": len(ROWS)}}
        assert {(o.version, o.role, o.observation.requests) for o in status.observed} == {
            ("1", "answers", len(ROWS)),
            ("2", "shadow", len(ROWS)),
        }


SLOW = "import time\ndef predict(x):\n    time.sleep({seconds})\n    return x * 2\n"


@pytest.mark.parametrize("harm", ["killed", "stopped", "slow"])
def test_whatever_a_shadow_does_no_caller_notices(tmp_path: Path, harm: str) -> None:
    slow = write_function(tmp_path, SLOW.format(seconds=0.2 if harm == "slow" else 0), name="scaled")
    first = write_scaled(tmp_path / "first.bundle", 2)
    ask = rows("scaled", *ROWS)
    with serving(first.path, slow.path, workers=1) as server:
        use(server, shadowed())
        with calling(server.url, ask, ask) as callers:
            if harm != "slow":
                pids = client.status(port=server.port).versions[1].runner_pids
                os.kill(pids[0], signal.SIGKILL if harm == "killed" else signal.SIGSTOP)
            for caller in callers:
                caller.wait(300)
        for caller in callers:
            assert caller.failures == []
            assert {noted.json()["model_version"] for noted in caller.noted} == {"1"}
            late = sorted(noted.ended - noted.began for noted in caller.noted)[int(0.9 * len(caller.noted))]
            assert late < 0.15
        counts = client.route("scaled", port=server.port).shadows["2"]
        assert counts.dropped + counts.failed > 0


def test_what_is_observed_is_what_callers_got(tmp_path: Path) -> None:
    """Every way in, two fronts, a version that fails for some rows."""
    moody = write_function(
        tmp_path,
        "def predict(x):\n    assert x[0, 0] % 5 != 0, 'five'\n    return x * 3\n",
        name="scaled",
    )
    first = write_scaled(tmp_path / "first.bundle", 2)
    with serving(first.path, moody.path, workers=2, grpc=True) as server, Call(server.url) as call:
        bins = Bins((10.0, 20.0, 30.0))
        watch = Watch(segment="right", bins=bins)
        use(server, weights(0.5, 0.5, rescue=False, watch=watch))
        got: Counter[tuple[str, bool]] = Counter()
        firsts: dict[str, list[float]] = {"1": [], "2": []}

        def note(version: str, status: int, value: float | None) -> None:
            got[version, status == 200] += 1
            if value is not None:
                firsts[version].append(value)

        def over_grpc(row: tuple[float, float]) -> None:
            tensor = grpcclient.InferInput("x", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.array([row], np.float32))
            try:
                result = remote.infer("scaled", [tensor])
            except InferenceServerException:
                # Only version 2 fails.
                note("2", 500, None)
                return
            note(result.get_response().model_version, 200, float(result.as_numpy("y")[0, 0]))

        with grpcclient.InferenceServerClient(server.grpc) as remote:
            for row in ROWS * 2:
                noted = call("/v2/models/scaled/infer", infer(row))
                value = answer(noted)[0] if noted.status == 200 else None
                note(noted.headers["parbake-version"], noted.status, value)
                noted = call("/predict/scaled", b'{"left": %f, "right": %f}' % row)
                value = noted.json()["y"][0] if noted.status == 200 else None
                note(noted.headers["parbake-version"], noted.status, value)
                over_grpc(row)
                # Whoever names a version is not part of the comparison.
                call("/v2/models/scaled/versions/1/infer", infer(row))
        status = client.route("scaled", port=server.port)
        assert len(got) == 3
        seen = {item.version: item.observation for item in status.observed}
        for version in ("1", "2"):
            ok, failed = got[version, True], got[version, False]
            observation = seen[version]
            assert (observation.requests, observation.failures) == (ok + failed, failed)
            # Once a key, and each front its part of them.
            places = Counter(map(bins.place, set(firsts[version])))
            counted = observation.outputs[""]
            assert 0 < sum(counted) == sum(observation.latency) <= sum(places.values())
            assert all(count <= places[place] for place, count in enumerate(counted))
            segments = {name for name in observation.outputs if name}
            assert segments <= {str(int(right)) for _, right in ROWS}
            assert 0 < len(segments) <= 64


def test_the_champion_answers_where_another_version_cannot(tmp_path: Path) -> None:
    broken = write_function(tmp_path, "def predict(x):\n    raise RuntimeError('no')\n", name="scaled")
    first = write_scaled(tmp_path / "first.bundle", 2)
    slow = write_function(tmp_path / "slow", SLOW.format(seconds=0.5), name="scaled")
    with serving(first.path, broken.path, slow.path, workers=1) as server, Call(server.url) as call:
        use(server, weights(0, 1, watch=Watch()))
        for row in ROWS[:10]:
            noted = call("/v2/models/scaled/infer", infer(row))
            assert factor(noted, row) == 2
            assert noted.headers["parbake-version"] == "1"
            assert noted.headers["parbake-fallback"] == "champion"
        status = client.route("scaled", port=server.port)
        assert status.requests == {"2": {"weights": 10, "rescued": 10}}
        (observed,) = status.observed
        # It is the failures of the version that count, whoever helped.
        assert (observed.version, observed.observation.failures) == ("2", 10)
        use(server, weights(0, 0, 1, timeout_ms=100))
        noted = call("/v2/models/scaled/infer", infer(ROWS[0]))
        assert factor(noted, ROWS[0]) == 2
        assert noted.ended - noted.began < 0.4
        use(server, weights(0, 1, rescue=False))
        assert call("/v2/models/scaled/infer", infer(ROWS[0])).status == 500


def test_a_front_that_dies_comes_back_with_the_route(tmp_path: Path) -> None:
    with serving(*two(tmp_path), workers=1) as server:
        use(server, weights(1, 0))
        (pid,) = client.status(port=server.port).front_pids
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: client.status(port=server.port).front_pids not in ((), (pid,)))
        for row in ROWS[:5]:
            assert factor(once(server.url, "/v2/models/scaled/infer", infer(row)), row) == 2


def test_labels_find_the_predictions_that_they_are_about(tmp_path: Path) -> None:
    with serving(*two(tmp_path), workers=2) as server, Call(server.url) as call:
        use(server, weights(0.5, 0.5, watch=Watch(loss="squared", segment="right")))
        versions: dict[int, str] = {}
        for n, row in enumerate(ROWS):
            noted = call("/v2/models/scaled/infer", infer(row, id=f"request-{n}"))
            versions[n] = noted.json()["model_version"]
        # The truth is three times the first number: version 2 is right, version 1 is off by the number itself.
        labels = [{"id": f"request-{n}", "label": 3 * row[0]} for n, row in enumerate(ROWS)]
        labels += [{"id": "nobody", "label": 1.0}]
        body = json.dumps({"labels": labels}).encode()
        # What was predicted gets about twice a second to where labels are held against it.
        time.sleep(1.5)
        noted = call("/v2/models/scaled/labels", body)
        assert (noted.status, noted.json()) == (202, {"accepted": len(ROWS), "unknown": 1})
        seen = {item.version: item.observation for item in client.route("scaled", port=server.port).observed}
        off = [row[0] ** 2 for n, row in enumerate(ROWS) if versions[n] == "1"]
        assert seen["1"].labels[""] == (len(off), sum(off), sum(x * x for x in off))
        assert seen["2"].labels[""] == (len(ROWS) - len(off), 0, 0)
        # Once each.
        assert call("/v2/models/scaled/labels", body).json() == {"accepted": 0, "unknown": len(ROWS) + 1}
        # By key, and where the body names the deployment.
        call("/v2/models/scaled/infer", infer(ROWS[0]))
        time.sleep(1.5)
        by_key = {"key": {"left": ROWS[0][0], "right": ROWS[0][1]}, "label": 1}
        noted = call("/labels", json.dumps({"deployment": "scaled", "labels": [by_key]}).encode())
        assert (noted.status, noted.json()) == (202, {"accepted": 1, "unknown": 0})


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"labels": []}, 400, "length >= 1"),
        ({"labels": [{"label": 1}]}, 400, "an id or a key"),
        ({"labels": [{"id": "a", "label": "high"}]}, 400, "expected a number"),
        ({"labels": [{"key": "zz", "label": 1}]}, 400, "hexadecimal"),
        ({"labels": [{"key": {"left": 1}, "label": 1}]}, 400, "left, right"),
        ({"labels": [{"id": "a", "label": 1}] * 10_001}, 413, "the limit is 10000"),
        ({"labels": [{"id": "a", "label": None}]}, 400, "$.labels[0].label"),
        ({"deployment": "other", "labels": [{"id": "a", "label": 1}]}, 400, "the body 'other'"),
    ],
)
def test_labels_that_cannot_be_are_refused(
    server_with_labels: Server, body: object, status: int, says: str
) -> None:
    noted = once(server_with_labels.url, "/v2/models/scaled/labels", json.dumps(body).encode())
    assert noted.status == status
    assert says in noted.body.decode()


@pytest.fixture(scope="module")
def server_with_labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("labels")
    runtime = folder / "runtime"
    runtime.mkdir(mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        with serving(*two(folder), workers=1) as server:
            use(server, weights(1, watch=Watch(loss="absolute")))
            yield server


@pytest.mark.parametrize("mode", ["static", "hybrid"])
def test_each_version_answers_from_its_own_table(tmp_path: Path, mode: str) -> None:
    """A key that moves to the other version gets that one's prediction, baked or not."""
    asked = ROWS[:20]
    written = []
    for number in (2, 3):
        bundle = write_scaled(tmp_path / f"{number}.bundle", number)
        # Hybrid mode asks the model for what is not there.
        table = bake_rows(bundle, asked if mode == "static" else asked[:10], tmp_path / f"{number}.table")
        written.append(f'[[deployments]]\nbundle = "{bundle.path}"\nmode = "{mode}"\ntable = "{table}"\n')
    config = tmp_path / "parbake.toml"
    config.write_text("\n".join(written))
    with serving(config=config, workers=1) as server, Call(server.url) as call:
        for share in (0.0, 0.5, 1.0, 0.5, 0.0):
            use(server, weights(1 - share, share))
            got = {factor(call("/v2/models/scaled/infer", infer(row)), row) for row in asked}
            assert got == {0.0: {2}, 0.5: {2, 3}, 1.0: {3}}[share]
        use(server, shadowed())
        for row in asked:
            assert factor(call("/v2/models/scaled/infer", infer(row)), row) == 2
        wait_for(lambda: client.route("scaled", port=server.port).shadows["2"].rows == len(asked))


def test_a_reload_keeps_the_route_and_one_that_does_not_fit_it_is_refused(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    ask = rows("scaled", *ROWS)
    with serving(first, second, workers=1) as server:
        use(server, weights(0.5, 0.5))
        with calling(server.url, ask) as callers:
            # What is read again is the version that callers get by default without a route.
            write_scaled(tmp_path / "4.bundle", 4)
            client.reload([Change(bundle=str(tmp_path / "4.bundle"))], port=server.port)
            callers[0].wait(2 * len(ROWS))
            strange = write_function(
                tmp_path,
                "def predict(x):\n    return x\n",
                name="scaled",
                outputs=(TensorSpec("z", "FP32", (2,)),),
            )
            with pytest.raises(
                Conflict, match=r"the route of 'scaled' does not fit.*the outputs of version 2"
            ):
                client.reload([Change(bundle=str(strange.path))], port=server.port)
            callers[0].wait(10)
        assert callers[0].failures == []
        seen = {
            (n.json()["model_version"], answer(n)[0] / ROWS[i % len(ROWS)][0])
            for i, n in enumerate(callers[0].noted)
        }
        assert seen == {("1", 2), ("2", 3), ("2", 4)}
        page = once(server.url, "/metrics").body.decode()
        assert 'parbake_route_weight{deployment="scaled",version="2"} 0.5' in page
        assert 'parbake_route_revision{deployment="scaled"} 1.0' in page
        total = sum(
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith("parbake_routed_requests_total{")
        )
        assert total == len(callers[0].noted)
        assert once(server.url, "/v2/repository/models/scaled/unload", b"{}").status == 200
        assert once(server.url, "/v2/models/scaled/infer", infer(ROWS[0])).status == 503
        assert once(server.url, "/v2/repository/models/scaled/load", b"{}").status == 200
        got = {
            once(server.url, "/v2/models/scaled/infer", infer(row)).json()["model_version"] for row in ROWS
        }
        assert got == {"1", "2"}


def test_what_was_observed_outlives_the_front_that_saw_it(tmp_path: Path) -> None:
    with serving(*two(tmp_path), workers=1) as server:
        use(server, weights(1, 0, watch=Watch()))
        for row in ROWS[:7]:
            once(server.url, "/v2/models/scaled/infer", infer(row))
        assert client.route("scaled", port=server.port).observed[0].observation.requests == 7
        (pid,) = client.status(port=server.port).front_pids
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: client.status(port=server.port).front_pids not in ((), (pid,)))
        for row in ROWS[:5]:
            assert once(server.url, "/v2/models/scaled/infer", infer(row)).status == 200
        (observed,) = client.route("scaled", port=server.port).observed
        assert observed.observation.requests == 12
        assert observed.observation.fault() is None


def test_labels_need_the_key_that_predictions_need(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    good, other = add_key(file, "good", ["scaled"]), add_key(file, "other", ["something"])
    body = {"labels": [{"id": "a", "label": 1}]}
    with serving(*two(tmp_path), workers=1, api_keys=file) as server:
        use(server, weights(1, watch=Watch(loss="absolute")))
        for path, more in (("/v2/models/scaled/labels", {}), ("/labels", {"deployment": "scaled"})):
            data = json.dumps({**body, **more}).encode()
            assert once(server.url, path, data).status == 401
            assert once(server.url, path, data, authorization=f"Bearer {other}").status == 403
            assert once(server.url, path, data, authorization=f"Bearer {good}").status == 202


def test_a_shadow_that_hangs_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    slow = write_function(tmp_path, SLOW.format(seconds=0), name="scaled")
    first = write_scaled(tmp_path / "first.bundle", 2)
    with serving(first.path, slow.path, workers=1, deadline_ms=2000) as server:
        use(server, shadowed())
        os.kill(client.status(port=server.port).versions[1].runner_pids[0], signal.SIGSTOP)
        for row in ROWS:
            assert once(server.url, "/v2/models/scaled/infer", infer(row)).status == 200
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 8


def test_a_bandit_moves_to_the_version_that_earns(tmp_path: Path) -> None:
    with serving(*two(tmp_path), workers=2) as server, Call(server.url) as call:
        use(server, weights(0.5, 0.5, kind="bandit", watch=Watch(loss="reward")))
        labels = []
        for n in range(120):
            noted = call("/v2/models/scaled/infer", infer(ROWS[n % len(ROWS)], id=f"r{n}"))
            labels.append({"id": f"r{n}", "label": 1 if noted.json()["model_version"] == "2" else 0})
        body = json.dumps({"labels": labels}).encode()

        found = 0
        while found < len(labels):
            # Predictions are told on about twice a second.
            found += call("/v2/models/scaled/labels", body).json()["accepted"]
            time.sleep(0.2)
        wait_for(lambda: route_of(server).arms[1].weight > 0.95)
        assert route_of(server).kind == "bandit"
        got = [factor(call("/v2/models/scaled/infer", infer(row)), row) for row in ROWS]
        assert got.count(3) > 0.8 * len(ROWS)


def route_of(server: Server) -> Route:
    found = client.route("scaled", port=server.port).route
    assert found is not None
    return found


def test_the_command_shows_and_changes_a_route(tmp_path: Path, parbake: Parbake) -> None:
    with serving(*two(tmp_path), workers=1) as server:
        at = ("--port", str(server.port))
        assert "has no route" in parbake("route", "scaled", *at).stderr
        done = parbake(
            "route", "scaled", "--set", "1=0.75,2=0.25", "--sticky", "header:x-user", "--json", *at
        )
        assert json.loads(done.stdout)["route"]["arms"][1] == {"version": "2", "weight": 0.25}
        more = ("--timeout-ms", "50", "--no-rescue", "--kind", "ab", "--segment", "left", "--watch", "y")
        parbake("route", "scaled", *more, *at)
        route = route_of(server)
        assert (route.sticky, route.timeout_ms, route.rescue, route.kind) == (
            "header:x-user",
            50,
            False,
            "ab",
        )
        assert route.watch is not None
        assert (route.watch.output, route.watch.segment) == ("y", "left")
        assert route.watch.bins is not None
        parbake("route", "scaled", "--timeout-ms", "0", "--rescue", "--no-watch", "--sticky", "key", *at)
        route = route_of(server)
        assert (route.sticky, route.timeout_ms, route.rescue, route.watch) == ("", None, True, None)
        for words, status, says in (
            (("--set", "1=50%,2=40%"), Exit.USAGE, "weights must add up to 1, got 0.9"),
            (("--set", "1=50%,7=50%"), Exit.USAGE, "has no version '7'"),
            (("--kill", "--remove"), Exit.USAGE, "go with no other change"),
            (("--rule", "2: colour=red"), Exit.USAGE, "no condition 'colour=red'"),
            (("--watch", "z"), Exit.USAGE, "no output 'z'"),
            (("--segment", "age"), Exit.USAGE, "no column 'age'"),
            (("--kind", "bandit"), Exit.USAGE, "a bandit needs labels"),
        ):
            done = parbake("route", "scaled", *words, *at)
            assert says in done.stderr
            assert done.returncode == status
        assert parbake("route", "nothing", *at).returncode == Exit.NOT_FOUND
        assert route_of(server) == route
        parbake("route", "scaled", "--kill", "--who", "ada", "--why", "customers call", *at)
        parbake("route", "scaled", "--remove", *at)
        assert "has no route" in parbake("route", "scaled", *at).stderr
        # What was refused is not among it.
        told = parbake("history", "scaled", "--json", "--state-dir", "state")
        events = json.loads(told.stdout)
        assert [(event["what"], event["details"]["revision"]) for event in events] == [
            ("route", n) for n in range(1, 6)
        ]
        assert (events[3]["by"], events[3]["why"]) == ("ada", "customers call")
        assert events[0]["by"] == getpass.getuser()
        shown = parbake("history", "scaled", "--state-dir", "state").stdout
        for said in (
            "revision 1: 1=75%, 2=25%",
            "revision 4: killed, 1 answers everything",
            "route removed",
        ):
            assert said in shown
