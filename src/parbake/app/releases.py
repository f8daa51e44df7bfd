"""Releases on a running server: through the gate, beside the champion, under the judge's eyes, and back if need be.

What shall be is in the store of releases; what is, is with the supervisor. `Releases` writes the one and makes the
other follow, so a server that is started again, or killed half-way, goes on where the store says.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from msgspec import Struct

from parbake.app.gate import Asked
from parbake.app.gate import judge as ask_gate
from parbake.app.inventory import keep_waivers
from parbake.app.routes import Observed, RouteChange
from parbake.app.state import STATE_FILE, open_state, state_dir
from parbake.app.supervisor import Arranged, Supervisor
from parbake.errors import Conflict, GateRefused, InvalidInput, ParbakeError, StateAway
from parbake.logs import log
from parbake.release.gate import GateReport, make_waiver
from parbake.release.judge import Decision, Judge, Margins, Verdict
from parbake.release.model import Kind, Proposal, Release, VerdictRecord
from parbake.runtime.observation import Observation, empty
from parbake.serving.route import Arm, Route, Shadow, Watch
from parbake.settings import REGISTERED

if TYPE_CHECKING:
    from parbake.release.model import Lease
    from parbake.release.state import State

_LOOK_S: Final = 1.0
"""How often what a version did is looked at."""
_REMEMBER_S: Final = 5.0
"""How often what the judge knows is written down: who dies loses so much of it at most."""
_LEASE_S: Final = 20.0
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
        if self.waive and not self.why:
            raise ValueError("a waiver needs a why")


class Back(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of ``POST /admin/releases/NAME/rollback`` and ``promote``."""

    to: str = ""
    """Version to go back to; "" for the last good one."""
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


@dataclass(slots=True)
class _Trial:
    """A release under way, as this server sees it."""

    release: Release
    champion: str
    judge: Judge
    began: float
    """By the monotonic clock, less what the judge had seen before."""
    stepped: float
    """When it came to its step, by the monotonic clock."""
    seen: dict[str, tuple[int, Observation]] = field(default_factory=dict)
    """By version: revision of the watch, and the counts at the last look."""
    verdict: Verdict | None = None
    told: Decision | None = None
    """The last decision that the history has."""
    remembered: float = 0.0
    lease: Lease | None = None


class Releases:
    """The releases of one server. The store is opened when it is needed for the first time, or is there already."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._state: State | None = None
        self._trials: dict[str, _Trial] = {}
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._away_since = 0.0
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    async def start(self) -> None:
        """Go on with what the store says of the deployments that are served, if there is a store."""
        settings = self._supervisor.settings
        # Who never released anything pays nothing for it, not even an import.
        if settings.release.store or (state_dir(settings) / STATE_FILE).exists():
            try:
                self._state = await asyncio.to_thread(open_state, settings, create=False)
            except ParbakeError as error:
                # A server serves without it; who wants a release is told then.
                log().error("releases.no_store", error=error.message, hint=error.hint)
            else:
                for name in dict.fromkeys(entry.name for entry in self._supervisor.entries):
                    try:
                        await self._restore(name)
                    except ParbakeError as error:
                        # What the command names is served all the same.
                        log().error("release.not_restored", deployment=name, error=error.message)
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        """Judge no more, and change nothing."""
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Write down what the judges know, and let another controller go on."""
        self.stop()
        for trial in self._trials.values():
            try:
                await self._remember(trial)
                if trial.lease is not None:
                    await self._give_up(trial.lease)
            except ParbakeError as error:
                log().warning("release.not_remembered", error=error.message)
        if self._state is not None:
            await asyncio.to_thread(self._state.close)

    async def _give_up(self, lease: Lease) -> None:
        await self._ask(lambda state: state.give_up(lease))

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
            if any(e.version == wanted.version and e.name == name for e in supervisor.entries):
                raise Conflict(
                    f"{name!r} serves version {wanted.version!r} already",
                    hint=f"parbake rollback {name} --to {wanted.version}, or another number",
                )
            if name in self._trials:
                raise _under_way(self._trials[name].release)
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
            try:
                trial = await self._begin(release)
                if wanted.kind == "plain":
                    await self._finish(trial, by)
                else:
                    trial.release = await self._advance(trial, 0, by, "")
                    await self._route(trial)
            except BaseException as error:
                await self._undo(name, release, error)
                raise
            log().info("release.begun", deployment=name, version=wanted.version, kind=wanted.kind)
            return self._status(trial, report, time.perf_counter() - began)

    async def promote(self, name: str, back: Back) -> ReleaseStatus:
        """Take the next step, whatever the judge says. Raises `Conflict` where no release is under way."""
        async with self._lock:
            trial = self._trial(name)
            await self._step(trial, back.by or _CONTROLLER, back.why or "by hand")
            return self._status(trial)

    async def rollback(self, name: str, back: Back) -> ReleaseStatus:
        """End the release under way, or go back to the version before. Raises `Conflict`, `VersionNotFound`."""
        began = time.perf_counter()
        async with self._lock:
            by = back.by or _CONTROLLER
            trial = self._trials.get(name)
            if trial is not None and back.to in ("", trial.champion):
                await self._roll_back(trial, by, back.why or "by hand")
                return self._status(trial, seconds=time.perf_counter() - began)
            self._supervisor.default_entry(name)
            left = self._supervisor.default_entry(name).version
            release = await self._ask(
                lambda state: state.roll_back(name, to=back.to, by=by, why=back.why or "by hand")
            )
            self._trials.pop(name, None)
            await self._supervisor.arrange(name, await self._with(name, release, keep=left))
            await self._no_route(name)
            log().warning("release.rolled_back", deployment=name, to=release.proposal.version, by=by)
            return ReleaseStatus(
                name, left, release.proposal.version, "rolled_back",
                since=release.changed, seconds=time.perf_counter() - began,
            )  # fmt: skip

    async def status(self, name: str) -> ReleaseStatus:
        """How the release of a deployment stands. Raises `ModelNotFound`, `Conflict` where there never was one."""
        trial = self._trials.get(name)
        if trial is not None:
            return self._status(trial)
        champion = self._supervisor.default_entry(name)
        releases = await self._ask(lambda state: state.releases(name))
        if not releases:
            raise Conflict(f"{name!r} was never released", hint=f"parbake deploy {name}@2 BUNDLE")
        last = max(releases, key=lambda release: release.id)
        return ReleaseStatus(
            name, last.proposal.version, champion.version, last.state, last.proposal.kind, last.share,
            last.step, last.proposal.steps, last.changed,
        )  # fmt: skip

    # What happens by itself ------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for name in list(self._trials):
                try:
                    async with self._lock:
                        if (trial := self._trials.get(name)) is not None:
                            await self._look(trial)
                    self._away_since = 0.0
                except StateAway as error:
                    # Nothing is promoted without the store; what answers goes on.
                    if not self._away_since:
                        self._away_since = time.time()
                        log().error("releases.store_away", error=error.message)
                except ParbakeError as error:
                    log().error("release.not_followed", deployment=name, error=error.message)
                except Exception:
                    log().exception("release.not_followed", deployment=name)

    async def _look(self, trial: _Trial) -> None:
        """One look of the judge, and what follows from it."""
        name = trial.release.proposal.deployment
        status = await self._supervisor.route(name)
        champion, challenger = self._increases(trial, status.observed)
        now = time.monotonic()
        trial.judge, trial.verdict = trial.judge.look(champion, challenger, now - trial.began)
        verdict = trial.verdict
        if verdict.decision is Decision.ROLL_BACK:
            await self._roll_back(trial, _CONTROLLER, verdict.reason)
            return
        lease = await self._ask(lambda state: state.lease(f"release:{name}", self._holder, _LEASE_S))
        if lease is None:
            # Another server judges this release, with what its callers see; this one follows.
            await self._follow(trial)
            return
        trial.lease = lease
        if verdict.decision is not trial.told:
            await self._tell(trial, verdict)
        due = now - trial.stepped >= trial.release.proposal.every_s
        if (
            verdict.decision is Decision.PROMOTE
            and due
            and trial.release.proposal.kind in ("canary", "shadow")
        ):
            await self._step(trial, _CONTROLLER, verdict.reason)
        elif now - trial.remembered >= _REMEMBER_S:
            await self._remember(trial)

    async def _follow(self, trial: _Trial) -> None:
        """Do what another controller has decided."""
        proposal = trial.release.proposal
        found = await self._ask(lambda state: state.release(trial.release.id))
        if found.revision == trial.release.revision:
            return
        moved = (found.state, found.step) != (trial.release.state, trial.release.step)
        trial.release = found
        if not moved:
            return
        if found.state == "running":
            trial.stepped = time.monotonic()
            await self._route(trial)
        else:
            del self._trials[proposal.deployment]
            await self._restore(proposal.deployment)

    def _increases(self, trial: _Trial, observed: Sequence[Observed]) -> tuple[Observation, Observation]:
        """What champion and challenger did since the last look."""
        shadowing = trial.release.share == 0
        found: list[Observation] = []
        for version, role in (
            (trial.champion, "answers"),
            (trial.release.proposal.version, "shadow" if shadowing else "answers"),
        ):
            now = next((o for o in observed if (o.version, o.role) == (version, role)), None)
            place = f"{version}:{role}"
            if now is None:
                found.append(empty())
                continue
            since, before = trial.seen.get(place, (now.since, empty()))
            increase = now.observation.minus(before if since == now.since else empty())
            trial.seen[place] = now.since, now.observation
            # A front was started again and counts from 0: that while is lost for both.
            found.append(empty() if increase.fault() else increase)
        return found[0], found[1]

    # Steps -----------------------------------------------------------------------------------------

    async def _begin(self, release: Release) -> _Trial:
        """Load the version beside the champion, without any traffic."""
        proposal = release.proposal
        champion = self._supervisor.default_entry(proposal.deployment).version
        # Before it is there: without a route the last version of a name answers.
        await self._supervisor.arrange(
            proposal.deployment, await self._with(proposal.deployment, release, keep=champion)
        )
        kept = proposal.margins
        now = time.monotonic()
        if release.judge_state:
            judge = msgspec.msgpack.decode(release.judge_state, type=Judge)
        else:
            judge = Judge.start(msgspec.convert(kept.get("margins", {}), Margins))
        trial = _Trial(release, champion, judge, now - judge.seconds, now)
        self._trials[proposal.deployment] = trial
        return trial

    async def _step(self, trial: _Trial, by: str, why: str) -> None:
        """One step further; behind the last one it is live."""
        step = trial.release.step + 1
        steps = trial.release.proposal.steps
        if step >= len(steps) or steps[step] >= 1:
            await self._finish(trial, by, why)
            return
        trial.release = await self._advance(trial, step, by, why)
        trial.judge = trial.judge.next_step()
        trial.stepped = time.monotonic()
        await self._route(trial)
        log().info(
            "release.promoted", deployment=trial.release.proposal.deployment, share=steps[step], why=why
        )

    async def _finish(self, trial: _Trial, by: str, why: str = "") -> None:
        """Everything to the new version; the one before stays loaded, to go back to at once."""
        proposal = trial.release.proposal
        name = proposal.deployment
        release = trial.release
        challenger, champion = await self._arranged(release), self._supervisor.arranged(name, trial.champion)
        # The store first: while it is away nothing is promoted, and who dies behind this starts with what it says.
        trial.release = await self._ask(
            lambda state: state.finish(release, "live", by=by, why=why, fence=trial.lease)
        )
        await self._supervisor.arrange(name, (champion, challenger))
        await self._no_route(name)
        self._trials.pop(name, None)
        log().info("release.live", deployment=name, version=proposal.version, why=why)

    async def _roll_back(self, trial: _Trial, by: str, why: str) -> None:
        """Everything to the champion, at once; then it is written down."""
        proposal = trial.release.proposal
        name, release = proposal.deployment, trial.release
        await self._no_route(name)
        await self._supervisor.arrange(name, (self._supervisor.arranged(name, trial.champion),))
        log().warning("release.rolled_back", deployment=name, version=proposal.version, why=why, by=by)
        if trial.verdict is not None and by == _CONTROLLER:
            await self._tell(trial, trial.verdict)
        trial.release = await self._ask(lambda state: state.finish(release, "rolled_back", by=by, why=why))
        self._trials.pop(name, None)

    async def _undo(self, name: str, release: Release, error: BaseException) -> None:
        """A release could not begin: nothing of it stays."""
        trial = self._trials.pop(name, None)
        champion = trial.champion if trial is not None else self._supervisor.default_entry(name).version
        why = error.message if isinstance(error, ParbakeError) else str(error)
        try:
            await self._no_route(name)
            await self._supervisor.arrange(name, (self._supervisor.arranged(name, champion),))
            now = await self._ask(lambda state: state.release(release.id))
            if now.state in ("pending", "running"):
                await self._ask(lambda state: state.finish(now, "aborted", by=_CONTROLLER, why=why))
        except ParbakeError as other:
            log().error("release.not_undone", deployment=name, error=other.message)

    async def _route(self, trial: _Trial) -> None:
        """Put the share of the step in force."""
        release, proposal = trial.release, trial.release.proposal
        share = release.share
        watch = msgspec.convert(proposal.margins.get("watch", {}), Watch)
        arms = (Arm(trial.champion, 1.0 - share), Arm(proposal.version, share))
        route = Route(
            proposal.deployment,
            trial.champion,
            arms if share else (Arm(trial.champion, 1.0),),
            shadows=() if share else (Shadow(proposal.version),),
            kind=proposal.kind if proposal.kind in ("ab", "bandit") else "canary",
            watch=watch,
        )
        status = await self._supervisor.set_route(proposal.deployment, RouteChange(route=route))
        in_force = status.route
        if in_force is not None and in_force.watch is not None and trial.judge.bins is None:
            trial.judge = msgspec.structs.replace(trial.judge, bins=in_force.watch.bins)

    async def _no_route(self, name: str) -> None:
        """Without a route the last version of a name answers."""
        if self._supervisor.has_route(name):
            await self._supervisor.set_route(name, RouteChange(remove=True))

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

    async def _with(self, name: str, release: Release, *, keep: str) -> tuple[Arranged, ...]:
        """A version and the one to keep: who answers comes last."""
        version = await self._arranged(release)
        kept = self._supervisor.arranged(name, keep)
        return (version, kept) if release.state in ("pending", "running") else (kept, version)

    # The store -------------------------------------------------------------------------------------

    async def _restore(self, name: str) -> None:
        """What the store says of a deployment, where what is served is known to it."""
        releases = await self._ask(lambda state: state.releases(name))
        entry = self._supervisor.default_entry(name)
        if not any(r.proposal.bundle_digest == entry.digest for r in releases):
            if releases:
                log().warning(
                    "release.unknown_bundle",
                    deployment=name,
                    hint="what is served was never released; it is served all the same",
                )
            return
        try:
            live = await self._ask(lambda state: state.live(name))
            served = (entry.digest, entry.version)
            if live is not None and (live.proposal.bundle_digest, live.proposal.version) != served:
                await self._supervisor.arrange(name, (await self._arranged(live),))
            await self._no_route(name)
            open_ = [r for r in releases if r.state in ("pending", "running")]
            if open_:
                trial = await self._begin(open_[-1])
                if trial.release.state == "running":
                    await self._route(trial)
                log().info("release.resumed", deployment=name, version=trial.release.proposal.version)
        except ParbakeError as error:
            log().error("release.not_restored", deployment=name, error=error.message)

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
            state.finish(release, "live", by=_CONTROLLER, why=why)

        await self._ask(enter)

    async def _advance(self, trial: _Trial, step: int, by: str, why: str) -> Release:
        release = trial.release
        known = msgspec.msgpack.encode(trial.judge)
        return await self._ask(
            lambda state: state.advance(release, step, by=by, why=why, judge_state=known, fence=trial.lease)
        )

    async def _remember(self, trial: _Trial) -> None:
        release, known = trial.release, msgspec.msgpack.encode(trial.judge)
        trial.release = await self._ask(lambda state: state.remember(release, known))
        trial.remembered = time.monotonic()

    async def _tell(self, trial: _Trial, verdict: Verdict) -> None:
        """Have the history know what the judge says now."""
        release = trial.release
        record = VerdictRecord(
            verdict.decision.value,
            verdict.reason,
            tuple(msgspec.to_builtins(one) for one in verdict.evidence),
        )
        await self._ask(lambda state: state.record_verdict(release, record, by=_CONTROLLER))
        trial.told = verdict.decision

    async def _ask(self, verb: Callable[[State], _T]) -> _T:
        """One verb of the store, in a thread: it may wait. Raises `StateAway` and what the verb raises."""
        if self._state is None:
            self._state = await asyncio.to_thread(open_state, self._supervisor.settings)
        return await asyncio.to_thread(verb, self._state)

    async def _through_the_gate(self, name: str, against: str, wanted: Wanted) -> GateReport:
        supervisor = self._supervisor
        settings = supervisor.deployment_settings(name)
        who = wanted.by or _CONTROLLER
        asked = Asked(
            Path(wanted.bundle),
            Path(against),
            Path(wanted.table) if wanted.table else None,
            needs_table=settings.mode == "static",
            deadline_ms=settings.deadline_ms,
            max_bytes=settings.max_runner_bytes or None,
            breaking=wanted.breaking,
            waivers=tuple(make_waiver(check, who, wanted.why) for check in dict.fromkeys(wanted.waive)),
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

    def _trial(self, name: str) -> _Trial:
        trial = self._trials.get(name)
        if trial is None:
            self._supervisor.default_entry(name)
            raise Conflict(f"no release of {name!r} is under way", hint=f"parbake history {name}")
        return trial

    def _status(self, trial: _Trial, gate: GateReport | None = None, seconds: float = 0.0) -> ReleaseStatus:
        release, proposal = trial.release, trial.release.proposal
        return ReleaseStatus(
            proposal.deployment, proposal.version, trial.champion, release.state, proposal.kind, release.share,
            release.step, proposal.steps, release.changed, trial.verdict,
            (trial.judge.champion.requests, trial.judge.challenger.requests), gate, seconds,
        )  # fmt: skip


def _under_way(release: Release) -> Conflict:
    proposal = release.proposal
    return Conflict(
        f"version {proposal.version!r} of {proposal.deployment!r} is being released since "
        f"{time.strftime('%H:%M:%S', time.gmtime(release.created))} UTC by {release.by}",
        hint=f"parbake release {proposal.deployment} shows it; parbake rollback {proposal.deployment} ends it",
    )
