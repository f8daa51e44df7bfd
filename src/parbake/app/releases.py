"""Releases on a running server: through the gate, beside the champion, under the judge's eyes, and back if need be.

`parbake.app.controller` does what has to be done, also by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from parbake.app.controller import CONTROLLER, Controller, words_of
from parbake.app.gate import Asked
from parbake.app.gate import judge as ask_gate
from parbake.app.inventory import keep_waivers
from parbake.app.ledger import Owed
from parbake.app.routes import RouteChange, RouteStatus
from parbake.app.trial import Trial, Tuning, insist, tuned, tuning_of
from parbake.contract.bundle import read_bundle
from parbake.errors import (
    Conflict,
    GateRefused,
    InvalidInput,
    LeaseLost,
    MissingExtra,
    ModelNotFound,
    NotFound,
    ParbakeError,
    StateAway,
    VersionNotFound,
)
from parbake.logs import log
from parbake.names import Name
from parbake.release.gate import GateReport, make_waiver
from parbake.release.judge import Judge, Margins, Verdict
from parbake.release.model import OPEN, Details, Elsewhere, Kind, Parameters, Proposal, Release
from parbake.release.registry import is_number, listed
from parbake.serving.route import Watch
from parbake.settings import REGISTERED

if TYPE_CHECKING:
    from parbake.release.state import State


_TRIES: Final = 5
"""How often a step is tried where somebody else writes at the same time."""
_LATE_S: Final = 5.0
"""What is written down later than this says when it happened; nobody who changes a route waits longer for it."""


class Wanted(Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody wants released: body of ``POST /admin/releases/NAME``."""

    version: Name
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
            raise ValueError("what is let pass (waive, breaking, force) needs a reason: --why TEXT")


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
    """That the version before and this one were asked since the judge began."""
    against: str = ""
    """The version that it is or was compared with; "" where that is not known any more."""
    gate: GateReport | None = None
    seconds: float = 0.0
    """That the change took."""
    judged_here: bool = False
    """Whether this server judges; else another one does, or nobody just now."""
    tuning: Tuning = Tuning()
    """What was changed since it began."""
    note: str = ""
    """What is not as it should be: the store of releases is away."""
    image: str = ""
    """The image that has the version gone back to in it; "" where none is known."""


class Releases:
    """The releases of one server, as people ask for them."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._supervisor = controller.supervisor

    async def deploy(self, name: str, wanted: Wanted) -> ReleaseStatus:
        """Put a version through the gate, and begin its release.

        Raises `GateRefused` with what failed, which stands in the history too, `InvalidInput` for the bundle of
        another model, `Conflict` where a release is under way or the version is there already, `NotFound`, and what
        loading the bundle raises; then nothing has changed for callers.
        """
        began = time.perf_counter()
        source = wanted.bundle
        if wanted.bundle.startswith(REGISTERED):
            self._supervisor.default_entry(name)
            try:
                taken = await self._supervisor.fetched(wanted.bundle)
            except (ModelNotFound, VersionNotFound, MissingExtra) as error:
                raise await self._not_registered(name, wanted.version, error) from error
            wanted = msgspec.structs.replace(wanted, bundle=taken.path, version=taken.version)
        async with self._controller.lock(name):
            supervisor = self._supervisor
            supervisor.default_entry(name)
            if name not in self._controller.trials and self._controller.ledger.is_there:
                # What another server has released is not undone by one that does not know it yet.
                await self._controller.join(name)
            champion = supervisor.default_entry(name)
            if name in self._controller.trials:
                raise _under_way(self._controller.trials[name].release)
            if champion.version == wanted.version:
                raise Conflict(
                    f"version {wanted.version!r} of {name!r} is live already",
                    hint=f"parbake history {name} shows since when",
                )
            if Path(wanted.bundle).resolve() == Path(champion.bundle).resolve():
                raise Conflict(
                    f"version {champion.version!r} of {name!r} is served from {wanted.bundle}: there would be nothing "
                    "to go back to",
                    hint="pack each version into a folder of its own",
                )
            if alias := self._controller.alias(name):
                raise Conflict(
                    f"{name!r} follows {alias}: whoever moves the alias releases it",
                    hint=f"parbake alias moves it; or serve models:/{name}@NUMBER, and deploy from there",
                )
            if wanted.kind != "plain":
                supervisor.check_watch(name, wanted.watch)
            report = await self._through_the_gate(name, champion.bundle, wanted)
            await self._controller.own(name)
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
            by = wanted.by or CONTROLLER
            if report.waivers:
                await self._controller.ask(lambda state: keep_waivers(state, name, wanted.version, report))
            release = await self._controller.ask(
                lambda state: state.begin_release(proposal, by=by, why=wanted.why), name
            )
            trial = Trial.of(release, champion.version)
            try:
                await self._controller.begin(trial)
                if wanted.kind == "plain":
                    await self._controller.finish(trial, by)
                else:
                    await self._controller.advance(trial, 0, trial.judge, by, "")
                    await self._controller.route(trial)
            except BaseException as error:
                if not trial.over:
                    await self._controller.roll_back(trial, CONTROLLER, words_of(error))
                raise
            log().info("release.begun", deployment=name, version=wanted.version, kind=wanted.kind)
            return self._status(trial, report, time.perf_counter() - began)

    async def promote(self, name: str, back: Back) -> ReleaseStatus:
        """Take the next step, whatever the judge says. Raises `Conflict` where no release is under way."""
        async with self._controller.lock(name):
            by, why = back.by or CONTROLLER, back.why or "by hand"
            for _ in range(_TRIES):
                await self._controller.refresh(self._trial(name))
                trial = self._trial(name)
                try:
                    await self._controller.step(trial, by, why)
                    return self._status(trial)
                except LeaseLost:
                    trial.lose_lease()
                except Conflict:
                    # Who judges writes down what it knows now and then; that must not stand in the way of people.
                    continue
            raise Conflict(f"others change the release of {name!r} all the time", hint="try again")

    async def rollback(self, name: str, back: Back) -> ReleaseStatus:
        """End the release under way, or go back to the version before. Raises `Conflict`, `VersionNotFound`.

        Where the store is away it takes effect all the same, as far as the version is loaded, and is written down
        later; else it raises `StateAway`.
        """
        began = time.perf_counter()
        by, why = back.by or CONTROLLER, back.why or "by hand"
        if alias := self._controller.alias(name):
            raise Conflict(
                f"{name!r} follows {alias}: whoever moves the alias goes back",
                hint=f"parbake versions {name} shows the numbers, parbake alias {name} "
                f"{alias.rpartition('@')[2]} NUMBER moves it",
            )
        trial = self._controller.trials.get(name)
        if trial is not None and back.to in ("", trial.champion):
            # Not behind the lock: somebody who has it may wait for the store.
            await self._controller.roll_back(trial, by, why)
            return self._status(trial, seconds=time.perf_counter() - began)
        async with self._controller.lock(name):
            left = self._supervisor.default_entry(name).version
            try:
                release = await self._controller.ask(
                    lambda state: state.roll_back(name, to=back.to, by=by, why=why), name
                )
            except Conflict as error:
                if trial is not None or not self._supervisor.has_route(name):
                    raise
                # It is live; but somebody shares requests out by hand.
                raise Conflict(
                    error.message,
                    hint=f"a route is in force: parbake route {name} --kill sends everything to its champion",
                ) from error
            except StateAway as error:
                await self._back_without_store(name, left, back.to, by, why, error)
                to, since, image = self._supervisor.default_entry(name).version, time.time(), ""
            else:
                if (other := self._controller.trials.pop(name, None)) is not None:
                    other.over = True
                arranged, kept = (
                    await self._controller.arranged(release),
                    self._supervisor.arranged(name, left),
                )
                await self._controller.no_route(name)
                # This server may be behind, and have it in force.
                both = (arranged,) if kept.version == arranged.version else (kept, arranged)
                await self._supervisor.arrange(name, both)
                self._controller.before.pop(name, None)
                self._controller.live[name] = release.id
                to, since, image = release.proposal.version, release.changed, release.proposal.image
            log().warning("release.rolled_back", deployment=name, to=to, by=by, why=why)
            return ReleaseStatus(
                name, left, to, "rolled_back", since=since, seconds=time.perf_counter() - began,
                note=self._controller.note(name), image=image,
            )  # fmt: skip

    async def _back_without_store(
        self, name: str, left: str, to: str, by: str, why: str, error: StateAway
    ) -> None:
        """Go back to the version before, which is loaded, and have the history know some time."""
        before = self._controller.before.get(name)
        if all((entry.name, entry.version) != (name, before) for entry in self._supervisor.entries):
            # Somebody has put something else under the server since.
            before = None
        if before is None or to not in ("", before) or name in self._controller.trials:
            raise StateAway(
                error.message,
                hint="it is not known which version was live before; once the store is back, roll back again"
                if before is None
                else f"only version {before} is still loaded: parbake rollback {name} --to {before}",
            ) from error
        supervisor = self._supervisor
        await supervisor.arrange(name, (supervisor.arranged(name, left), supervisor.arranged(name, before)))
        await self._controller.no_route(name)
        self._controller.before.pop(name, None)
        at = time.strftime("%H:%M:%S", time.gmtime())

        def write(state: State) -> None:
            live = state.live(name)
            # Somebody else may have released something meanwhile: then this is past.
            if live is not None and live.proposal.version == left:
                late = f"{why} (at {at} UTC, while the store was away)"
                self._controller.live[name] = state.roll_back(name, to=before, by=by, why=late).id

        await self._controller.ledger.note(Owed(name, f"version {left} was rolled back", write))

    async def set_route(self, name: str, change: RouteChange) -> RouteStatus:
        """Change a route by hand, as `Supervisor.set_route`, and have the history know.

        Where the store is away it is in force all the same, and is written down later. Raises `Conflict` while a
        release is under way, but for the kill switch, which is that of the release then.
        """
        if (trial := self._controller.trials.get(name)) is not None:
            return await self._kill(trial, change)
        status = await self._supervisor.set_route(name, change)
        details = {"revision": status.revisions[-1].revision, "route": msgspec.to_builtins(status.route)}
        # It is in force.
        await self._tell(
            "its route was changed",
            "route",
            name,
            by=change.by or CONTROLLER,
            why=change.why,
            details=details,
        )
        return msgspec.structs.replace(status, note=self._controller.note(name))

    async def _tell(
        self, owed: str, what: Elsewhere, name: str, *, version: str = "", by: str, why: str, details: Details
    ) -> None:
        """Have the history know what has happened; where the store is away later, and then with the time."""
        at, away = time.time(), bool(self._controller.ledger.away_since)

        def write(state: State) -> None:
            nonlocal away
            words = why
            if away or time.time() - at > _LATE_S:
                moment = time.strftime("%H:%M:%S", time.gmtime(at))
                words = f"{why} (at {moment} UTC{', while the store was away' if away else ''})".lstrip()
            # It is tried again where the store is away only.
            away = True
            state.record_change(what, name, version=version, by=by, why=words, details=details)

        # Making the store takes its time.
        await self._controller.ledger.note(Owed(name, owed, write), _LATE_S)

    async def _kill(self, trial: Trial, change: RouteChange) -> RouteStatus:
        """The kill switch of a route that belongs to a release; the next step would undo what is done by hand."""
        name = trial.name
        if change.killed is None or change.route is not None or change.remove:
            raise Conflict(
                f"version {trial.version!r} of {name!r} is being released, and the route is that of the release",
                hint=f"parbake route {name} --kill sends everything to the champion; parbake rollback {name} ends it",
            )
        route = self._supervisor.in_force(name)
        if route is None:
            raise Conflict(
                f"the release of version {trial.version!r} of {name!r} has no route yet",
                hint=f"parbake release {name} shows how it stands; parbake rollback {name} ends it",
            )
        if change.revision not in (None, route.revision):
            raise Conflict(
                f"the route of {name!r} is at revision {route.revision}, not {change.revision}",
                hint=f"parbake route {name} shows it",
            )
        await self._switch(trial, TuningChange({"kill": change.killed}, change.by, change.why))
        return msgspec.structs.replace(await self._supervisor.route(name), note=self._controller.note(name))

    async def tune(self, name: str, change: TuningChange) -> ReleaseStatus:
        """Change parameters while it serves: see `Tuning`. Raises `Conflict`, `SettingsError`, `ModelNotFound`.

        The kill switch takes effect at once, whatever the store does, and is written down as soon as it can be; else
        it raises `StateAway` where the store is away.
        """
        trial = self._controller.trials.get(name)
        if trial is not None and set(change.values) == {"kill"}:
            # Not behind the lock: somebody who has it may wait for the store.
            await self._switch(trial, change)
            return self._status(trial)
        async with self._controller.lock(name):
            self._supervisor.default_entry(name)
            trial = self._controller.trials.get(name)
            if trial is None and set(change.values) - {"hold"}:
                raise Conflict(
                    f"no release of {name!r} is under way", hint="without one only hold can be set"
                )
            by = change.by or CONTROLLER

            def write(state: State) -> Parameters:
                now = state.parameters(name)
                # Another server may try a version that this one does not know of yet.
                under_way = state.releases(name, under_way=True)
                number = under_way[-1].id if under_way else 0
                if trial is not None and number != trial.release.id:
                    raise Conflict(
                        f"the release of version {trial.version!r} of {name!r} was ended by somebody else",
                        hint=f"parbake history {name} shows by whom",
                    )
                values = tuned(now, number, change.values)
                if trial is not None:
                    # What cannot be a margin is refused before it stands in the history.
                    tuning_of(Parameters(name, 0, values), number).margins(trial.judge.margins)
                if values == now.values:
                    return now
                return state.set_parameters(name, values, after=now.version, by=by, why=change.why)

            if trial is not None:
                await self._controller.tune(trial, write, name)
            else:
                await self._controller.ask(write, name)
            log().info("release.tuned", deployment=name, by=by, **change.values)
        return await self.status(name)

    async def _switch(self, trial: Trial, change: TuningChange) -> None:
        """The kill switch: in force first, then written down, some time."""
        name, number, by = trial.name, trial.release.id, change.by or CONTROLLER
        killed = tuning_of(
            Parameters(name, 0, tuned(Parameters(name, 0, {}), number, change.values)), number
        ).kill
        if trial.going_live:
            raise Conflict(
                f"version {trial.version!r} of {name!r} is just going live",
                hint=f"parbake rollback {name} sends everything to the version before",
            )

        def put(state: State) -> None:
            now = state.parameters(name)
            values = tuned(now, number, change.values)
            if values != now.values:
                state.set_parameters(name, values, after=now.version, by=by, why=change.why)

        def write(state: State) -> None:
            if state.release(number).state in OPEN:
                insist(lambda: put(state))

        await self._controller.kill(trial, killed, Owed(name, "the kill switch was used", write))
        if killed:
            log().warning("release.killed", deployment=name, by=by)
        else:
            log().info("release.tuned", deployment=name, by=by, **change.values)

    async def status(self, name: str) -> ReleaseStatus:
        """How the release of a deployment stands. Raises `ModelNotFound`, `Conflict` where there never was one."""
        trial = self._controller.trials.get(name)
        if trial is not None:
            return self._status(trial)
        champion = self._supervisor.default_entry(name)
        ended = self._controller.ended.get(name)
        if ended is not None and self._controller.ledger.owes(name):
            # The store does not know it yet.
            return self._status(ended)
        try:
            last = await self._last(name)
            parameters = await self._controller.ask(lambda state: state.parameters(name))
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
            against=self._controller.before.get(name, "") if last.state == "live" else champion.version,
            tuning=tuning_of(parameters, last.id), note=self._controller.note(name),
        )  # fmt: skip

    async def judge(self, name: str) -> Judge:
        """What the judge of the release under way knows, or that of the last one did. Raises as `status`."""
        trial = self._controller.trials.get(name)
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
        ledger = self._controller.ledger
        # To ask how something stands makes no store.
        there = ledger.is_open or ledger.is_there
        releases = await self._controller.ask(lambda state: state.releases(name)) if there else ()
        if not releases:
            raise Conflict(f"{name!r} was never released", hint=f"parbake deploy {name}@2 BUNDLE")
        return max(releases, key=lambda release: release.id)

    async def _through_the_gate(self, name: str, against: str, wanted: Wanted) -> GateReport:
        supervisor = self._supervisor
        settings = supervisor.deployment_settings(name)
        # First of all: what a gate finds in the bundle of another model, nobody need mend, or let pass.
        if (other := await asyncio.to_thread(_model_in, wanted.bundle)) not in ("", name):
            raise InvalidInput(
                f"the bundle {wanted.bundle} is of another model: {other!r}, and the deployment is {name!r}",
                hint=f"parbake deploy {other}@{wanted.version} releases it as what it is; "
                f"parbake pack --name {name} if it was meant for {name!r}",
            )
        who = wanted.by or CONTROLLER
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
            await self._tell(
                "a version was refused", "release.refused", name, version=wanted.version, by=who, why=wanted.why,
                details={
                    "bundle_digest": report.digest,
                    "bundle": wanted.bundle,
                    "checks": {check.name: check.words for check in report.refused},
                },
            )  # fmt: skip
            raise GateRefused(
                f"version {wanted.version!r} of {name!r} must not take traffic: "
                f"{', '.join(check.name for check in report.refused)} did not pass",
                hint=f"parbake gate {wanted.bundle} --against {against} looks again, and releases nothing",
                report=report,
            )
        return report

    async def _not_registered(self, name: str, version: str, error: ParbakeError) -> ParbakeError:
        """Why the registry has no such version, with what the store of releases knows of it."""
        if not is_number(version):
            return error
        ledger, releases = self._controller.ledger, list[Release]()
        if ledger.is_open or ledger.is_there:
            try:
                releases = list(await self._controller.ask(lambda state: state.releases(name)))
            except ParbakeError:
                # What nobody can look up is not told: it would be "never released".
                return error
        # What never came to answer anybody was not released.
        sources = {
            release.proposal.version: release.proposal.source
            for release in releases
            if release.state not in ("refused", "aborted")
        }
        source = sources.get(version, "")
        if source:
            known = f"version {version} of {name!r} was released from {source}"
        else:
            known = f"version {version} of {name!r} was never released here"
            known += f": {listed(list(sources))}" if sources else ""
        path = "BUNDLE" if source.startswith(REGISTERED) else source or "BUNDLE"
        hint = f"parbake deploy {name}@{version} {path} needs no registry; {error.hint}".rstrip("; ")
        if isinstance(error, MissingExtra):
            return MissingExtra.told(
                f"{known}; what the registry has of it cannot be had: {error.message}", hint=hint
            )
        return VersionNotFound(f"{error.message}; {known}", hint=hint)

    def _trial(self, name: str) -> Trial:
        trial = self._controller.trials.get(name)
        if trial is None:
            self._supervisor.default_entry(name)
            raise Conflict(f"no release of {name!r} is under way", hint=f"parbake history {name}")
        return trial

    def _status(self, trial: Trial, gate: GateReport | None = None, seconds: float = 0.0) -> ReleaseStatus:
        release, proposal = trial.release, trial.release.proposal
        share = release.share
        if (
            proposal.kind == "bandit"
            and (route := self._supervisor.in_force(proposal.deployment)) is not None
        ):
            # It has moved to what was earned.
            share = next((arm.weight for arm in route.arms if arm.version == proposal.version), share)
        answers = proposal.version if release.state == "live" else trial.champion
        return ReleaseStatus(
            proposal.deployment, proposal.version, answers, release.state, proposal.kind, share,
            release.step, proposal.steps, release.changed, trial.verdict, _requests(trial.judge), trial.champion,
            gate, seconds,
            trial.lease is not None, trial.tuning, self._controller.note(proposal.deployment),
        )  # fmt: skip


def _model_in(bundle: str) -> str:
    """The name in a bundle's contract; "" where it cannot be read, which the gate says better."""
    with contextlib.suppress(ParbakeError, OSError):
        return read_bundle(bundle, verify=False).contract.name
    return ""


def _requests(judge: Judge) -> tuple[int, int]:
    return judge.champion.requests, judge.challenger.requests


def _judge_in(release: Release) -> Judge | None:
    """What the judge of a release knew when it was written down last."""
    if not release.judge_state:
        return None
    return msgspec.msgpack.decode(release.judge_state, type=Judge)


def _under_way(release: Release) -> Conflict:
    proposal = release.proposal
    return Conflict(
        f"version {proposal.version!r} of {proposal.deployment!r} is being released since "
        f"{time.strftime('%H:%M:%S', time.gmtime(release.created))} UTC by {release.by}",
        hint=f"parbake release {proposal.deployment} shows it; parbake rollback {proposal.deployment} ends it",
    )
