"""Releases with a store that several servers share, or that is away: nobody is left behind, nothing is forgotten."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from parbake.app.releases import Back, ReleaseStatus, TuningChange, Wanted
from parbake.app.routes import RouteChange
from parbake.errors import ParbakeError, StateAway
from parbake.release.database import open_database
from parbake.release.judge import Margins
from parbake.serving.route import Arm, Route, Watch
from parbake.testing import Server, serving
from parbake.transports import client
from tests.functions import write_scaled
from tests.postgres import Postgres
from tests.traffic import Call, answer, calling, infer, rows, wait_for

PATH = "/v2/models/scaled/infer"
SERVED = [(n / 256, 1.0) for n in range(1, 600)]
NEVER = Margins(requests=10**9, p50=5, p99=20, outputs=0.99)
"""A step that nobody leaves but by hand."""
STRICT = Margins(requests=10**9, p50=5, p99=20)
"""One that is also left where predictions differ."""


def deploy(server: Server, bundle: Path, version: str, **rest: Any) -> ReleaseStatus:
    rest = {"kind": "canary", "steps": (0.5, 0.7, 1.0), "margins": NEVER, **rest}
    return client.release("scaled", Wanted(version, str(bundle), **rest), port=server.port)


def status(server: Server) -> ReleaseStatus:
    return client.release_status("scaled", port=server.port)


def state(server: Server) -> str:
    """How its last release stands; "" where it knows of none."""
    try:
        return status(server).state
    except ParbakeError:
        return ""


def factors(server: Server) -> set[float]:
    with Call(server.url) as call:
        return {answer(call(PATH, infer(row)))[0] / row[0] for row in SERVED[:40]}


def history(url: str) -> list[str]:
    with closing(open_database(url)) as store:
        events = store.history("scaled")
    return [event.what for event in events if not event.what.startswith("lease.")]


def test_servers_with_one_store_follow_each_other_and_one_of_them_judges(tmp_path: Path) -> None:
    two, three, nine = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3, 9))
    url = f"sqlite:///{tmp_path / 'state.db'}"
    options: dict[str, Any] = {"workers": 1, "store": url, "lease_s": 3}
    with (
        serving(two, state_dir=tmp_path / "a", **options) as one,
        serving(two, state_dir=tmp_path / "b", **options) as other,
    ):
        both = (one, other)
        callers = (rows("scaled", *SERVED[n::3]) for n in range(3))
        with calling(one.url, *callers) as first, calling(other.url, rows("scaled", *SERVED)) as second:
            # Begun by one, followed by the other: a step, live, and back from there.
            deploy(one, three, "2")
            wait_for(lambda: factors(other) == {2, 3})
            assert state(other) == "running"
            wait_for(lambda: any(status(server).judged_here for server in both))
            client.tune("scaled", TuningChange({"hold": True}, by="ada"), port=one.port)
            wait_for(lambda: status(other).tuning.hold)
            client.promote("scaled", Back(by="ada"), port=other.port)
            wait_for(lambda: status(one).step == 1)
            client.promote("scaled", Back(by="ada"), port=one.port)
            assert factors(one) == {3}
            wait_for(lambda: factors(other) == {3})
            client.rollback("scaled", Back(by="bob"), port=other.port)
            wait_for(lambda: factors(one) == {2})
            # What is worse is seen by the one that judges, and leaves both.
            deploy(other, nine, "3", margins=STRICT)
            wait_for(lambda: {state(server) for server in both} == {"rolled_back"})
            wait_for(lambda: [factors(server) for server in both] == [{2}, {2}])
            for caller in (*first, *second):
                caller.wait(20)
        assert all(noted.status == 200 for caller in (*first, *second) for noted in caller.noted)
        # The one that judges is killed; the other goes on.
        deploy(one, three, "4")
        wait_for(lambda: factors(other) == {2, 3})
        wait_for(lambda: sum(status(server).judged_here for server in both) == 1)
        judge, heir = both if status(one).judged_here else both[::-1]
        judge.process.send_signal(signal.SIGKILL)
        judge.process.wait(60)
        wait_for(lambda: status(heir).judged_here)
        assert factors(heir) == {2, 3}
        client.promote("scaled", Back(by="ada"), port=heir.port)
        client.promote("scaled", Back(by="ada"), port=heir.port)
        assert factors(heir) == {3}
    done = [what for what in history(url) if what.startswith("release.")]
    assert done == [
        "release.begun", "release.live", "release.begun", "release.advanced", "release.advanced",
        "release.superseded", "release.live", "release.rolled_back", "release.live",
        "release.begun", "release.advanced", "release.rolled_back",
        "release.begun", "release.advanced", "release.advanced", "release.superseded", "release.live",
    ]  # fmt: skip


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


def test_a_store_that_dies_in_the_middle_stops_nobody_who_goes_back(
    tmp_path: Path, postgres: Postgres
) -> None:
    two, three, nine = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3, 9))
    url = postgres.database()
    with (
        serving(two, workers=1, state_dir=tmp_path / "state", store=url) as server,
        calling(server.url, rows("scaled", SERVED[0])) as (caller,),
    ):
        port = server.port
        # A canary that turns out to be bad while the store is away.
        deploy(server, nine, "2", margins=STRICT)
        postgres.kill()
        wait_for(lambda: "since" in status(server).note)
        with pytest.raises(StateAway):
            client.promote("scaled", Back(), port=port)
        with calling(server.url, *(rows("scaled", *SERVED[n::3]) for n in range(3))) as callers:
            wait_for(lambda: state(server) == "rolled_back")
            assert factors(server) == {2}
        assert "will be written down" in status(server).note
        with pytest.raises(StateAway):
            deploy(server, three, "3")
        postgres.start()
        wait_for(lambda: history(url)[-2:] == ["verdict.roll_back", "release.rolled_back"])
        wait_for(lambda: not status(server).note)
        # One that somebody takes back meanwhile.
        deploy(server, three, "3")
        postgres.kill()
        wait_for(lambda: factors(server) == {2, 3})
        killed = client.set_route("scaled", RouteChange(killed=True, by="ada"), port=port)
        assert "will be written down" in killed.note
        assert factors(server) == {2}
        back = client.rollback("scaled", Back(by="ada", why="customers call"), port=port)
        assert (back.state, back.champion) == ("rolled_back", "1")
        assert factors(server) == {2}
        postgres.start()
        wait_for(lambda: history(url)[-2:] == ["parameters", "release.rolled_back"])
        # And one that is live already: the version before is still loaded, and the one before that is not.
        deploy(server, three, "4", kind="plain", steps=(1.0,))
        assert factors(server) == {3}
        postgres.kill()
        with pytest.raises(StateAway) as refused:
            client.rollback("scaled", Back(to="7"), port=port)
        assert "version 1 is still loaded" in refused.value.hint
        back = client.rollback("scaled", Back(by="ada"), port=port)
        assert (back.champion, back.version) == ("1", "4")
        assert "will be written down" in back.note
        assert factors(server) == {2}
        with pytest.raises(StateAway):
            client.rollback("scaled", Back(by="ada"), port=port)
        # A route by hand is in force all the same, too.
        half = Route("scaled", "1", (Arm("1", 0.5), Arm("4", 0.5)))
        routed = client.set_route("scaled", RouteChange(half, by="bob", why="a test"), port=port)
        assert "will be written down" in routed.note
        assert factors(server) == {2, 3}
        postgres.start()
        wait_for(lambda: history(url)[-3:] == ["release.rolled_back", "release.live", "route"])
        with closing(open_database(url)) as store:
            last = store.history("scaled")[-1]
        assert last.by == "bob"
        assert last.why.startswith("a test (at ")
        caller.wait(5)
        # Said once each time, and not each second.
        assert server.log().count("releases.store_away") == 3
        assert server.log().count("release.not_followed") == 0
    assert all(noted.status == 200 for one in (caller, *callers) for noted in one.noted)


def by_key(server: Server) -> list[float]:
    """What each of some keys is multiplied by."""
    with Call(server.url) as call:
        return [answer(call(PATH, infer(row)))[0] / row[0] for row in SERVED[:200]]


def weight(server: Server) -> float:
    """The share of the version that is tried."""
    route = client.route("scaled", port=server.port).route
    return 0.0 if route is None else route.arms[1].weight


def earn(server: Server) -> None:
    """Tell a server that the first version was good for nothing, and any other one for all that one could want."""
    with Call(server.url) as call:
        versions = [
            call(PATH, infer(SERVED[n], id=f"r{n}")).json()["model_version"] for n in range(len(SERVED) // 4)
        ]
        labels = [{"id": f"r{n}", "label": int(version != "1")} for n, version in enumerate(versions)]
        for label in labels:
            # Each once: one that is sent again counts again. Predictions are told on about twice a second.
            body = json.dumps({"labels": [label]}).encode()
            wait_for(lambda body=body: call("/v2/models/scaled/labels", body).json()["accepted"])  # type: ignore[misc]  # it is bound


def test_servers_with_one_store_share_keys_out_alike_and_learn_together(tmp_path: Path) -> None:
    two, three = (write_scaled(tmp_path / f"{n}.bundle", n).path for n in (2, 3))
    url = f"sqlite:///{tmp_path / 'state.db'}"
    options: dict[str, Any] = {"workers": 1, "store": url, "lease_s": 3}
    with (
        serving(two, state_dir=tmp_path / "a", **options) as one,
        serving(two, state_dir=tmp_path / "b", **options) as other,
        calling(other.url, rows("scaled", *SERVED)) as (caller,),
    ):
        both = (one, other)
        deploy(one, three, "2", kind="ab", steps=(0.5,))
        wait_for(lambda: factors(other) == {2, 3})
        assert by_key(one) == by_key(other)
        client.rollback("scaled", Back(by="bob"), port=other.port)
        wait_for(lambda: factors(one) == {2})
        deploy(other, three, "3", kind="bandit", steps=(0.5,), watch=Watch(loss="reward"))
        wait_for(lambda: factors(one) == {2, 3})
        # Labels come to one of them only.
        earn(one)
        wait_for(lambda: all(weight(server) > 0.9 for server in both))
        wait_for(lambda: by_key(one) == by_key(other))
        wait_for(lambda: status(other).share == weight(one))
        # Whoever changes something else does not make them forget.
        client.tune("scaled", TuningChange({"timeout_ms": 5000}, by="ada"), port=one.port)
        wait_for(lambda: status(other).tuning.timeout_ms == 5000)
        assert all(weight(server) > 0.9 for server in both)
        # What the one has learned outlives it.
        one.process.send_signal(signal.SIGKILL)
        one.process.wait(60)
        wait_for(lambda: status(other).judged_here)
        time.sleep(3)
        assert weight(other) > 0.9
        client.promote("scaled", Back(by="ada"), port=other.port)
        assert factors(other) == {3}
        caller.wait(20)
    assert not caller.failures
