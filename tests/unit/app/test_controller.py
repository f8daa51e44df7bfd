"""What a server does with releases that others change at the same time, on a real store and with no process started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from parbake.app.controller import Controller
from parbake.app.follow import Taken
from parbake.app.plan import PlanEntry
from parbake.app.releases import Back, Releases, TuningChange, Wanted
from parbake.app.routes import RouteChange, RouteStatus
from parbake.app.state import STATE_FILE
from parbake.app.supervisor import Arranged, Supervisor
from parbake.app.trial import Trial
from parbake.errors import (
    BundleMissing,
    Conflict,
    InvalidInput,
    MissingExtra,
    ModelNotFound,
    ParbakeError,
    SettingsError,
    StateAway,
    StateTorn,
    VersionNotFound,
)
from parbake.release.database import Database, open_database
from parbake.release.model import Proposal, Release
from parbake.release.registry import no_version
from parbake.serving.route import Route
from parbake.settings import DeploymentSettings, ServerSettings, Settings

PATIENCE_S = 20.0


@dataclass
class Fronts:
    """What a supervisor serves, without any process: a bundle's path is its digest too."""

    settings: Settings
    served: dict[str, list[PlanEntry]] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    """Bundles that cannot be loaded."""
    asked: list[str] = field(default_factory=list)
    """Those that were to be loaded."""
    unfit: set[str] = field(default_factory=set)
    """Deployments whose route cannot be changed."""
    registry: ParbakeError = field(default_factory=lambda: ParbakeError("nobody is asked"))
    """What asking for a version of the registry comes to."""
    earned_elsewhere: dict[str, Any] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[PlanEntry, ...]:
        return tuple(entry for entries in self.served.values() for entry in entries)

    def default_entry(self, name: str) -> PlanEntry:
        if name not in self.served:
            raise ModelNotFound(f"no deployment {name!r}")
        return self.served[name][-1]

    def arranged(self, name: str, version: str) -> Arranged:
        (found,) = (entry for entry in self.served[name] if entry.version == version)
        return Arranged(version, found.bundle)

    def followed(self, name: str) -> str:
        return ""

    def has_route(self, name: str) -> bool:
        return name in self.routes

    async def fetched(self, reference: str) -> Taken:
        raise self.registry

    async def arrange(self, name: str, versions: Sequence[Arranged]) -> None:
        there = {entry.bundle for entry in self.served.get(name, ())}
        for one in versions:
            if one.bundle not in there:
                self.asked.append(one.bundle)
                if one.bundle in self.missing:
                    raise BundleMissing(f"no bundle {one.bundle}")
        self.served[name] = [entry_of(name, one.version, one.bundle) for one in versions]

    async def set_route(self, name: str, change: RouteChange) -> RouteStatus:
        if name in self.unfit:
            raise InvalidInput(f"the route does not fit {name!r}")
        if change.route is None:
            del self.routes[name]
        else:
            self.routes[name] = change.route
        return await self.route(name)

    def in_force(self, name: str) -> Route | None:
        return self.routes.get(name)

    async def route(self, name: str) -> RouteStatus:
        return RouteStatus(name, self.routes.get(name))

    def versions(self, name: str) -> list[str]:
        return [entry.version for entry in self.served[name]]


def entry_of(name: str, version: str, bundle: str) -> PlanEntry:
    return PlanEntry(name, version, bundle, bundle, "dynamic", "inline", 1000.0, 100, 10, 0.0)


def proposal(name: str, version: str, **more: Any) -> Proposal:
    bundle = f"/bundles/{name}-{version}"
    return Proposal(name, version, bundle, source=bundle, **more)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    """The store, as another server has it open."""
    state = open_database(f"sqlite:///{tmp_path / STATE_FILE}")
    yield state
    state.close()


@pytest.fixture
def fronts(tmp_path: Path, state: Database) -> Fronts:
    """Two deployments, each with its version 1, which is live in the store as well."""
    settings = Settings(
        server=ServerSettings(state_dir=str(tmp_path)),
        deployments=(DeploymentSettings("/bundles/a-1"), DeploymentSettings("/bundles/b-1")),
    )
    fronts = Fronts(settings)
    for name in ("a", "b"):
        live(state, name, "1")
        fronts.served[name] = [entry_of(name, "1", f"/bundles/{name}-1")]
    return fronts


def live(state: Database, name: str, version: str) -> Release:
    """Released by somebody else."""
    return state.finish(state.begin_release(proposal(name, version), by="ada"), "live", by="ada")


def canary(state: Database, name: str, version: str) -> Release:
    begun = state.begin_release(proposal(name, version, kind="canary", steps=(0.1, 0.5, 1.0)), by="ada")
    return state.advance(begun, 0, by="ada")


def controlled(fronts: Fronts, test: Callable[[Controller], Awaitable[None]]) -> None:
    """Run a test with a controller whose loops do not run: the test takes their steps."""

    async def run() -> None:
        controller = Controller(cast("Supervisor", fronts))
        try:
            await asyncio.wait_for(test(controller), PATIENCE_S)
        finally:
            await controller.close()

    asyncio.run(run())


def test_a_deploy_on_a_server_that_is_behind_follows_first(fronts: Fronts, state: Database) -> None:
    async def test(controller: Controller) -> None:
        releases = Releases(controller)
        # Another server has taken version 2 live, and tries version 3.
        live(state, "a", "2")
        with pytest.raises(Conflict, match="version '2' of 'a' is live already"):
            await releases.deploy("a", Wanted("2", "/bundles/a-2"))
        assert fronts.versions("a") == ["1", "2"]
        canary(state, "a", "3")
        with pytest.raises(Conflict, match="version '3' of 'a' is being released"):
            await releases.deploy("a", Wanted("4", "/bundles/a-4"))
        assert controller.trials["a"].champion == "2"
        # Nothing was put under the server that the store does not say, and nothing written.
        assert fronts.routes["a"].champion == "2"
        now = state.live("a")
        assert now is not None
        assert now.proposal.version == "2"

    controlled(fronts, test)


def test_a_version_that_is_not_to_be_had_is_told_with_those_that_are(fronts: Fronts, state: Database) -> None:
    async def test(controller: Controller) -> None:
        releases = Releases(controller)
        live(state, "a", "2")
        state.finish(state.begin_release(proposal("a", "3"), by="ada"), "aborted", by="ada")
        fronts.registry = MissingExtra("MLflow", "mlflow")
        with pytest.raises(MissingExtra) as refused:
            await releases.deploy("a", Wanted("9", "models:/a@9"))
        assert refused.value.message == (
            "version 9 of 'a' was never released here: there are versions 1, 2; "
            "what the registry has of it cannot be had: MLflow is not installed"
        )
        assert refused.value.hint == (
            "parbake deploy a@9 BUNDLE needs no registry; pip install 'parbake[mlflow]'"
        )
        with pytest.raises(
            MissingExtra, match=r"version 2 of 'a' was released from /bundles/a-2; "
        ) as refused:
            await releases.deploy("a", Wanted("2", "models:/a@2"))
        assert refused.value.hint.startswith("parbake deploy a@2 /bundles/a-2 needs no registry; ")
        # An alias is the registry's alone.
        with pytest.raises(MissingExtra, match=r"^MLflow is not installed"):
            await releases.deploy("a", Wanted("champion", "models:/a@champion"))
        fronts.registry = no_version("a", "9", "here", ["1", "2", "3"])
        with pytest.raises(VersionNotFound) as unknown:
            await releases.deploy("a", Wanted("9", "models:/a@9"))
        assert unknown.value.message == (
            "model 'a' has no version '9' in the registry here: there are versions 1, 2, 3; "
            "version 9 of 'a' was never released here: there are versions 1, 2"
        )
        # The registry has it, and it is the bundle store that has not.
        fronts.registry = BundleMissing("no bundle sha256:41c2 in /store")
        with pytest.raises(BundleMissing, match=r"^no bundle sha256:41c2 in /store$"):
            await releases.deploy("a", Wanted("9", "models:/a@9"))
        fronts.registry = no_version("c", "9", "here", [])
        fronts.served["c"] = [entry_of("c", "1", "/bundles/c-1")]
        with pytest.raises(VersionNotFound, match=r"version 9 of 'c' was never released here\n"):
            await releases.deploy("c", Wanted("9", "models:/c@9"))
        with pytest.raises(ModelNotFound, match="no deployment 'eta'"):
            await releases.deploy("eta", Wanted("9", "models:/eta@9"))

    controlled(fronts, test)


def test_what_was_released_is_not_told_while_nobody_can_look_it_up(fronts: Fronts, state: Database) -> None:
    live(state, "a", "2")
    # `unsteady` looks at a trial.
    canary(state, "a", "3")

    async def test(controller: Controller) -> None:
        store = await unsteady(controller, state)
        store.error = StateAway("it is away")
        fronts.registry = MissingExtra("MLflow", "mlflow")
        with pytest.raises(MissingExtra, match=r"^MLflow is not installed"):
            await Releases(controller).deploy("a", Wanted("9", "models:/a@9"))
        store.error = None

    controlled(fronts, test)


@pytest.mark.parametrize("version", ["", "2/3", "two\n"])
def test_what_can_name_no_version_is_refused_before_the_gate(version: str) -> None:
    decoder = msgspec.json.Decoder(Wanted)
    with pytest.raises(msgspec.ValidationError, match=r"\$\.version"):
        decoder.decode(msgspec.json.encode({"version": version, "bundle": "/bundles/a-2"}))
    # As parbake.toml may name one.
    assert decoder.decode(b'{"version": "2026-11", "bundle": "/bundles/a-2"}').version == "2026-11"


def test_a_deployment_that_cannot_follow_holds_up_no_other(fronts: Fronts, state: Database) -> None:
    async def test(controller: Controller) -> None:
        await controller._catch_up()
        fronts.missing.add("/bundles/a-2")
        live(state, "a", "2")
        live(state, "b", "2")
        await controller._catch_up()
        assert (fronts.versions("a"), fronts.versions("b")) == (["1"], ["1", "2"])
        # It is not asked for at each turn, and the other goes on following at once.
        live(state, "b", "3")
        await controller._catch_up()
        assert fronts.versions("b")[-1] == "3"
        assert fronts.asked.count("/bundles/a-2") == 1
        # Longer from one time to the next, but not given up.
        pauses = [controller._late["a"][0]]
        fronts.missing.clear()
        controller._late["a"] = pauses[0], 0.0
        await controller._catch_up()
        assert fronts.versions("a") == ["1", "2"]
        assert "a" not in controller._late

    controlled(fronts, test)


def test_a_release_that_cannot_go_on_holds_up_no_other(fronts: Fronts, state: Database) -> None:
    begun = {name: canary(state, name, "2") for name in ("a", "b")}

    async def test(controller: Controller) -> None:
        await controller.start()
        assert set(controller.trials) == {"a", "b"}
        fronts.unfit.add("a")
        for release in begun.values():
            state.advance(state.release(release.id), 1, by="ada")
        while fronts.routes["b"].arms[1].weight != 0.5:
            await asyncio.sleep(0.05)
        assert fronts.routes["a"].arms[1].weight == 0.1
        # It is tried again until it can.
        fronts.unfit.clear()
        while fronts.routes["a"].arms[1].weight != 0.5:
            await asyncio.sleep(0.05)

    controlled(fronts, test)


def test_who_changes_one_deployment_keeps_nobody_from_another(fronts: Fronts, state: Database) -> None:
    async def test(controller: Controller) -> None:
        releases = Releases(controller)
        for name in ("a", "b"):
            canary(state, name, "2")
            await controller.join(name)
        async with controller.lock("a"):
            # Somebody has it for as long as a bundle takes to load.
            found = await asyncio.wait_for(releases.promote("b", Back(by="bob")), 5)
            assert (found.share, found.step) == (0.5, 1)
            # And the loop that tends to all of them passes it by.
            await asyncio.wait_for(controller._tend(controller.trials["a"]), 5)
            await asyncio.wait_for(controller._tend(controller.trials["b"]), 5)
            await asyncio.wait_for(controller._catch_up(), 5)
        assert controller.trials["b"].lease is not None
        assert controller.trials["a"].lease is None

    controlled(fronts, test)


def test_a_judge_whose_lease_is_lost_writes_nothing_and_people_go_on(fronts: Fronts, state: Database) -> None:
    async def test(controller: Controller) -> None:
        canary(state, "a", "2")
        await controller.join("a")
        trial = controller.trials["a"]
        await controller._tend(trial)
        lease = trial.lease
        assert lease is not None
        # It was silent for too long, and does not know yet.
        state.give_up(lease)
        assert state.lease(lease.name, "another server", 60) is not None
        known = state.release(trial.release.id)
        assert not await controller._safely("tend", "a", lambda: controller._tend(_due(trial)))
        assert state.release(trial.release.id) == known
        assert trial.lease is None
        # It asks again, is told that another one judges, and leaves it at that.
        await controller._tend(trial)
        assert trial.lease is None
        # A step by hand counts, whoever judges.
        trial.lease = lease
        await Releases(controller).promote("a", Back(by="bob"))
        after = state.release(trial.release.id)
        assert (after.step, trial.release.step) == (1, 1)
        assert [event.by for event in state.history("a") if event.what == "release.advanced"] == [
            "ada",
            "bob",
        ]

    controlled(fronts, test)


def _due(trial: Trial) -> Trial:
    """The same, with something to write down."""
    trial.remembered = -1e9
    trial.verdict = trial.judge.verdict()
    trial.told = trial.verdict.decision
    return trial


class Unsteady:
    """A store that can be away, hang, or have somebody else write to it first."""

    def __init__(self, state: Database) -> None:
        self._state = state
        self.error: ParbakeError | None = None
        self.waits = threading.Event()
        self.waits.set()
        self.first: dict[str, Callable[[], object]] = {}
        """By verb: what somebody else does before it, once."""

    def __getattr__(self, verb: str) -> Any:
        self.waits.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        self.first.pop(verb, lambda: None)()
        return getattr(self._state, verb)


async def unsteady(controller: Controller, state: Database) -> Unsteady:
    """The store of a server that tries version 2 of a, from now on not to be relied on."""
    await controller.ledger.open()
    store = Unsteady(state)
    cast("Any", controller.ledger)._state = store
    await controller.join("a")
    return store


KILL = RouteChange(killed=True, by="ada")


def test_the_kill_switch_stays_on_whoever_changes_parameters_meanwhile(
    fronts: Fronts, state: Database
) -> None:
    release = canary(state, "a", "2")

    def tune(after: int, **values: Any) -> None:
        """Somebody else does, on another server."""
        state.set_parameters("a", {"release": release.id, **values}, after=after, by="bob")

    async def test(controller: Controller) -> None:
        store = await unsteady(controller, state)
        trial = controller.trials["a"]
        store.error = StateAway("it is away")
        assert "will be written down" in (await Releases(controller).set_route("a", KILL)).note
        assert fronts.routes["a"].killed
        store.error = None
        tune(0, p99=3.0)
        await controller._tend(trial)
        assert fronts.routes["a"].killed
        # And once more while it is written down.
        store.first["set_parameters"] = lambda: tune(1, p99=4.0)
        await controller.ledger.pay()
        assert state.parameters("a").values == {"release": release.id, "p99": 4.0, "kill": True}
        assert controller.note("a") == ""
        await controller._tend(trial)
        assert fronts.routes["a"].killed
        assert (trial.tuning.kill, trial.tuning.p99) == (True, 4.0)
        # Again, which changes nothing.
        await Releases(controller).set_route("a", KILL)
        assert state.parameters("a").version == 3

    controlled(fronts, test)


def test_the_kill_switch_waits_for_nobody(fronts: Fronts, state: Database) -> None:
    canary(state, "a", "2")

    async def test(controller: Controller) -> None:
        releases, store = Releases(controller), await unsteady(controller, state)
        async with controller.lock("a"):
            # Whoever has the lock waits for the store, which hangs.
            store.waits.clear()
            killing = asyncio.create_task(releases.tune("a", TuningChange({"kill": True})))
            try:
                while not fronts.routes["a"].killed:
                    await asyncio.sleep(0.01)
            finally:
                store.waits.set()
            assert (await killing).tuning.kill
        store.error = StateTorn("it is damaged")
        assert "it is damaged" in (await releases.tune("a", TuningChange({"kill": False}))).note
        assert not fronts.routes["a"].killed
        # What was lost is of no interest any more once something is written.
        store.error = None
        assert (await releases.tune("a", TuningChange({"hold": True}))).note == ""
        with pytest.raises(SettingsError):
            await releases.tune("a", TuningChange({"kill": 5}))

    controlled(fronts, test)


def test_the_kill_switch_of_a_release_that_ended_elsewhere_is_not_written_down(
    fronts: Fronts, state: Database
) -> None:
    release = canary(state, "a", "2")

    async def test(controller: Controller) -> None:
        store = await unsteady(controller, state)
        store.error = StateAway("it is away")
        await Releases(controller).set_route("a", KILL)
        store.error = None
        state.finish(state.release(release.id), "rolled_back", by="bob")
        await controller.ledger.pay()
        assert not controller.ledger.owes("a")
        assert controller.note("a") == ""
        assert state.parameters("a").version == 0
        with pytest.raises(Conflict, match="ended by somebody else"):
            await Releases(controller).tune("a", TuningChange({"p99": 5.0}))

    controlled(fronts, test)


def test_a_release_without_a_route_has_no_kill_switch_there(fronts: Fronts, state: Database) -> None:
    begun = state.begin_release(proposal("a", "2", kind="canary", steps=(0.1, 1.0)), by="bob")

    async def test(controller: Controller) -> None:
        releases, store = Releases(controller), await unsteady(controller, state)
        with pytest.raises(Conflict, match="has no route yet"):
            await releases.set_route("a", KILL)
        # Its own switch has it begin without any requests.
        assert (await releases.tune("a", TuningChange({"kill": True}))).tuning.kill
        state.advance(begun, 0, by="bob")
        await controller._tend(controller.trials["a"])
        assert fronts.routes["a"].killed
        # What is going live cannot wait.
        store.waits.clear()
        live = asyncio.create_task(controller.finish(controller.trials["a"], "ada"))
        try:
            await asyncio.sleep(0)
            with pytest.raises(Conflict, match="going live"):
                await releases.tune("a", TuningChange({"kill": False}))
        finally:
            store.waits.set()
            await asyncio.gather(live, return_exceptions=True)

    controlled(fronts, test)
