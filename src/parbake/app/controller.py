"""What makes a server follow its store of releases, and the releases under way their judges.

What shall be is in the store of releases; what is, is with the supervisor. The controller writes the one and makes the
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
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from parbake.app.ledger import Ledger, Owed
from parbake.app.routes import RouteChange
from parbake.app.supervisor import Arranged, Supervisor
from parbake.app.trial import Trial, record_of, tuning_of
from parbake.contract.bundle import read_bundle
from parbake.errors import Conflict, LeaseLost, ParbakeError, StateAway
from parbake.logs import log
from parbake.release.judge import Decision, Judge, Verdict
from parbake.release.model import OPEN, Parameters, Proposal, Release
from parbake.settings import REGISTERED

if TYPE_CHECKING:
    from parbake.release.state import State

_LOOK_S: Final = 1.0
"""How often what a version did is looked at."""
_REMEMBER_S: Final = 5.0
"""How often what the judge knows is written down: who dies loses so much of it at most."""
_CATCH_UP_S: Final = 2.0
"""How often, about, one looks whether another server has begun or ended a release."""
_SHARE_S: Final = 2.0
"""How often servers tell each other what the versions of a bandit have earned."""
_LONGEST_PAUSE_S: Final = 60.0
CONTROLLER: Final = "parbake"
"""Who did it, in the history, where nobody told it to."""

_STALE_S: Final = 10.0
"""After this long, what should take a moment has been left lying."""
_SERVED: Final = "it was served before the first release"

_T = TypeVar("_T")


class Controller:
    """The releases of one server. The store is opened when it is needed for the first time, or is there already.

    Two loops run. One looks at what versions do and takes a bad one out of the fronts; it never waits for the store.
    The other one asks the store: who judges, what others have done, the next step.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.ledger = Ledger(supervisor.settings)
        self.trials: dict[str, Trial] = {}
        self.before: dict[str, str] = {}
        """By deployment: the version that was live before and stays loaded, to go back to at once."""
        self.ended: dict[str, Trial] = {}
        """By deployment: what was rolled back here last, for who asks while the store is away."""
        self.live: dict[str, int] = {}
        """By deployment: the release that was live when the store was read last."""
        self._read_to = -1
        """The event up to which others' changes were taken in."""
        self._late: dict[str, tuple[float, float]] = {}
        """By deployment that could not follow: seconds to the next try, and when that is, by the monotonic clock."""
        self._said: dict[str, str] = {}
        """What went wrong with what and was logged, so that it is not logged each second."""
        self._tasks: list[asyncio.Task[None]] = []
        self._locks: dict[str, asyncio.Lock] = {}
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    async def start(self) -> None:
        """Go on with what the store says of the deployments that are served, if there is a store."""
        if self.ledger.is_there:
            try:
                await self.ledger.open(create=False)
            except ParbakeError as error:
                # A server serves without it; who wants a release is told then.
                log().error("releases.no_store", error=error.message, hint=error.hint)
            else:
                for name in self._names():
                    try:
                        await self._restore(name)
                    except Exception as error:
                        # What the command names is served all the same.
                        log().error("release.not_restored", deployment=name, error=words_of(error))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._watch()), loop.create_task(self._keep_up())]

    def stop(self) -> None:
        """Judge no more, and change nothing."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Write down what the judges know, and let another controller go on."""
        self.stop()
        for trial in self.trials.values():
            if (lease := trial.lease) is None:
                continue
            try:
                await self._remember(trial)
                await self.ask(lambda state, lease=lease: state.give_up(lease))  # type: ignore[misc]  # it is bound
            except ParbakeError as error:
                log().warning("release.not_remembered", error=error.message)
        await self.ledger.close()

    def lock(self, name: str) -> asyncio.Lock:
        """Held by whoever changes the release of a deployment."""
        return self._locks.setdefault(name, asyncio.Lock())

    def alias(self, name: str) -> str:
        """The alias that a deployment follows, as in ``models:/eta@champion``; "" for none."""
        reference = self.supervisor.followed(name)
        return "" if reference.rpartition("@")[2].isdigit() else reference

    def _names(self) -> list[str]:
        return list(dict.fromkeys(entry.name for entry in self.supervisor.entries))

    # What happens by itself ------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Look at what versions do, and take a bad one out at once; without the store."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for trial in list(self.trials.values()):
                await self._safely("look", trial.name, partial(self._look, trial))

    async def _look(self, trial: Trial) -> None:
        # Two judges would be wrong twice as often. While the store is away each server has to look after itself.
        judges = trial.lease is not None or self.ledger.away_since
        if trial.over or trial.release.state != "running" or trial.tuning.kill or not judges:
            return
        if trial.routed != trial.route():
            # What is counted belongs to the step before.
            return
        status = await self.supervisor.route(trial.name)
        verdict = trial.look(status.observed)
        if verdict.decision is Decision.ROLL_BACK and not trial.over:
            await self.roll_back(trial, CONTROLLER, verdict.reason, verdict)

    async def _keep_up(self) -> None:
        """Ask the store what others have done, and take the steps that the judge allows."""
        due = 0.0
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._safely("write", "", self.ledger.pay)
            for trial in list(self.trials.values()):
                await self._safely("tend", trial.name, partial(self._tend, trial))
            if time.monotonic() >= due:
                # With jitter: servers that were started together need not all ask together.
                await self._safely("catch up", "", self._catch_up)
                due = time.monotonic() + _CATCH_UP_S * random.uniform(0.5, 1.5)  # noqa: S311

    async def _safely(self, what: str, name: str, do: Callable[[], Awaitable[None]]) -> bool:
        """Do something; what goes wrong is logged once until it goes right. Whether it went right."""
        try:
            await do()
        except StateAway:
            # The ledger has said so. Nothing is promoted without the store; what answers goes on.
            return False
        except ParbakeError as error:
            if self._said.get(f"{what} {name}") != error.message:
                self._said[f"{what} {name}"] = error.message
                log().error("release.not_followed", deployment=name, error=error.message)
        except Exception:
            log().exception("release.not_followed", deployment=name)
        else:
            self._said.pop(f"{what} {name}", None)
            return True
        return False

    async def _tend(self, trial: Trial) -> None:
        """What a release under way needs of the store: who judges, what others did, the next step."""
        if (lock := self.lock(trial.name)).locked():
            # Somebody changes it: the others need not wait for that.
            return
        async with lock:
            if trial.over:
                return
            try:
                await self._carry_on(trial)
            except LeaseLost:
                trial.lose_lease()
                raise

    async def _carry_on(self, trial: Trial) -> None:
        """Follow what others have done, and take the next step if the judge allows it."""
        if not await self._hold(trial) or not await self.refresh(trial):
            return
        if trial.release.state == "running" and trial.routed != trial.route():
            await self.route(trial)
        await self.tune(trial, lambda state: state.parameters(trial.name))
        if trial.release.proposal.kind == "bandit" and time.monotonic() - trial.shared >= _SHARE_S:
            await self._share_rewards(trial)
        verdict = trial.verdict
        if self.trials.get(trial.name) is not trial or trial.lease is None or verdict is None:
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
            await self.step(trial, CONTROLLER, verdict.reason)
        elif now - trial.remembered >= _REMEMBER_S:
            await self._remember(trial)

    async def _share_rewards(self, trial: Trial) -> None:
        """Give a bandit's versions their weights by what labels told all servers, so that keys stay where they are."""
        release, mine = trial.release, self.supervisor.rewards(trial.name)
        others = await self.ask(lambda state: state.share_rewards(release, self._holder, mine))
        trial.shared = time.monotonic()
        if not trial.over:
            self.supervisor.earned_elsewhere[trial.name] = others

    async def _hold(self, trial: Trial) -> bool:
        """Take or renew the lease of a release: who has it judges. Whether the release is still under way."""
        lasts = self.supervisor.settings.release.lease_s
        if time.monotonic() - trial.leased < lasts / 4:
            return True
        asked = time.monotonic()
        lease = await self.ask(lambda state: state.lease(f"release:{trial.name}", self._holder, lasts))
        trial.leased = asked
        if lease is not None and (trial.lease is None or trial.lease.token != lease.token):
            # Whoever judged before has written down what it knew: taken up as one that follows does.
            trial.lease = None
            if not await self.refresh(trial):
                return False
            log().info("release.judged_here", deployment=trial.name, version=trial.version)
        trial.lease = lease
        return True

    async def refresh(self, trial: Trial) -> bool:
        """Take in what others have done with a release; whether it is still under way."""
        found = await self.ask(lambda state: state.release(trial.release.id))
        if trial.over:
            return False
        before = trial.release
        if found.revision == before.revision:
            return True
        if found.state not in OPEN:
            # Where this fails it is tried again: until then it is a trial.
            await self._settle(trial.name)
            trial.over = True
            if self.trials.get(trial.name) is trial:
                del self.trials[trial.name]
            log().info("release.followed", deployment=trial.name, version=trial.version, state=found.state)
            return False
        if trial.lease is None:
            trial.take_up(found)
        elif found.step != before.step:
            trial.on_step(found, trial.judge.next_step())
        trial.release = found
        if (found.state, found.step) != (before.state, before.step):
            await self.route(trial)
        return True

    async def _catch_up(self) -> None:
        """Take part in what another server with the same store has begun, or ended."""
        if not self.ledger.is_open:
            if not self.ledger.is_there:
                return
            await self.ledger.open(create=False)
        newest = await self.ask(lambda state: state.history(limit=1))
        number = newest[-1].id if newest else 0
        new, self._read_to = number != self._read_to, number
        for name in self._names():
            pause_s, due = self._late.get(name, (0.0, 0.0))
            if time.monotonic() < due or not (new or name in self._late):
                continue
            if self.lock(name).locked() or name in self.trials or self.ledger.owes(name):
                # It is looked at again when that is over, whether anything happens by then or not.
                self._late[name] = 0.0, 0.0
                continue
            async with self.lock(name):
                joined = await self._safely("join", name, partial(self.join, name))
            if joined:
                self._late.pop(name, None)
            else:
                # A bundle that cannot be loaded is tried again, but not all the time.
                pause_s = min(max(2 * pause_s, _CATCH_UP_S), _LONGEST_PAUSE_S)
                self._late[name] = pause_s, time.monotonic() + pause_s

    async def join(self, name: str) -> None:
        """Serve what the store says of a deployment, and take part in its release. Hold its lock."""
        if self.alias(name):
            return
        live = await self.ask(lambda state: state.live(name))
        if live is None or not await self._knows(name):
            return
        if live.id != self.live.get(name):
            await self._settle(name)
        entry = self.supervisor.default_entry(name)
        under_way = await self.ask(lambda state: state.releases(name, under_way=True))
        # Behind a version that somebody has put under this server since, it would be compared with another one.
        if under_way and entry.digest == live.proposal.bundle_digest:
            await self._resume(name, under_way[-1])

    # Steps -----------------------------------------------------------------------------------------

    async def begin(self, trial: Trial) -> None:
        """Load the version beside the champion, without any traffic."""
        name = trial.name
        # Before it is there: without a route the last version of a name answers.
        challenger = await self.arranged(trial.release)
        await self.supervisor.arrange(name, (challenger, self.supervisor.arranged(name, trial.champion)))
        self.before.pop(name, None)
        self.ended.pop(name, None)
        self.trials[name] = trial

    async def step(self, trial: Trial, by: str, why: str) -> None:
        """One step further; behind the last one it is live."""
        step = trial.release.step + 1
        steps = trial.release.proposal.steps
        if step >= len(steps) or steps[step] >= 1:
            await self.finish(trial, by, why)
            return
        await self.advance(trial, step, trial.judge.next_step(), by, why)
        await self.route(trial)
        log().info("release.promoted", deployment=trial.name, share=steps[step], why=why)

    async def finish(self, trial: Trial, by: str, why: str = "") -> None:
        """Everything to the new version; the one before stays loaded, to go back to at once."""
        trial.going_live = True
        try:
            await self._finish(trial, by, why)
        finally:
            trial.going_live = False

    async def _finish(self, trial: Trial, by: str, why: str) -> None:
        name, release, fence = trial.name, trial.release, trial.lease
        challenger, champion = await self.arranged(release), self.supervisor.arranged(name, trial.champion)
        try:
            # It is loaded; but a front that is started again has to find it.
            await asyncio.to_thread(_find, challenger.bundle, release.proposal.bundle_digest)
        except ParbakeError as error:
            await self._not_live(trial, error)
            raise
        if trial.judge.challenger.requests:
            release = await self.ask(lambda state: state.remember(release, _encoded(trial.judge)))
        # The store first: while it is away nothing is promoted, and who dies behind this starts with what it says.
        live = await self.ask(lambda state: state.finish(release, "live", by=by, why=why, fence=fence), name)
        if trial.over:
            # It was rolled back just then; that is written down behind this.
            return
        try:
            await self.supervisor.arrange(name, (champion, challenger))
            await self.no_route(name)
            if trial.over:
                # The same, a moment later.
                await self.supervisor.arrange(name, (champion,))
                return
        except BaseException as error:
            # Store and fronts must not say different things.
            await self._not_live(trial, error)
            raise
        trial.release, trial.over = live, True
        self.trials.pop(name, None)
        self.ended.pop(name, None)
        self.before[name], self.live[name] = trial.champion, live.id
        log().info("release.live", deployment=name, version=trial.version, why=why)

    async def _not_live(self, trial: Trial, error: BaseException) -> None:
        if not trial.over:
            await self.roll_back(trial, CONTROLLER, f"it could not go live: {words_of(error)}")

    async def roll_back(self, trial: Trial, by: str, why: str, verdict: Verdict | None = None) -> None:
        """Everything to the champion, at once; then it is written down, when the store is there."""
        trial.over = True
        name = trial.name
        champion = (self.supervisor.arranged(name, trial.champion),)
        try:
            await self.no_route(name)
            try:
                await self.supervisor.arrange(name, champion)
            except Conflict:
                # A route was just being put in force.
                await self.no_route(name)
                await self.supervisor.arrange(name, champion)
        except BaseException:
            trial.over = False
            raise
        log().warning("release.rolled_back", deployment=name, version=trial.version, why=why, by=by)
        if self.trials.get(name) is trial:
            del self.trials[name]
        self.ended[name] = trial
        ended = "aborted" if trial.release.state == "pending" else "rolled_back"
        trial.release = msgspec.structs.replace(trial.release, state=ended, changed=time.time())
        what = f"version {trial.version} was rolled back"
        await self.ledger.note(Owed(name, what, trial.ended(by, why, verdict)))

    async def _settle(self, name: str) -> None:
        """Serve what the store says is live; the version that answered until now stays beside it."""
        live = await self.ask(lambda state: state.live(name))
        if live is None:
            return
        entry, version = self.supervisor.default_entry(name), live.proposal.version
        arranged = await self.arranged(live)
        others = [e.version for e in self.supervisor.entries if e.name == name and e.version != version]
        kept = tuple(self.supervisor.arranged(name, other) for other in dict.fromkeys(others))
        # All of them until there is no route that names them.
        await self.supervisor.arrange(name, (*kept, arranged))
        await self.no_route(name)
        superseded = await self.ask(lambda state: state.last_good(name))
        before = superseded.proposal.version if superseded is not None else ""
        stays = tuple(one for one in kept if one.version in (before, entry.version))
        if stays != kept:
            await self.supervisor.arrange(name, (*stays, arranged))
        self.live[name] = live.id
        self.before.pop(name, None)
        self.ended.pop(name, None)
        if before and before != version and any(one.version == before for one in stays):
            self.before[name] = before

    async def _resume(self, name: str, release: Release) -> None:
        """Go on with a release that is under way in the store."""
        entry, proposal = self.supervisor.default_entry(name), release.proposal
        if (proposal.bundle_digest, proposal.version) == (entry.digest, entry.version):
            if time.time() - release.created > _STALE_S:
                # Whoever wrote down what was served died in the middle of it.
                await self.ask(lambda state: state.finish(release, "live", by=CONTROLLER, why=_SERVED))
            return
        trial = Trial.of(release, entry.version)
        parameters = await self.ask(lambda state: state.parameters(name))
        trial.tune(tuning_of(parameters, release.id), parameters.version)
        await self.begin(trial)
        if release.state == "running":
            await self.route(trial)
        log().info("release.resumed", deployment=name, version=trial.version)

    async def route(self, trial: Trial) -> None:
        """Put the share of the step in force."""
        if trial.over:
            return
        wanted = put = trial.route()
        # Nothing is waited for in between: of two changes the later one is in force.
        now = self.supervisor.in_force(trial.name) if wanted.kind == "bandit" else None
        if now is not None and now.versions == wanted.versions:
            # It goes on with the weights that it has learned.
            put = msgspec.structs.replace(wanted, arms=now.arms)
        status = await self.supervisor.set_route(trial.name, RouteChange(route=put))
        trial.routed = wanted
        in_force = status.route
        if in_force is not None and in_force.watch is not None and trial.judge.bins is None:
            trial.judge = msgspec.structs.replace(trial.judge, bins=in_force.watch.bins)

    async def no_route(self, name: str) -> None:
        """Without a route the last version of a name answers."""
        self.supervisor.earned_elsewhere.pop(name, None)
        if self.supervisor.has_route(name):
            await self.supervisor.set_route(name, RouteChange(remove=True))

    async def tune(self, trial: Trial, verb: Callable[[State], Parameters], about: str = "") -> None:
        """Follow the parameters that a verb reads, or changes, while the release is under way."""
        known = trial.tuning
        parameters = await self.ask(verb, about)
        if parameters.version == trial.tuned:
            return
        if trial.tuning is not known or self.ledger.owes(trial.name):
            # The kill switch was used here and is still to be written down: they are from before. Next time.
            return
        tuning = tuning_of(parameters, trial.release.id)
        if trial.tune(tuning, parameters.version) and trial.release.state == "running":
            await self.route(trial)

    async def kill(self, trial: Trial, killed: bool, owed: Owed) -> None:
        """Send everything to the champion, or no longer; then it is written down, when the store is there."""
        trial.tuning = msgspec.structs.replace(trial.tuning, kill=killed)
        # Before anything is waited for: what others have set must not undo it.
        self.ledger.owe(owed)
        if trial.release.state == "running":
            await self.route(trial)
        await self.ledger.hurry()

    async def arranged(self, release: Release) -> Arranged:
        """A release as the supervisor serves it, its bundle at hand. Raises what asking for it raises."""
        proposal = release.proposal
        for entry in self.supervisor.entries:
            if (entry.name, entry.version, entry.digest) == (
                proposal.deployment,
                proposal.version,
                proposal.bundle_digest,
            ) and entry.table == proposal.table:
                # It is loaded: neither registry nor store need be there.
                return self.supervisor.arranged(entry.name, entry.version)
        waivers = await self.ask(lambda state: state.waivers(proposal.deployment, proposal.version))
        waived = tuple(dict.fromkeys(waiver.check for waiver in waivers))
        bundle = proposal.source
        if bundle.startswith(REGISTERED):
            # By its number: an alias may mean something else by now.
            bundle = (
                await self.supervisor.fetched(f"{REGISTERED}{proposal.deployment}@{proposal.version}")
            ).path
        return Arranged(proposal.version, bundle, proposal.table, waived)

    # The store -------------------------------------------------------------------------------------

    async def _restore(self, name: str) -> None:
        """What the store says of a deployment, where what is served is known to it."""
        if self.alias(name) or not await self._knows(name):
            return
        try:
            live = await self.ask(lambda state: state.live(name))
            entry = self.supervisor.default_entry(name)
            served = (entry.digest, entry.version)
            if live is not None and (live.proposal.bundle_digest, live.proposal.version) != served:
                await self.supervisor.arrange(name, (await self.arranged(live),))
            if live is not None:
                self.live[name] = live.id
            await self.no_route(name)
            if under_way := await self.ask(lambda state: state.releases(name, under_way=True)):
                await self._resume(name, under_way[-1])
        except ParbakeError as error:
            log().error("release.not_restored", deployment=name, error=error.message)

    async def _knows(self, name: str) -> bool:
        """Whether what is served was ever released; who serves something else is left alone."""
        entry = self.supervisor.default_entry(name)
        releases = await self.ask(lambda state: state.releases(name))
        known = any(release.proposal.bundle_digest == entry.digest for release in releases)
        if releases and not known and self._said.get(f"knows {name}") != entry.digest:
            self._said[f"knows {name}"] = entry.digest
            log().warning(
                "release.unknown_bundle",
                deployment=name,
                hint="what is served was never released; it is served all the same",
            )
        return known

    async def own(self, name: str) -> None:
        """Have the store know what is served now: there has to be something to go back to."""
        live = await self.ask(lambda state: state.live(name))
        entry = self.supervisor.default_entry(name)
        if live is not None and live.proposal.bundle_digest == entry.digest:
            return
        proposal = Proposal(name, entry.version, entry.digest, source=entry.bundle, table=entry.table)
        why = _SERVED
        if live is not None:
            why = "it was put under the server by reload"

        def enter(state: State) -> None:
            begun = [
                release
                for release in state.releases(name, under_way=True)
                if release.state == "pending"
                and (release.proposal.version, release.proposal.bundle_digest)
                == (entry.version, entry.digest)
            ]
            # One of these: somebody has died between the two.
            release = begun[0] if begun else state.begin_release(proposal, by=CONTROLLER, why=why)
            self.live[name] = state.finish(release, "live", by=CONTROLLER, why=why).id

        await self.ask(enter)

    async def advance(self, trial: Trial, step: int, judge: Judge, by: str, why: str) -> None:
        """Write down that a release is on a step, with what its judge begins with."""
        release, known, fence = trial.release, _encoded(judge), trial.lease
        after = await self.ask(
            lambda state: state.advance(release, step, by=by, why=why, judge_state=known, fence=fence),
            trial.name,
        )
        if not trial.over:
            trial.on_step(after, judge)

    async def _remember(self, trial: Trial) -> None:
        release, known, fence = trial.release, _encoded(trial.judge), trial.lease
        after = await self.ask(lambda state: state.remember(release, known, fence=fence))
        if not trial.over:
            trial.release = after
        trial.remembered = time.monotonic()

    async def _tell(self, trial: Trial, verdict: Verdict) -> None:
        """Have the history know what the judge says now."""
        release, fence = trial.release, trial.lease
        record = record_of(verdict)
        await self.ask(lambda state: state.record_verdict(release, record, by=CONTROLLER, fence=fence))
        trial.told = verdict.decision

    async def ask(self, verb: Callable[[State], _T], about: str = "") -> _T:
        """One verb of the store: see `Ledger.ask`."""
        return await self.ledger.ask(verb, about)

    def note(self, name: str) -> str:
        """What is not as it should be with the store, for whoever asks about a deployment."""
        away, owed = self.ledger.away_since, self.ledger.owes(name)
        words = []
        if away:
            words.append(
                f"the store of releases is away since {time.strftime('%H:%M:%S', time.gmtime(away))} UTC"
            )
        if owed:
            words.append(
                f"what has changed {'will be written down when it is back' if away else 'is being written'}"
            )
        if name in self.ledger.lost:
            words.append(f"what was changed last does not stand in the history: {self.ledger.lost[name]}")
        return "; ".join(words)


def _encoded(judge: Judge) -> bytes:
    return msgspec.msgpack.encode(judge)


def _find(bundle: str, digest: str) -> None:
    """Raises `BundleError` where a bundle is not there or not whole, `Conflict` where it is another one."""
    if read_bundle(bundle).digest != digest:
        raise Conflict(
            f"the bundle at {bundle} is not the one that was deployed",
            hint="pack each version into a folder of its own",
        )


def words_of(error: BaseException) -> str:
    """What went wrong, for the history."""
    return error.message if isinstance(error, ParbakeError) else str(error) or type(error).__name__
