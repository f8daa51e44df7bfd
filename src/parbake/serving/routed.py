"""A deployment under a route, in one front: which of its versions answers a request, and who does where that cannot.

A request goes as a whole, by its first row: an answer names one version, and rows of two models do not belong into
one answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, Literal

from parbake.errors import DeadlineExceeded, NotReady, Overloaded, ParbakeError
from parbake.logs import log
from parbake.runtime.batcher import Scheduler, Timer
from parbake.serving.fallback import RESCUED, Asked
from parbake.serving.model import Answer
from parbake.serving.observer import KeyTurns, Observer
from parbake.serving.route import NO_HINTS, Chooser, Hints, Route, Row, Watch, first_row
from parbake.serving.service import ServedVersion, patient
from parbake.serving.shadow import Copy, ShadowCounts, Shadows

Role = Literal["answers", "shadow"]
Replied = Callable[[ServedVersion, Answer | ParbakeError], None]

_CHAMPION: Final = "champion"
_FULL: Final = (Overloaded, DeadlineExceeded, NotReady)
"""Errors of too little room or time."""
_SHARE: Final = 0.1
"""Part of the deadline that the champion gets at least where another version was asked before it."""


@dataclass(slots=True)
class Told:
    """What is counted of one deployment under a route, in one front; it outlives changes of plan."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by version and what decided for it, or ``rescued`` where the champion answered in its place."""
    shadows: dict[str, ShadowCounts] = field(default_factory=dict)
    observers: dict[tuple[str, Role], Observer] = field(default_factory=dict)
    """By version and role: those who answer and those who shadow are asked different things."""
    turn: tuple[int, int] = (0, 1)
    """Number of this front, and how many there are."""
    turns: dict[str, KeyTurns] = field(default_factory=dict)
    """How often each key was asked for: of all who answer together (""), and of each shadow."""
    watch: Watch | None = None
    since: int = 0
    """Revision of the route at which it began to be watched like this."""


class Routed:
    """The versions of one deployment and the route between them. Raises `SettingsError`."""

    def __init__(
        self,
        route: Route,
        versions: Mapping[str, ServedVersion],
        told: Told,
        shadows: Shadows,
        loop: Scheduler,
    ) -> None:
        self._loop = loop
        self._told = told
        self._shadows = shadows
        self.use(route, versions)

    def use(self, route: Route, versions: Mapping[str, ServedVersion]) -> None:
        """Follow another route from now on; what is under way goes its way."""
        champion = versions.get(route.champion) or list(versions.values())[-1]
        chooser = Chooser(route, champion.contract, time.time)
        told = self._told
        if (route.watch, route.since) != (told.watch, told.since):
            told.observers.clear()
            told.turns.clear()
            told.watch, told.since = route.watch, route.since
        self.route = route
        self.versions = dict(versions)
        self.champion = champion
        self.reader = max(versions.values(), key=lambda served: (len(served.needed), served is champion))
        """The version that requests are read for: static mode needs less of them than the others."""
        self.chooser = chooser
        for (version, _), observer in told.observers.items():
            if version in self.versions:
                observer.look_at(self.versions[version])

    def choose(self, asked: Asked, hints: Hints = NO_HINTS) -> tuple[ServedVersion, Row]:
        """The version that answers a request, and its first row."""
        champion = self.champion
        raws = first_row(champion.contract, asked.raws, asked.rows, asked.shapes)
        row = Row(raws, asked.shapes, champion.first_key(raws, asked.shapes))
        version, why = self.chooser.choose(row, hints)
        served = self.versions.get(version)
        if served is None or served.closed:
            # Unloaded meanwhile; the champion is there as long as the deployment is.
            served, why = champion, "absent"
        self._told.counts[served.version, why] += 1
        return served, row

    def predict(self, asked: Asked, done: Replied, hints: Hints = NO_HINTS, request_id: str = "") -> None:
        """Have a request answered; ``done`` is called once, now or later, with the version that answered or failed."""
        served, row = self.choose(asked, hints)
        key = self.chooser.stuck_to(row, hints)
        route, watching = self.route, self.observer(served)
        rescues = route.rescue and served is not self.champion
        deadline = asked.deadline
        timer: Timer | None = None
        settled = False

        def finished(result: Answer | ParbakeError) -> None:
            nonlocal settled
            if settled:
                # Too late: the champion has been asked.
                return
            settled = True
            if timer is not None:
                timer.cancel()
            if isinstance(result, ParbakeError):
                # One whose caller does not wait gives way to all others: that is no failure of the version.
                observer = None if isinstance(result, _FULL) and patient(asked.caller) else watching
                if observer is not None:
                    observer.failed(key)
                if rescues and isinstance(result, RESCUED) and not (asked.caller and asked.caller.closed):
                    self._rescue(served, result, asked, done, observer)
                    return
                if observer is not None and rescues:
                    observer.pair(saved=False)
                done(served, result)
                if served is self.champion and route.shadows:
                    try:
                        self._spare(row)
                    except Exception:
                        # The caller has the answer.
                        log().exception("route.not_observed", deployment=route.deployment)
                return
            done(served, result)
            try:
                if watching is not None:
                    self._observe(watching, asked, result, request_id, key)
                    if rescues:
                        watching.pair(saved=False)
                if route.shadows:
                    self._mirror(served, row, asked, result, key)
            except Exception:
                # The caller has the answer.
                log().exception("route.not_observed", deployment=route.deployment)

        try:
            if route.timeout_ms is not None and served is not self.champion and not patient(asked.caller):
                limit_s = route.timeout_ms / 1000
                deadline = min(deadline, asked.arrived + limit_s)
                timer = self._loop.call_later(limit_s, lambda: finished(_timed_out(served, limit_s)))
            answer = served.predict(
                asked.raws,
                asked.rows,
                asked.shapes,
                deadline,
                finished,
                asked.caller,
                asked.arrived,
                asked.priority,
                asked.client,
            )
        except ParbakeError as error:
            finished(error)
            return
        if answer is not None:
            finished(answer)

    def observer(self, served: ServedVersion, role: Role = "answers") -> Observer | None:
        """Who observes a version; None where nothing is watched."""
        told, watch = self._told, self.route.watch
        if watch is None or watch.bins is None:
            return None
        found = told.observers.get((served.version, role))
        if found is None:
            found = told.observers[served.version, role] = Observer(
                served,
                watch,
                watch.bins,
                shadow=role == "shadow",
                turns=told.turns.setdefault(served.version if role == "shadow" else "", KeyTurns(told.turn)),
            )
        return found

    def _observe(self, observer: Observer, asked: Asked, answer: Answer, request_id: str, key: bytes) -> None:
        if answer.fallback:
            # Something answered, but not this version.
            observer.failed(key)
        else:
            seconds = perf_counter() - asked.arrived
            if patient(asked.caller):
                seconds -= answer.queue_s
            observer.answered(seconds, asked.raws, asked.rows, asked.shapes, answer, request_id, key)

    def _rescue(
        self,
        served: ServedVersion,
        error: ParbakeError,
        asked: Asked,
        done: Replied,
        observer: Observer | None,
    ) -> None:
        """Have the champion answer in place of a version that failed."""
        champion = self.champion
        self._told.counts[served.version, "rescued"] += 1
        served.rescued(asked, error.code)

        def finished(result: Answer | ParbakeError) -> None:
            saved = isinstance(result, Answer) and not result.fallback
            if observer is not None:
                observer.pair(saved=saved)
            if isinstance(result, Answer) and saved:
                result.fallback = _CHAMPION
            done(champion, result)

        late = perf_counter() + _SHARE * champion.deadline_s
        try:
            answer = champion.predict(
                asked.raws,
                asked.rows,
                asked.shapes,
                max(asked.deadline, late),
                finished,
                asked.caller,
                asked.arrived,
                asked.priority,
                asked.client,
            )
        except ParbakeError as refused:
            finished(refused)
            return
        if answer is not None:
            finished(answer)

    def _spare(self, row: Row) -> None:
        """Count for the shadows that they are not asked what the champion failed."""
        for version in self.chooser.shadows(row, self.champion.version):
            shadow = self.versions.get(version)
            observer = self.observer(shadow, "shadow") if shadow is not None else None
            if observer is not None:
                observer.pair(saved=False)

    def _mirror(self, served: ServedVersion, row: Row, asked: Asked, answer: Answer, key: bytes) -> None:
        """Have the shadows asked the same, some time."""
        for version in self.chooser.shadows(row, served.version):
            counts = self._told.shadows.setdefault(version, ShadowCounts())
            shadow = self.versions.get(version)
            if shadow is None or answer.fallback:
                counts.dropped += 1
                continue
            observer = self.observer(shadow, "shadow")
            self._shadows.offer(
                Copy(shadow, asked.raws, asked.rows, asked.shapes, served, answer, counts, key, observer)
            )


def _timed_out(served: ServedVersion, limit_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"version {served.version} of {served.name!r} took longer than the {limit_s * 1e3:g} ms that its route gives it"
    )
