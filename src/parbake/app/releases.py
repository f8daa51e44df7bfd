"""Releases on a running server: through the gate, beside the champion, under the judge's eyes, and back if need be.

What shall be is in the store of releases; what is, is with the supervisor. `Releases` writes the one and makes the
other follow, so a server that is started again, or killed half-way, goes on where the store says.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from msgspec import Struct

from parbake.app.gate import Asked
from parbake.app.gate import judge as ask_gate
from parbake.app.inventory import keep_waivers
from parbake.app.ledger import Ledger, Owed
from parbake.app.routes import RouteChange
from parbake.app.supervisor import Arranged, Supervisor
from parbake.app.trial import Trial, Tuning, record_of, tuned, tuning_of
from parbake.errors import Conflict, GateRefused, InvalidInput, NotFound, ParbakeError, StateAway
from parbake.logs import log
from parbake.release.gate import GateReport, make_waiver
from parbake.release.judge import Decision, Judge, Margins, Verdict
from parbake.release.model import OPEN, Kind, Parameters, Proposal, Release
from parbake.serving.route import Watch
from parbake.settings import REGISTERED

if TYPE_CHECKING:
    from parbake.release.state import State

_LOOK_S: Final = 1.0
"""How often what a version did is looked at."""
_REMEMBER_S: Final = 5.0
"""How often what the judge knows is written down: who dies loses so much of it at most."""
_CATCH_UP_S: Final = 2.0
"""How often, about, one looks whether another server has begun or ended a release."""
_CONTROLLER: Final = "parbake"
"""Who did it, in the history, where nobody told it to."""

_T = TypeVar("_T")


class Wanted(Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody wants released: body of ``POST /admin/releases/NAME``."""

    version: str
    bundle: str
    """Path of the bundle, as the server sees it, or ``models:/NAME@VERSION``: what the registry says."""
    table: str = ""
    kind: Kind = "plain"
    steps: tuple[float, ...] = (1.0,)
    """Shares of the traffic, one for each step; 0 is a step in which it only shadows."""
    every_s: float = 0.0
    """Least time on a step."""
    margins: Margins = Margins()
    watch: Watch = Watch()
    by: str = ""
    why: str = ""
    waive: tuple[str, ...] = ()
    """Checks of the gate that need not pass."""
    breaking: bool = False
    """Whether it may break the callers of the version before."""

    def __post_init__(self) -> None:
        """Refuse steps that are none."""
        if not self.steps or not all(0 <= share <= 1 for share in self.steps):
            raise ValueError("steps are shares of the traffic: numbers from 0 to 1")
        if list(self.steps) != sorted(self.steps):
            raise ValueError("each step has at least the share of the one before")
        if (self.waive or self.breaking) and not self.why:
            raise ValueError("what is let pass needs a why: waive, breaking")


class Back(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/releases/NAME/rollback`` and ``promote``."""

    to: str = ""
    """Version to go back to; "" for the last good one."""
    by: str = ""
    why: str = ""


class TuningChange(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/releases/NAME/parameters``: what of `parbake.app.trial.Tuning` shall be how."""

    values: dict[str, int | float | bool | None]
    """None: as the release began with."""
    by: str = ""
    why: str = ""


class ReleaseStatus(Struct, frozen=True):
    """How the release of a deployment stands."""

    deployment: str
    version: str
    """The version that is being released, or was last."""
    champion: str
    """The version that answers, but for the share of the release."""
    state: str
    kind: Kind = "plain"
    share: float = 1.0
    step: int = 0
    steps: tuple[float, ...] = ()
    since: float = 0.0
    """Unix time of the last change."""
    verdict: Verdict | None = None
    requests: tuple[int, int] = (0, 0)
    """That champion and challenger were asked since the judge began."""
    gate: GateReport | None = None
    seconds: float = 0.0
    """That the change took."""
    judged_here: bool = False
    """Whether this server judges; else another one does, or nobody just now."""
    tuning: Tuning = Tuning()
    """What was changed since it began."""
    note: str = ""
    """What is not as it should be: the store of releases is away."""


class Releases:
    """The releases of one server. The store is opened when it is needed for the first time, or is there already.

    Two loops run. One looks at what versions do and takes a bad one out of the fronts; it never waits for the store.
    The other one asks the store: who judges, what others have done, the next step.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._ledger = Ledger(supervisor.settings)
        self._trials: dict[str, Trial] = {}
        self._before: dict[str, str] = {}
        """By deployment: the version that was live before and stays loaded, to go back to at once."""
        self._ended: dict[str, Trial] = {}
        """By deployment: what was rolled back here last, for who asks while the store is away."""
        self._live: dict[str, int] = {}
        """By deployment: the release that was live when the store was read last."""
        self._read_to = -1
        """The event up to which others' changes were taken in."""
        self._said: set[tuple[str, str]] = set()
        """What went wrong and was logged, so that it is not logged each second."""
        self._tasks: list[asyncio.Task[None]] = []
        self._lock = asyncio.Lock()
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    async def start(self) -> None:
        """Go on with what the store says of the deployments that are served, if there is a store."""
        if self._ledger.is_there:
            try:
                await self._ledger.open(create=False)
            except ParbakeError as error:
                # A server serves without it; who wants a release is told then.
                log().error("releases.no_store", error=error.message, hint=error.hint)
            else:
                for name in self._names():
                    try:
                        await self._restore(name)
                    except ParbakeError as error:
                        # What the command names is served all the same.
                        log().error("release.not_restored", deployment=name, error=error.message)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._watch()), loop.create_task(self._keep_up())]

    def stop(self) -> None:
        """Judge no more, and change nothing."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Write down what the judges know, and let another controller go on."""
        self.stop()
        for trial in self._trials.values():
            if (lease := trial.lease) is None:
                continue
            try:
                await self._remember(trial)
                await self._ask(lambda state, lease=lease: state.give_up(lease))  # type: ignore[misc]  # it is bound
            except ParbakeError as error:
                log().warning("release.not_remembered", error=error.message)
        await self._ledger.close()

    def _names(self) -> list[str]:
        return list(dict.fromkeys(entry.name for entry in self._supervisor.entries))

    # What people ask for ---------------------------------------------------------------------------

    async def deploy(self, name: str, wanted: Wanted) -> ReleaseStatus:
        """Put a version through the gate, and begin its release.

        Raises `GateRefused` with what failed, `Conflict` where a release is under way or the version is there
        already, `ModelNotFound`, and what loading the bundle raises; then nothing has changed for callers.
        """
        began = time.perf_counter()
        source = wanted.bundle
        if wanted.bundle.startswith(REGISTERED):
            taken = await self._supervisor.fetched(wanted.bundle)
            wanted = msgspec.structs.replace(wanted, bundle=taken.path, version=taken.version)
        async with self._lock:
            supervisor = self._supervisor
            champion = supervisor.default_entry(name)
            if name in self._trials:
                raise _under_way(self._trials[name].release)
            if any(e.version == wanted.version and e.name == name for e in supervisor.entries):
                raise Conflict(
                    f"{name!r} serves version {wanted.version!r} already",
                    hint=f"parbake rollback {name} --to {wanted.version}, or another number",
                )
            if (alias := supervisor.followed(name)) and not alias.rpartition("@")[2].isdigit():
                raise Conflict(
                    f"{name!r} follows {alias}: whoever moves the alias releases it",
                    hint=f"parbake alias moves it; or serve models:/{name}@NUMBER, and deploy from there",
                )
            report = await self._through_the_gate(name, champion.bundle, wanted)
            await self._own(name)
            proposal = Proposal(
                name,
                wanted.version,
                report.digest,
                source=source if source.startswith(REGISTERED) else str(Path(wanted.bundle).resolve()),
                table=str(Path(wanted.table).resolve()) if wanted.table else "",
                kind=wanted.kind,
                steps=wanted.steps,
                every_s=wanted.every_s,
                margins={
                    "margins": msgspec.to_builtins(wanted.margins),
                    "watch": msgspec.to_builtins(wanted.watch),
                },
            )
            by = wanted.by or _CONTROLLER
            if report.waivers:
                await self._ask(lambda state: keep_waivers(state, name, wanted.version, report))
            release = await self._ask(lambda state: state.begin_release(proposal, by=by, why=wanted.why))
            trial = Trial.of(release, champion.version)
            try:
                await self._begin(trial)
                if wanted.kind == "plain":
                    await self._finish(trial, by)
                else:
                    await self._advance(trial, 0, by, "")
                    await self._route(trial)
            except BaseException as error:
                if not trial.over:
                    await self._roll_back(trial, _CONTROLLER, _words(error))
                raise
            log().info("release.begun", deployment=name, version=wanted.version, kind=wanted.kind)
            return self._status(trial, report, time.perf_counter() - began)

    async def promote(self, name: str, back: Back) -> ReleaseStatus:
        """Take the next step, whatever the judge says. Raises `Conflict` where no release is under way."""
        async with self._lock:
            trial = self._trial(name)
            # Who judges writes down what it knows now and then; that must not stand in the way of people.
            await self._refresh(trial)
            await self._step(self._trial(name), back.by or _CONTROLLER, back.why or "by hand")
            return self._status(trial)

    async def rollback(self, name: str, back: Back) -> ReleaseStatus:
        """End the release under way, or go back to the version before. Raises `Conflict`, `VersionNotFound`.

        Where the store is away it takes effect all the same, as far as the version is loaded, and is written down
        later; else it raises `StateAway`.
        """
        began = time.perf_counter()
        by, why = back.by or _CONTROLLER, back.why or "by hand"
        trial = self._trials.get(name)
        if trial is not None and back.to in ("", trial.champion):
            # Not behind the lock: somebody who has it may wait for the store.
            await self._roll_back(trial, by, why)
            return self._status(trial, seconds=time.perf_counter() - began)
        async with self._lock:
            left = self._supervisor.default_entry(name).version
            try:
                release = await self._ask(lambda state: state.roll_back(name, to=back.to, by=by, why=why))
            except StateAway as error:
                await self._back_without_store(name, left, back.to, by, why, error)
                to, since = self._supervisor.default_entry(name).version, time.time()
            else:
                if (other := self._trials.pop(name, None)) is not None:
                    other.over = True
                arranged, kept = await self._arranged(release), self._supervisor.arranged(name, left)
                await self._no_route(name)
                await self._supervisor.arrange(name, (kept, arranged))
                self._before.pop(name, None)
                self._live[name] = release.id
                to, since = release.proposal.version, release.changed
            log().warning("release.rolled_back", deployment=name, to=to, by=by, why=why)
            return ReleaseStatus(
                name, left, to, "rolled_back", since=since, seconds=time.perf_counter() - began,
                note=self._note(name),
            )  # fmt: skip

    async def _back_without_store(
        self, name: str, left: str, to: str, by: str, why: str, error: StateAway
    ) -> None:
        """Go back to the version before, which is loaded, and have the history know some time."""
        before = self._before.get(name)
        if all((entry.name, entry.version) != (name, before) for entry in self._supervisor.entries):
            # Somebody has put something else under the server since.
            before = None
        if before is None or to not in ("", before) or name in self._trials:
            raise StateAway(
                error.message,
                hint="it is not known which version was live before; once the store is back, roll back again"
                if before is None
                else f"only version {before} is still loaded: parbake rollback {name} --to {before}",
            ) from error
        supervisor = self._supervisor
        await supervisor.arrange(name, (supervisor.arranged(name, left), supervisor.arranged(name, before)))
        await self._no_route(name)
        self._before.pop(name, None)
        at = time.strftime("%H:%M:%S", time.gmtime())

        def write(state: State) -> None:
            live = state.live(name)
            # Somebody else may have released something meanwhile: then this is past.
            if live is not None and live.proposal.version == left:
                late = f"{why} (at {at} UTC, while the store was away)"
                self._live[name] = state.roll_back(name, to=before, by=by, why=late).id

        await self._ledger.note(Owed(name, f"version {left} was rolled back", write))

    async def tune(self, name: str, change: TuningChange) -> ReleaseStatus:
        """Change parameters while it serves: see `Tuning`. Raises `Conflict`, `SettingsError`, `ModelNotFound`."""
        async with self._lock:
            self._supervisor.default_entry(name)
            trial = self._trials.get(name)
            if trial is None and set(change.values) - {"hold"}:
                raise Conflict(
                    f"no release of {name!r} is under way", hint="without one only hold can be set"
                )
            number = trial.release.id if trial is not None else 0
            by = change.by or _CONTROLLER

            def write(state: State) -> Parameters:
                now = state.parameters(name)
                values = tuned(now, number, change.values)
                if trial is not None:
                    # What cannot be a margin is refused before it stands in the history.
                    tuning_of(Parameters(name, 0, values), number).margins(trial.judge.margins)
                return state.set_parameters(name, values, after=now.version, by=by, why=change.why)

            parameters = await self._ask(write)
            log().info("release.tuned", deployment=name, by=by, **change.values)
            if trial is not None:
                await self._tune(trial, parameters)
        return await self.status(name)

    async def status(self, name: str) -> ReleaseStatus:
        """How the release of a deployment stands. Raises `ModelNotFound`, `Conflict` where there never was one."""
        trial = self._trials.get(name)
        if trial is not None:
            return self._status(trial)
        champion = self._supervisor.default_entry(name)
        ended = self._ended.get(name)
        if ended is not None and self._ledger.owes(name):
            # The store does not know it yet.
            return self._status(ended)
        try:
            last = await self._last(name)
            parameters = await self._ask(lambda state: state.parameters(name))
        except StateAway:
            if ended is None:
                raise
            return self._status(ended)
        judge = _judge_in(last)
        return ReleaseStatus(
            name, last.proposal.version, champion.version, last.state, last.proposal.kind, last.share,
            last.step, last.proposal.steps, last.changed,
            verdict=judge.verdict() if judge is not None and judge.challenger.requests else None,
            requests=_requests(judge) if judge is not None else (0, 0),
            tuning=tuning_of(parameters, last.id), note=self._note(name),
        )  # fmt: skip

    async def judge(self, name: str) -> Judge:
        """What the judge of the release under way knows, or that of the last one did. Raises as `status`."""
        trial = self._trials.get(name)
        if trial is not None:
            return trial.judge
        self._supervisor.default_entry(name)
        judge = _judge_in(await self._last(name))
        if judge is None:
            raise NotFound(
                f"the last release of {name!r} was not judged", hint="parbake deploy --canary has a judge"
            )
        return judge

    async def _last(self, name: str) -> Release:
        releases = await self._ask(lambda state: state.releases(name))
        if not releases:
            raise Conflict(f"{name!r} was never released", hint=f"parbake deploy {name}@2 BUNDLE")
        return max(releases, key=lambda release: release.id)

    # What happens by itself ------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Look at what versions do, and take a bad one out at once; without the store."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for trial in list(self._trials.values()):
                await self._safely(trial.name, partial(self._look, trial))

    async def _look(self, trial: Trial) -> None:
        # Two judges would be wrong twice as often. While the store is away each server has to look after itself.
        judges = trial.lease is not None or self._ledger.away_since
        if trial.over or trial.release.state != "running" or trial.tuning.kill or not judges:
            return
        status = await self._supervisor.route(trial.name)
        verdict = trial.look(status.observed)
        if verdict.decision is Decision.ROLL_BACK and not trial.over:
            await self._roll_back(trial, _CONTROLLER, verdict.reason, verdict)

    async def _keep_up(self) -> None:
        """Ask the store what others have done, and take the steps that the judge allows."""
        due = 0.0
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._ledger.pay()
            for trial in list(self._trials.values()):
                await self._safely(trial.name, partial(self._tend, trial))
            if time.monotonic() >= due:
                # With jitter: servers that were started together need not all ask together.
                due = time.monotonic() + _CATCH_UP_S * random.uniform(0.5, 1.5)  # noqa: S311
                await self._safely("", self._catch_up)

    async def _safely(self, name: str, do: Callable[[], Awaitable[None]]) -> bool:
        """Do something; what goes wrong is logged once until it goes right. Whether the store was there."""
        try:
            await do()
        except StateAway:
            # The ledger has said so. Nothing is promoted without the store; what answers goes on.
            return False
        except ParbakeError as error:
            if (name, error.message) not in self._said:
                self._said.add((name, error.message))
                log().error("release.not_followed", deployment=name, error=error.message)
        except Exception:
            log().exception("release.not_followed", deployment=name)
        else:
            self._said = {said for said in self._said if said[0] != name}
        return True

    async def _tend(self, trial: Trial) -> None:
        """What a release under way needs of the store: who judges, what others did, the next step."""
        async with self._lock:
            if trial.over:
                return
            await self._hold(trial)
            if not await self._refresh(trial):
                return
            parameters = await self._ask(lambda state: state.parameters(trial.name))
            if parameters.version != trial.tuned:
                await self._tune(trial, parameters)
            verdict = trial.verdict
            if self._trials.get(trial.name) is not trial or trial.lease is None or verdict is None:
                return
            if verdict.decision is not trial.told:
                await self._tell(trial, verdict)
            now = time.monotonic()
            if (
                verdict.decision is Decision.PROMOTE
                and now - trial.stepped >= trial.every_s
                and trial.release.proposal.kind in ("canary", "shadow")
                and not (trial.tuning.hold or trial.tuning.kill)
            ):
                await self._step(trial, _CONTROLLER, verdict.reason)
            elif now - trial.remembered >= _REMEMBER_S:
                await self._remember(trial)

    async def _hold(self, trial: Trial) -> None:
        """Take or renew the lease of a release: who has it judges."""
        lasts = self._supervisor.settings.release.lease_s
        if time.monotonic() - trial.leased < lasts / 4:
            return
        asked = time.monotonic()
        lease = await self._ask(lambda state: state.lease(f"release:{trial.name}", self._holder, lasts))
        trial.leased = asked
        if lease is not None and (trial.lease is None or trial.lease.token != lease.token):
            # Whoever judged before has written down what it knew.
            trial.take_up(await self._ask(lambda state: state.release(trial.release.id)))
            log().info("release.judged_here", deployment=trial.name, version=trial.version)
        trial.lease = lease

    async def _refresh(self, trial: Trial) -> bool:
        """Take in what others have done with a release; whether it is still under way."""
        found = await self._ask(lambda state: state.release(trial.release.id))
        if trial.over:
            return False
        before = trial.release
        if found.revision == before.revision:
            return True
        if found.state not in OPEN:
            trial.over = True
            self._trials.pop(trial.name, None)
            await self._settle(trial.name)
            log().info("release.followed", deployment=trial.name, version=trial.version, state=found.state)
            return False
        if trial.lease is None:
            trial.take_up(found)
        elif found.step != before.step:
            trial.stepped, trial.judge = time.monotonic(), trial.judge.next_step()
        trial.release = found
        if (found.state, found.step) != (before.state, before.step):
            await self._route(trial)
        return True

    async def _catch_up(self) -> None:
        """Take part in what another server with the same store has begun, or ended."""
        if not self._ledger.is_open:
            if not self._ledger.is_there:
                return
            await self._ledger.open(create=False)
        newest = await self._ask(lambda state: state.history(limit=1))
        number = newest[-1].id if newest else 0
        if number == self._read_to:
            return
        there = True
        for name in self._names():
            async with self._lock:
                if name not in self._trials and not self._ledger.owes(name):
                    there = await self._safely(name, partial(self._join, name)) and there
        if there:
            self._read_to = number

    async def _join(self, name: str) -> None:
        live = await self._ask(lambda state: state.live(name))
        if live is None or not await self._knows(name):
            return
        if live.id != self._live.get(name):
            await self._settle(name)
        entry = self._supervisor.default_entry(name)
        under_way = await self._ask(lambda state: state.releases(name, under_way=True))
        # Behind a version that somebody has put under this server since, it would be compared with another one.
        if under_way and entry.digest == live.proposal.bundle_digest:
            await self._resume(name, under_way[-1])

    # Steps -----------------------------------------------------------------------------------------

    async def _begin(self, trial: Trial) -> None:
        """Load the version beside the champion, without any traffic."""
        name = trial.name
        # Before it is there: without a route the last version of a name answers.
        challenger = await self._arranged(trial.release)
        await self._supervisor.arrange(name, (challenger, self._supervisor.arranged(name, trial.champion)))
        self._before.pop(name, None)
        self._trials[name] = trial

    async def _step(self, trial: Trial, by: str, why: str) -> None:
        """One step further; behind the last one it is live."""
        step = trial.release.step + 1
        steps = trial.release.proposal.steps
        if step >= len(steps) or steps[step] >= 1:
            await self._finish(trial, by, why)
            return
        judge = trial.judge
        trial.judge = judge.next_step()
        try:
            await self._advance(trial, step, by, why)
        except BaseException:
            trial.judge = judge
            raise
        trial.stepped = time.monotonic()
        await self._route(trial)
        log().info("release.promoted", deployment=trial.name, share=steps[step], why=why)

    async def _finish(self, trial: Trial, by: str, why: str = "") -> None:
        """Everything to the new version; the one before stays loaded, to go back to at once."""
        name, release, fence = trial.name, trial.release, trial.lease
        challenger, champion = await self._arranged(release), self._supervisor.arranged(name, trial.champion)
        if trial.judge.challenger.requests:
            release = await self._ask(lambda state: state.remember(release, _encoded(trial.judge)))
        # The store first: while it is away nothing is promoted, and who dies behind this starts with what it says.
        live = await self._ask(lambda state: state.finish(release, "live", by=by, why=why, fence=fence))
        if trial.over:
            # It was rolled back just then; that is written down behind this.
            return
        try:
            await self._supervisor.arrange(name, (champion, challenger))
            await self._no_route(name)
        except BaseException as error:
            # Store and fronts must not say different things.
            await self._roll_back(trial, _CONTROLLER, f"it could not go live: {_words(error)}")
            raise
        trial.release, trial.over = live, True
        self._trials.pop(name, None)
        self._before[name], self._live[name] = trial.champion, live.id
        log().info("release.live", deployment=name, version=trial.version, why=why)

    async def _roll_back(self, trial: Trial, by: str, why: str, verdict: Verdict | None = None) -> None:
        """Everything to the champion, at once; then it is written down, when the store is there."""
        trial.over = True
        name = trial.name
        try:
            await self._no_route(name)
            await self._supervisor.arrange(name, (self._supervisor.arranged(name, trial.champion),))
        except BaseException:
            trial.over = False
            raise
        log().warning("release.rolled_back", deployment=name, version=trial.version, why=why, by=by)
        if self._trials.get(name) is trial:
            del self._trials[name]
        self._ended[name] = trial
        ended = "aborted" if trial.release.state == "pending" else "rolled_back"
        trial.release = msgspec.structs.replace(trial.release, state=ended, changed=time.time())
        what = f"version {trial.version} was rolled back"
        await self._ledger.note(Owed(name, what, trial.ended(by, why, verdict)))

    async def _settle(self, name: str) -> None:
        """Serve what the store says is live; the version that answered until now stays beside it."""
        live = await self._ask(lambda state: state.live(name))
        if live is None:
            return
        entry, version = self._supervisor.default_entry(name), live.proposal.version
        arranged = await self._arranged(live)
        others = [e.version for e in self._supervisor.entries if e.name == name and e.version != version]
        kept = tuple(self._supervisor.arranged(name, other) for other in dict.fromkeys(others))
        # All of them until there is no route that names them.
        await self._supervisor.arrange(name, (*kept, arranged))
        await self._no_route(name)
        superseded = await self._ask(lambda state: state.last_good(name))
        before = superseded.proposal.version if superseded is not None else ""
        stays = tuple(one for one in kept if one.version in (before, entry.version))
        if stays != kept:
            await self._supervisor.arrange(name, (*stays, arranged))
        self._live[name] = live.id
        self._before.pop(name, None)
        if before and before != version and any(one.version == before for one in stays):
            self._before[name] = before

    async def _resume(self, name: str, release: Release) -> None:
        """Go on with a release that is under way in the store."""
        trial = Trial.of(release, self._supervisor.default_entry(name).version)
        await self._begin(trial)
        if release.state == "running":
            await self._route(trial)
        log().info("release.resumed", deployment=name, version=trial.version)

    async def _route(self, trial: Trial) -> None:
        """Put the share of the step in force."""
        if trial.over:
            return
        status = await self._supervisor.set_route(trial.name, RouteChange(route=trial.route()))
        in_force = status.route
        if in_force is not None and in_force.watch is not None and trial.judge.bins is None:
            trial.judge = msgspec.structs.replace(trial.judge, bins=in_force.watch.bins)

    async def _no_route(self, name: str) -> None:
        """Without a route the last version of a name answers."""
        if self._supervisor.has_route(name):
            await self._supervisor.set_route(name, RouteChange(remove=True))

    async def _tune(self, trial: Trial, parameters: Parameters) -> None:
        """Follow what was changed while the release is under way."""
        tuning = tuning_of(parameters, trial.release.id)
        if trial.tune(tuning, parameters.version) and trial.release.state == "running":
            await self._route(trial)

    async def _arranged(self, release: Release) -> Arranged:
        proposal = release.proposal
        waivers = await self._ask(lambda state: state.waivers(proposal.deployment, proposal.version))
        waived = tuple(dict.fromkeys(waiver.check for waiver in waivers))
        bundle = proposal.source
        if bundle.startswith(REGISTERED):
            # By its number: an alias may mean something else by now.
            bundle = (
                await self._supervisor.fetched(f"{REGISTERED}{proposal.deployment}@{proposal.version}")
            ).path
        return Arranged(proposal.version, bundle, proposal.table, waived)

    # The store -------------------------------------------------------------------------------------

    async def _restore(self, name: str) -> None:
        """What the store says of a deployment, where what is served is known to it."""
        if not await self._knows(name):
            return
        try:
            live = await self._ask(lambda state: state.live(name))
            entry = self._supervisor.default_entry(name)
            served = (entry.digest, entry.version)
            if live is not None and (live.proposal.bundle_digest, live.proposal.version) != served:
                await self._supervisor.arrange(name, (await self._arranged(live),))
            if live is not None:
                self._live[name] = live.id
            await self._no_route(name)
            if under_way := await self._ask(lambda state: state.releases(name, under_way=True)):
                await self._resume(name, under_way[-1])
        except ParbakeError as error:
            log().error("release.not_restored", deployment=name, error=error.message)

    async def _knows(self, name: str) -> bool:
        """Whether what is served was ever released; who serves something else is left alone."""
        entry = self._supervisor.default_entry(name)
        releases = await self._ask(lambda state: state.releases(name))
        known = any(release.proposal.bundle_digest == entry.digest for release in releases)
        if releases and not known and (name, entry.digest) not in self._said:
            self._said.add((name, entry.digest))
            log().warning(
                "release.unknown_bundle",
                deployment=name,
                hint="what is served was never released; it is served all the same",
            )
        return known

    async def _own(self, name: str) -> None:
        """Have the store know what is served now: there has to be something to go back to."""
        live = await self._ask(lambda state: state.live(name))
        entry = self._supervisor.default_entry(name)
        if live is not None and live.proposal.bundle_digest == entry.digest:
            return
        proposal = Proposal(name, entry.version, entry.digest, source=entry.bundle, table=entry.table)
        why = "it was served before the first release"
        if live is not None:
            why = "it was put under the server by reload"

        def enter(state: State) -> None:
            release = state.begin_release(proposal, by=_CONTROLLER, why=why)
            self._live[name] = state.finish(release, "live", by=_CONTROLLER, why=why).id

        await self._ask(enter)

    async def _advance(self, trial: Trial, step: int, by: str, why: str) -> None:
        release, known, fence = trial.release, _encoded(trial.judge), trial.lease
        trial.release = await self._ask(
            lambda state: state.advance(release, step, by=by, why=why, judge_state=known, fence=fence)
        )

    async def _remember(self, trial: Trial) -> None:
        release, known, fence = trial.release, _encoded(trial.judge), trial.lease
        trial.release = await self._ask(lambda state: state.remember(release, known, fence=fence))
        trial.remembered = time.monotonic()

    async def _tell(self, trial: Trial, verdict: Verdict) -> None:
        """Have the history know what the judge says now."""
        release, fence = trial.release, trial.lease
        record = record_of(verdict)
        await self._ask(lambda state: state.record_verdict(release, record, by=_CONTROLLER, fence=fence))
        trial.told = verdict.decision

    async def _ask(self, verb: Callable[[State], _T]) -> _T:
        """One verb of the store. Raises `StateAway` and what the verb raises."""
        return await self._ledger.ask(verb)

    def _note(self, name: str) -> str:
        away, owed = self._ledger.away_since, self._ledger.owes(name)
        words = []
        if away:
            words.append(
                f"the store of releases is away since {time.strftime('%H:%M:%S', time.gmtime(away))} UTC"
            )
        if owed:
            words.append("what has changed will be written down when it is back")
        return "; ".join(words)

    async def _through_the_gate(self, name: str, against: str, wanted: Wanted) -> GateReport:
        supervisor = self._supervisor
        settings = supervisor.deployment_settings(name)
        who = wanted.by or _CONTROLLER
        # Who breaks callers waives that check, so that it stands in the history and in the inventory.
        waived = dict.fromkeys((*wanted.waive, *(("schema",) if wanted.breaking else ())))
        asked = Asked(
            Path(wanted.bundle),
            Path(against),
            Path(wanted.table) if wanted.table else None,
            needs_table=settings.mode == "static",
            deadline_ms=settings.deadline_ms,
            max_bytes=settings.max_runner_bytes or None,
            waivers=tuple(make_waiver(check, who, wanted.why) for check in waived),
            trusted=supervisor.trusted(),
            allow_pickle=supervisor.settings.server.allow_pickle,
        )
        report = await ask_gate(asked, supervisor.pool)
        if not report.ok:
            failed = [check for check in report.checks if check.verdict in ("failed", "unknown")]
            raise GateRefused(
                f"version {wanted.version!r} of {name!r} must not take traffic: "
                + "; ".join(f"{check.name}: {check.words}" for check in failed),
                hint=next((check.hint for check in failed if check.hint), "")
                or f"parbake gate {wanted.bundle} --against {against} shows all of it",
            )
        if report.name != name:
            raise InvalidInput(
                f"the bundle is {report.name!r}, the deployment {name!r}",
                hint="pack it under the deployment's name",
            )
        return report

    def _trial(self, name: str) -> Trial:
        trial = self._trials.get(name)
        if trial is None:
            self._supervisor.default_entry(name)
            raise Conflict(f"no release of {name!r} is under way", hint=f"parbake history {name}")
        return trial

    def _status(self, trial: Trial, gate: GateReport | None = None, seconds: float = 0.0) -> ReleaseStatus:
        release, proposal = trial.release, trial.release.proposal
        return ReleaseStatus(
            proposal.deployment, proposal.version, trial.champion, release.state, proposal.kind, release.share,
            release.step, proposal.steps, release.changed, trial.verdict, _requests(trial.judge), gate, seconds,
            trial.lease is not None, trial.tuning, self._note(proposal.deployment),
        )  # fmt: skip


def _requests(judge: Judge) -> tuple[int, int]:
    return judge.champion.requests, judge.challenger.requests


def _judge_in(release: Release) -> Judge | None:
    """What the judge of a release knew when it was written down last."""
    if not release.judge_state:
        return None
    return msgspec.msgpack.decode(release.judge_state, type=Judge)


def _encoded(judge: Judge) -> bytes:
    return msgspec.msgpack.encode(judge)


def _words(error: BaseException) -> str:
    return error.message if isinstance(error, ParbakeError) else str(error) or type(error).__name__


def _under_way(release: Release) -> Conflict:
    proposal = release.proposal
    return Conflict(
        f"version {proposal.version!r} of {proposal.deployment!r} is being released since "
        f"{time.strftime('%H:%M:%S', time.gmtime(release.created))} UTC by {release.by}",
        hint=f"parbake release {proposal.deployment} shows it; parbake rollback {proposal.deployment} ends it",
    )
