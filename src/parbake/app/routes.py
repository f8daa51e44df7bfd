"""Routes of a running server: kept by the supervisor, followed by every front from one request to the next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from parbake.contract.model import Contract
from parbake.errors import Conflict, InvalidInput, ParbakeError
from parbake.logs import log
from parbake.serving.route import Route, check_served
from parbake.serving.routed import Routed
from parbake.serving.service import ServedVersion

_KEPT: Final = 100
"""Revisions of a route that are remembered."""

RoutedCounts = dict[str, dict[str, dict[str, int]]]
"""Requests by deployment, version and what decided."""


class FrontRoutes:
    """What one front does with routes."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self.routed: dict[str, Routed] = {}
        """Deployments under a route, by name. Always the same dict."""
        self._counts: dict[str, Counter[tuple[str, str]]] = {}

    def use(self, routes: Sequence[Route], served: Mapping[str, Sequence[ServedVersion]]) -> bool:
        """Follow these routes, all that there are; whether a deployment got its first route or lost its last."""
        before = set(self.routed)
        self._routes = {route.deployment: route for route in routes}
        for name, routed in list(self.routed.items()):
            route = self._routes.get(name)
            if route is None:
                del self.routed[name]
            elif route != routed.route:
                routed.use(route, routed.versions)
        for name in self._routes.keys() - self.routed.keys():
            self._begin(name, served)
        return before != set(self.routed)

    def follow(self, served: Mapping[str, Sequence[ServedVersion]]) -> None:
        """Other versions are served from now on."""
        self.routed.clear()
        for name in self._routes:
            self._begin(name, served)

    def counts(self) -> RoutedCounts:
        """Requests that were routed since the start."""
        found: RoutedCounts = {}
        for name, counter in self._counts.items():
            for (version, why), count in counter.items():
                found.setdefault(name, {}).setdefault(version, {})[why] = count
        return found

    def _begin(self, name: str, served: Mapping[str, Sequence[ServedVersion]]) -> None:
        versions = {version.version: version for version in served.get(name, ())}
        if not versions:
            # Unloaded: the route waits for it.
            return
        try:
            self.routed[name] = Routed(self._routes[name], versions, self._counts.setdefault(name, Counter()))
        except ParbakeError as error:
            # It was fit for the versions before; the last one answers, as without a route.
            log().error("route.unfit", deployment=name, error=error.message)


class RouteChange(Struct, frozen=True, forbid_unknown_fields=True):
    """What to do with the route of a deployment; one of them."""

    route: Route | None = None
    """Put it in force; its revision is given by the server."""
    killed: bool | None = None
    """Send everything to the champion, or no longer."""
    remove: bool = False
    """Have no route."""
    revision: int | None = None
    """Do it only if that is the revision in force (0: no route)."""


class Revision(Struct, frozen=True):
    """A route, and since when it is in force (Unix time). ``route`` is None where it was removed."""

    revision: int
    since: float
    route: Route | None


class RouteStatus(Struct, frozen=True):
    """The route of a deployment: what is in force, what was, and what came of it."""

    deployment: str
    route: Route | None
    revisions: tuple[Revision, ...] = ()
    """The newest last."""
    requests: dict[str, dict[str, int]] = {}
    """By version, and by what decided: weights, rule, kill, absent; ``rescued`` are those that the champion answered
    in its place."""


class RouteBook:
    """The routes in force and those before, by deployment. Changes nothing by itself."""

    def __init__(self) -> None:
        self._revisions: dict[str, list[Revision]] = {}

    @property
    def in_force(self) -> tuple[Route, ...]:
        """All routes."""
        return tuple(r[-1].route for r in self._revisions.values() if r[-1].route is not None)

    def get(self, name: str) -> Route | None:
        """The route of a deployment."""
        revisions = self._revisions.get(name)
        return revisions[-1].route if revisions else None

    def revisions(self, name: str) -> tuple[Revision, ...]:
        """All that is remembered of a deployment's routes, the newest last."""
        return tuple(self._revisions.get(name, ()))

    def plan(self, name: str, change: RouteChange, contracts: Mapping[str, Contract]) -> Revision:
        """What a change comes to; ``contracts`` are those of the versions served. Raises `ParbakeError`."""
        revisions = self._revisions.get(name, [])
        now, number = self.get(name), revisions[-1].revision if revisions else 0
        if change.revision is not None and change.revision != number:
            raise Conflict(
                f"the route of {name!r} is at revision {number}, not {change.revision}",
                hint=f"parbake route {name} shows it; somebody else has changed it",
            )
        if (change.route is not None) + (change.killed is not None) + change.remove != 1:
            raise InvalidInput("expected one of route, killed and remove", path="$")
        route = change.route
        if change.killed is not None:
            if now is None:
                raise Conflict(f"{name!r} has no route", hint=f"parbake route {name} --set VERSION=SHARE,...")
            route = msgspec.structs.replace(now, killed=change.killed)
        if route is not None:
            if route.deployment != name:
                raise InvalidInput(
                    f"the route is for {route.deployment!r}, not {name!r}", path="$.route.deployment"
                )
            check_served(route, contracts)
            route = msgspec.structs.replace(route, revision=number + 1)
        return Revision(number + 1, time.time(), route)

    def enter(self, name: str, revision: Revision) -> None:
        """Put it in force."""
        self._revisions.setdefault(name, []).append(revision)
        del self._revisions[name][:-_KEPT]


def add_routed(parts: Sequence[RoutedCounts]) -> RoutedCounts:
    """The sum of several fronts' counts."""
    total: RoutedCounts = {}
    for part in parts:
        for name, versions in part.items():
            for version, reasons in versions.items():
                mine = total.setdefault(name, {}).setdefault(version, {})
                for why, count in reasons.items():
                    mine[why] = mine.get(why, 0) + count
    return total
