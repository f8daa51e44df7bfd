"""A deployment under a route, in one front: which of its versions answers a request, and who does where that cannot.

A request goes as a whole, by its first row: an answer names one version, and rows of two models do not belong into
one answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Final

from parbake.errors import ParbakeError
from parbake.serving.fallback import RESCUED, Asked
from parbake.serving.model import Answer
from parbake.serving.route import NO_HINTS, Chooser, Hints, Route, Row, first_row
from parbake.serving.service import ServedVersion

Replied = Callable[[ServedVersion, Answer | ParbakeError], None]

_CHAMPION: Final = "champion"
_SHARE: Final = 0.1
"""Part of the deadline that the champion gets at least where another version was asked before it."""


class Routed:
    """The versions of one deployment and the route between them. Raises `SettingsError`."""

    def __init__(
        self, route: Route, versions: Mapping[str, ServedVersion], counts: Counter[tuple[str, str]]
    ) -> None:
        self.counts = counts
        """Requests by version and what decided for it, or ``rescued`` where the champion answered in its place."""
        self.use(route, versions)

    def use(self, route: Route, versions: Mapping[str, ServedVersion]) -> None:
        """Follow another route from now on; what is under way goes its way."""
        champion = versions.get(route.champion) or list(versions.values())[-1]
        chooser = Chooser(route, champion.contract, time.time)
        self.route = route
        self.versions = dict(versions)
        self.champion = champion
        self.reader = max(versions.values(), key=lambda served: (len(served.needed), served is champion))
        """The version that requests are read for: static mode needs less of them than the others."""
        self.chooser = chooser

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
        self.counts[served.version, why] += 1
        return served, row

    def predict(self, asked: Asked, done: Replied, hints: Hints = NO_HINTS) -> None:
        """Have a request answered; ``done`` is called once, now or later, with the version that answered or failed."""
        served, _ = self.choose(asked, hints)
        champion, route = self.champion, self.route
        rescues = route.rescue and served is not champion
        deadline = asked.deadline
        if route.timeout_ms is not None and served is not champion:
            deadline = min(deadline, asked.arrived + route.timeout_ms / 1000)

        def finished(result: Answer | ParbakeError) -> None:
            if rescues and isinstance(result, RESCUED) and not (asked.caller and asked.caller.closed):
                self._rescue(served, result, asked, done)
                return
            done(served, result)

        try:
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

    def _rescue(self, served: ServedVersion, error: ParbakeError, asked: Asked, done: Replied) -> None:
        """Have the champion answer in place of a version that failed."""
        champion = self.champion
        self.counts[served.version, "rescued"] += 1
        served.rescued(asked, error.code)

        def finished(result: Answer | ParbakeError) -> None:
            if isinstance(result, Answer) and not result.fallback:
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
            done(champion, refused)
            return
        if answer is not None:
            finished(answer)
