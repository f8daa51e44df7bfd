"""Requests are shared out between two versions: sticky, counted, and changed under load without a failed one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from parbake.app.routes import RouteChange
from parbake.errors import Conflict, InvalidInput, ModelNotFound
from parbake.serving.route import Arm, Route, Rule
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_scaled
from tests.traffic import Call, Noted, answer, calling, infer, rows

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
        assert status.route is not None and status.route.revision == 51
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
