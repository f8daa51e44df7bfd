"""A release under way as one server sees it: what it counts, what the judge makes of it, which route it takes.

Values and what follows from them; `parbake.app.controller` does what has to be done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from parbake.app.routes import Observed
from parbake.errors import Conflict, SettingsError
from parbake.names import did_you_mean
from parbake.release.judge import Decision, Judge, Margins, Verdict
from parbake.release.model import OPEN, Release, VerdictRecord
from parbake.runtime.observation import Observation, empty
from parbake.serving.route import Arm, Route, Shadow, Watch

if TYPE_CHECKING:
    from parbake.release.model import Lease, Parameters
    from parbake.release.state import State


class Tuning(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What can be changed while a release is under way; what is None stays as the release began with."""

    hold: bool = False
    """Promote nothing by itself; what is worse is rolled back all the same. Stays for later releases too."""
    kill: bool = False
    """Send everything to the champion until this is taken back; the release waits."""
    every_s: float | None = None
    timeout_ms: float | None = None
    """Time after which the champion is asked in its place."""
    failures: float | None = None
    p50: float | None = None
    p99: float | None = None
    outputs: float | None = None
    loss: float | None = None
    alpha: float | None = None
    requests: int | None = None
    proof: bool | None = None

    def __post_init__(self) -> None:
        """Refuse times that are none."""
        if self.every_s is not None and not 0 <= self.every_s < float("inf"):
            raise ValueError(f"every is {self.every_s:g} s, expected 0 or more")
        if self.timeout_ms is not None and not self.timeout_ms > 0:
            raise ValueError(f"timeout_ms is {self.timeout_ms:g}, expected more than 0")

    def margins(self, began: Margins) -> Margins:
        """The margins of a release with what was changed. Raises `SettingsError`."""
        values = {name: getattr(self, name, None) for name in Margins.__struct_fields__}
        given = {name: value for name, value in values.items() if value is not None}
        try:
            return Margins(**{**msgspec.structs.asdict(began), **given})
        except ValueError as error:
            raise SettingsError(str(error)) from error


_TRIES: Final = 5
"""How often something is written down where somebody else writes at the same time."""
_FOR_ALL = ("hold",)
"""What holds for later releases of the deployment too."""
_RELEASE = "release"


def tuning_of(parameters: Parameters, release: int) -> Tuning:
    """What parameters say for a release; those that were set for another one say nothing."""
    mine = parameters.values.get(_RELEASE) == release
    values = {k: v for k, v in parameters.values.items() if k != _RELEASE and (mine or k in _FOR_ALL)}
    return msgspec.convert(values, Tuning)


def tuned(parameters: Parameters, release: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Parameters with changes to one release (0: none is under way). Raises `SettingsError` for what cannot be."""
    values = msgspec.to_builtins(tuning_of(parameters, release))
    try:
        kept = {name: value for name, value in {**values, **changes}.items() if value is not None}
        tuning = msgspec.convert(kept, Tuning)
    except (msgspec.ValidationError, ValueError) as error:
        known = Tuning.__struct_fields__
        meant = "".join(did_you_mean(name, known) for name in changes if name not in known)
        raise SettingsError(
            f"these parameters cannot be: {error}{meant}", hint=f"there are {', '.join(known)}"
        ) from error
    return {_RELEASE: release, **msgspec.to_builtins(tuning)}


@dataclass(slots=True)
class Trial:
    """A release under way."""

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
    shared: float = -math.inf
    """When servers told each other what the versions of a bandit earn, by the monotonic clock."""
    lease: Lease | None = None
    """Held by this server: it judges."""
    leased: float = -math.inf
    """When it was asked for last, by the monotonic clock."""
    tuning: Tuning = field(default_factory=Tuning)
    tuned: int = 0
    """Version of the parameters that are in force."""
    routed: Route | None = None
    """The route that was put in force last."""
    going_live: bool = False
    """It is being put in the champion's place: its route ends."""
    over: bool = False
    """It is being ended: whoever was in the middle of something with it leaves it."""

    @classmethod
    def of(cls, release: Release, champion: str) -> Trial:
        """As the store has it."""
        now = time.monotonic()
        trial = cls(release, champion, _judge_of(release), now, now)
        trial.began -= trial.judge.seconds
        return trial

    @property
    def name(self) -> str:
        """Its deployment."""
        return self.release.proposal.deployment

    @property
    def version(self) -> str:
        """The version that is tried."""
        return self.release.proposal.version

    @property
    def every_s(self) -> float:
        """Least time on a step."""
        every = self.tuning.every_s
        return self.release.proposal.every_s if every is None else every

    def lose_lease(self) -> None:
        """Another server judges: ask for it again."""
        self.lease, self.leased = None, -math.inf

    def on_step(self, release: Release, judge: Judge) -> None:
        """Go on with another step: what the judge said of the one before says nothing of this one."""
        self.release, self.judge, self.verdict = release, judge, None
        self.stepped = time.monotonic()

    def take_up(self, release: Release) -> None:
        """Go on with what another server has written of it."""
        now = time.monotonic()
        if release.step != self.release.step:
            self.stepped, self.verdict = now, None
        bins = self.judge.bins
        self.release = release
        if release.judge_state:
            judge = _judge_of(release)
            self.judge = judge if judge.bins is not None else msgspec.structs.replace(judge, bins=bins)
            self.verdict = self.judge.verdict() if self.judge.challenger.requests else None
            self.began = now - self.judge.seconds

    def tune(self, tuning: Tuning, version: int) -> bool:
        """Follow other parameters from now on; whether the route has to follow."""
        before, self.tuning, self.tuned = self.tuning, tuning, version
        self.judge = self.judge.with_margins(tuning.margins(_margins_of(self.release)))
        return (before.kill, before.timeout_ms) != (tuning.kill, tuning.timeout_ms)

    def look(self, observed: Sequence[Observed]) -> Verdict:
        """One look of the judge."""
        champion, challenger = self._increases(observed)
        self.judge, self.verdict = self.judge.look(champion, challenger, time.monotonic() - self.began)
        return self.verdict

    def _increases(self, observed: Sequence[Observed]) -> tuple[Observation, Observation]:
        """What champion and challenger did since the last look."""
        role = "shadow" if self.release.share == 0 else "answers"
        found: list[Observation] = []
        for version, asked in ((self.champion, "answers"), (self.version, role)):
            now = next((o for o in observed if (o.version, o.role) == (version, asked)), None)
            place = f"{version}:{asked}"
            if now is None:
                found.append(empty())
                continue
            since, before = self.seen.get(place, (now.since, empty()))
            if since != now.since:
                # Fronts count anew; labels go on.
                before = Observation(labels=before.labels)
            increase = now.observation.minus(before)
            self.seen[place] = now.since, now.observation
            # A front was started again and counts from 0: that while is lost for both.
            found.append(empty() if increase.fault() else increase)
        return found[0], found[1]

    def route(self) -> Route:
        """The share of the step, as a route."""
        proposal, share = self.release.proposal, self.release.share
        watch = msgspec.convert(proposal.margins.get("watch", {}), Watch)
        arms = (Arm(self.champion, 1.0 - share), Arm(self.version, share))
        return Route(
            self.name,
            self.champion,
            arms if share else (Arm(self.champion, 1.0),),
            shadows=() if share else (Shadow(self.version),),
            kind=proposal.kind if proposal.kind in ("ab", "bandit") else "canary",
            killed=self.tuning.kill,
            timeout_ms=self.tuning.timeout_ms,
            # Keys count anew in each step.
            watch=msgspec.structs.replace(watch, step=self.release.step),
        )

    def ended(self, by: str, why: str, verdict: Verdict | None) -> Callable[[State], None]:
        """What the store is told where it is rolled back, whatever it knows by then."""
        number, name, champion = self.release.id, self.name, self.champion
        known = msgspec.msgpack.encode(self.judge)
        record = record_of(verdict) if verdict is not None else None

        told = False

        def end(state: State) -> None:
            nonlocal told
            now = state.release(number)
            if now.state not in (*OPEN, "live"):
                return
            if record is not None and not told:
                state.record_verdict(now, record, by=by)
                told = True
            if now.state == "live":
                # It was taken live just then, and taken back all the same.
                state.roll_back(name, to=champion, by=by, why=why)
                return
            now = state.remember(now, known)
            state.finish(now, "rolled_back" if now.state == "running" else "aborted", by=by, why=why)

        # Whoever judges may write down just then what it knows.
        return lambda state: insist(lambda: end(state))


def insist(do: Callable[[], None]) -> None:
    """Do what reads and writes, again where somebody else wrote in between. Raises `Conflict` where that goes on."""
    for _ in range(_TRIES - 1):
        try:
            do()
            return
        except Conflict:
            continue
    do()


def record_of(verdict: Verdict) -> VerdictRecord:
    """A verdict as the store keeps it."""
    return VerdictRecord(
        verdict.decision.value, verdict.reason, tuple(msgspec.to_builtins(one) for one in verdict.evidence)
    )


def _margins_of(release: Release) -> Margins:
    return msgspec.convert(release.proposal.margins.get("margins", {}), Margins)


def _judge_of(release: Release) -> Judge:
    if release.judge_state:
        return msgspec.msgpack.decode(release.judge_state, type=Judge)
    steps = sum(share < 1 for share in release.proposal.steps) or 1
    return Judge.start(_margins_of(release), steps=steps)
