"""The life of releases against a model of it: whatever is done in whatever order, the store agrees with the model."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from parbake.errors import Conflict, LeaseLost, VersionNotFound
from parbake.release.database import Database, open_database
from parbake.release.model import ENDINGS, Ending, Lease, Proposal, Release
from tests.postgres import Postgres

NAMES = st.sampled_from(["eta", "churn"])
VERSIONS = st.sampled_from(["1", "2", "3"])
HOLDERS = st.sampled_from(["one", "two"])
STEPS = (0.1, 0.5, 1.0)


@dataclass
class Known:
    """What the model knows of one release."""

    version: str
    state: str = "pending"
    step: int = -1
    went_live: int = 0


@dataclass
class Model:
    """All that should be in the store."""

    releases: dict[int, Known] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    clock: int = 0

    def of(self, name: str, *states: str) -> list[int]:
        return [
            number
            for number, known in self.releases.items()
            if self.names[number] == name and known.state in states
        ]

    def go_live(self, number: int) -> None:
        self.clock += 1
        self.releases[number].state = "live"
        self.releases[number].went_live = self.clock
        self.events.append(f"release.live {self.releases[number].version}")

    def end(self, number: int, state: str) -> None:
        self.releases[number].state = state
        self.events.append(f"release.{state} {self.releases[number].version}")

    def last_good(self, name: str) -> int | None:
        if self.of(name, "pending", "running") and (live := self.of(name, "live")):
            return live[0]
        before = [n for n in self.of(name, "superseded") if self.releases[n].went_live]
        return max(before, key=lambda n: self.releases[n].went_live, default=None)


class Life(RuleBasedStateMachine):
    """Begin, advance, finish, roll back, lose the lease, open again; also with values that are out of date."""

    state: Database

    def open(self) -> Database:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.state = self.open()
        self.model = Model()
        self.values: dict[int, list[Release]] = {}
        self.leases: list[Lease] = []
        self.token = 0
        self.holder = ""

    def teardown(self) -> None:
        self.state.close()

    @rule(name=NAMES, version=VERSIONS)
    def begin(self, name: str, version: str) -> None:
        if self.model.of(name, "pending", "running"):
            with pytest.raises(Conflict, match="is being released already"):
                self.state.begin_release(Proposal(name, version, "d", steps=STEPS), by="x")
            return
        release = self.state.begin_release(Proposal(name, version, "d", steps=STEPS), by="x")
        assert release.id not in self.model.releases
        self.model.releases[release.id] = Known(version)
        self.model.names[release.id] = name
        self.values[release.id] = [release]
        self.model.events.append(f"release.begun {version}")

    @precondition(lambda self: self.values)
    @rule(data=st.data(), step=st.integers(0, 2))
    def advance(self, data: st.DataObject, step: int) -> None:
        release, current = self._some(data)
        known = self.model.releases[release.id]
        if not current or known.state not in ENDINGS:
            with pytest.raises(Conflict):
                self.state.advance(release, step, by="x")
            return
        self.values[release.id].append(self.state.advance(release, step, by="x"))
        known.state, known.step = "running", step
        self.model.events.append(f"release.advanced {known.version}")

    @precondition(lambda self: self.values)
    @rule(data=st.data(), ending=st.sampled_from(["live", "rolled_back", "superseded", "refused", "aborted"]))
    def finish(self, data: st.DataObject, ending: Ending) -> None:
        release, current = self._some(data)
        known = self.model.releases[release.id]
        if not current or ending not in ENDINGS.get(known.state, ()):  # type: ignore[call-overload]  # any state
            with pytest.raises(Conflict):
                self.state.finish(release, ending, by="x")
            return
        self.values[release.id].append(self.state.finish(release, ending, by="x"))
        if ending != "live":
            self.model.end(release.id, ending)
            return
        for before in self.model.of(self.model.names[release.id], "live"):
            self.model.end(before, "superseded")
            self.values[before].append(self.state.release(before))
        self.model.go_live(release.id)

    @rule(name=NAMES, to=st.one_of(st.just(""), VERSIONS))
    def roll_back(self, name: str, to: str) -> None:
        live = self.model.of(name, "live")
        open_ones = self.model.of(name, "pending", "running")
        if to:
            lived = [
                n
                for n in self.model.names
                if self.model.names[n] == name and self.model.releases[n].went_live
            ]
            lived = [n for n in lived if self.model.releases[n].version == to]
            target = max(lived, key=lambda n: self.model.releases[n].went_live, default=None)
        else:
            target = self.model.last_good(name)
        if target is None or (live == [target] and not open_ones):
            with pytest.raises((Conflict, VersionNotFound)):
                self.state.roll_back(name, to=to, by="x")
            return
        assert self.state.roll_back(name, to=to, by="x").id == target
        for number in open_ones:
            self.model.end(
                number, "rolled_back" if self.model.releases[number].state == "running" else "aborted"
            )
        if live != [target]:
            for number in live:
                self.model.end(number, "rolled_back")
            self.model.go_live(target)
        for number in {*open_ones, *live, target}:
            self.values[number].append(self.state.release(number))

    @rule(holder=HOLDERS)
    def lease(self, holder: str) -> None:
        got = self.state.lease("controller", holder, 3600)
        if self.holder not in ("", holder):
            assert got is None
            return
        assert got is not None
        self.token += self.holder == ""
        assert got.token == self.token
        self.holder = holder
        self.leases.append(got)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.state.give_up(lease)
        if lease.token == self.token and self.holder:
            self.holder = ""

    @precondition(lambda self: self.leases and self.values)
    @rule(data=st.data())
    def write_under_a_lease(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        release, current = self._some(data)
        if lease.token != self.token or not self.holder:
            with pytest.raises(LeaseLost):
                self.state.remember(release, b"late", fence=lease)
        elif not current or self.model.releases[release.id].state not in ENDINGS:
            with pytest.raises(Conflict):
                self.state.remember(release, b"x", fence=lease)
        else:
            self.values[release.id].append(self.state.remember(release, b"x", fence=lease))

    @rule()
    def open_again(self) -> None:
        self.state.close()
        self.state = self.open()

    @invariant()
    def the_store_agrees(self) -> None:
        stored = {release.id: release for release in self.state.releases()}
        assert {number: (r.proposal.version, r.state, r.step) for number, r in stored.items()} == {
            number: (known.version, known.state, known.step) for number, known in self.model.releases.items()
        }
        assert all(stored[number] == values[-1] for number, values in self.values.items())
        for name in ("eta", "churn"):
            live, good = self.state.live(name), self.state.last_good(name)
            assert ([] if live is None else [live.id]) == self.model.of(name, "live")
            assert (None if good is None else good.id) == self.model.last_good(name)
        events = [f"{e.what} {e.version}" for e in self.state.history() if e.deployment]
        assert events == self.model.events

    def _some(self, data: st.DataObject) -> tuple[Release, bool]:
        """A value that was given out, and whether it is the newest of its release."""
        number = data.draw(st.sampled_from(sorted(self.values)))
        values = self.values[number]
        chosen = data.draw(st.sampled_from(values[-2:]))
        return chosen, chosen.revision == values[-1].revision


def test_a_life_in_sqlite() -> None:
    class InSqlite(Life):
        def open(self) -> Database:
            if not hasattr(self, "folder"):
                self.folder = Path(tempfile.mkdtemp())
            return open_database(f"sqlite:///{self.folder / 'state.db'}")

        def teardown(self) -> None:
            super().teardown()
            shutil.rmtree(self.folder)

    run(InSqlite, 15)


def test_a_life_in_postgres(postgres: Postgres) -> None:
    class InPostgres(Life):
        def open(self) -> Database:
            if not hasattr(self, "url"):
                self.url = postgres.database()
            return open_database(self.url)

    run(InPostgres, 8)


def run(machine: type[Life], examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
