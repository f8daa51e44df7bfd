"""Routes of a running server: kept by the supervisor, followed by every front from one request to the next."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec
from msgspec import Struct

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Contract
from parbake.contract.tensors import as_text
from parbake.errors import Conflict, InvalidInput, ParbakeError, SettingsError
from parbake.logs import log
from parbake.runtime.observation import Observation
from parbake.serving.observer import Foretold, default_bins
from parbake.serving.route import Arm, Route, Rule, Shadow, Watch, bandit_weights, check_served, watched
from parbake.serving.routed import Role, Routed, Told
from parbake.serving.service import ServedVersion
from parbake.serving.shadow import ShadowCounts, Shadows

_PARTS: Final = 50
"""A bandit's weights are whole parts of so many for each version, or its route would change with every label."""
_KEPT: Final = 100
"""Revisions of a route that are remembered."""

_RULE: Final = "for example '4: header.x-group=beta|inner, column.plan=gold, share=10%'"


class Observed(Struct, frozen=True):
    """What one version did under a route. ``since`` is the revision at which it began to be watched like this."""

    deployment: str
    version: str
    role: Role
    since: int
    observation: Observation


def share_of(route: Route | None, version: str, last: str) -> float:
    """Share of the requests that name no version which go to a version; without a route ``last`` has all."""
    if route is None:
        return float(version == last)
    if route.killed:
        return float(version == route.champion)
    return sum(arm.weight for arm in route.arms if arm.version == version)


class RouteCounts(Struct, frozen=True):
    """What came of the routes in one front, or in all."""

    requests: dict[str, dict[str, dict[str, int]]] = {}
    """By deployment, version and what decided."""
    shadows: dict[str, dict[str, ShadowCounts]] = {}
    """By deployment and version."""
    observed: tuple[Observed, ...] = ()


class FrontRoutes:
    """What one front does with routes. ``loop`` is its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._routes: dict[str, Route] = {}
        self.routed: dict[str, Routed] = {}
        """Deployments under a route, by name. Always the same dict."""
        self._told: dict[str, Told] = {}
        self.turn = (0, 1)
        """Number of this front, and how many there are."""
        self._loop = loop
        self._shadows = Shadows(loop)

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

    def close(self) -> None:
        """Ask no shadow any more."""
        self._shadows.close()

    def counts(self) -> RouteCounts:
        """What came of the routes since the start, and of what is watched since it was last changed."""
        requests: dict[str, dict[str, dict[str, int]]] = {}
        observed: list[Observed] = []
        for name, told in self._told.items():
            for (version, why), count in told.counts.items():
                requests.setdefault(name, {}).setdefault(version, {})[why] = count
            for (version, role), observer in told.observers.items():
                observed.append(Observed(name, version, role, told.since, observer.observation()))
        shadows = {name: told.shadows for name, told in self._told.items() if told.shadows}
        return RouteCounts(requests, shadows, tuple(observed))

    def foretold(self, most: int) -> tuple[dict[str, tuple[Foretold, ...]], int]:
        """Take out predictions that labels may come for, by deployment, and how many there was no room for."""
        found: dict[str, tuple[Foretold, ...]] = {}
        untold = 0
        for name, told in self._told.items():
            taken: list[Foretold] = []
            for observer in told.observers.values():
                observer.fold()
                waiting = observer.foretold
                taken += [waiting.popleft() for _ in range(min(len(waiting), most - len(taken)))]
                untold += observer.untold
                observer.untold = 0
            if taken:
                found[name] = tuple(taken)
        return found, untold

    @property
    def expects_labels(self) -> bool:
        """Whether any predictions have to be told on."""
        return any(route.watch is not None and route.watch.loss for route in self._routes.values())

    def _begin(self, name: str, served: Mapping[str, Sequence[ServedVersion]]) -> None:
        versions = {version.version: version for version in served.get(name, ())}
        if not versions:
            # Unloaded: the route waits for it.
            return
        told = self._told.setdefault(name, Told(turn=self.turn))
        try:
            self.routed[name] = Routed(self._routes[name], versions, told, self._shadows, self._loop)
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
    by: str = ""
    """Who does it, for the history."""
    why: str = ""


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
    shadows: dict[str, ShadowCounts] = {}
    """By version."""
    observed: tuple[Observed, ...] = ()
    note: str = ""
    """What is not as it should be: the change does not stand in the history."""


class RouteBook:
    """The routes in force and those before, by deployment. Changes nothing by itself."""

    def __init__(self) -> None:
        self._revisions: dict[str, list[Revision]] = {}

    @property
    def in_force(self) -> tuple[Route, ...]:
        """All routes."""
        return tuple(r[-1].route for r in self._revisions.values() if r[-1].route is not None)

    @property
    def any_ever(self) -> bool:
        """Whether there is or was a route."""
        return bool(self._revisions)

    def get(self, name: str) -> Route | None:
        """The route of a deployment."""
        revisions = self._revisions.get(name)
        return revisions[-1].route if revisions else None

    def number(self, name: str) -> int:
        """The revision in force; 0 before there was any."""
        revisions = self._revisions.get(name)
        return revisions[-1].revision if revisions else 0

    def revisions(self, name: str) -> tuple[Revision, ...]:
        """All that is remembered of a deployment's routes, the newest last."""
        return tuple(self._revisions.get(name, ()))

    def check(self, served: Mapping[tuple[str, str], StoredBundle]) -> None:
        """Raise `Conflict` where what shall be served does not fit a route in force."""
        for route in self.in_force:
            contracts = {
                v: bundle.contract for (name, v), bundle in served.items() if name == route.deployment
            }
            if not contracts:
                # Unloaded; the route waits for it.
                continue
            try:
                check_served(route, contracts)
            except ParbakeError as error:
                raise Conflict(
                    f"the route of {route.deployment!r} does not fit what would be served: {error.message}",
                    hint=f"change the route first: parbake route {route.deployment}",
                ) from error

    def plan(self, name: str, change: RouteChange, contracts: Mapping[str, Contract]) -> Revision:
        """What a change comes to; ``contracts`` are those of the versions served. Raises `ParbakeError`."""
        now, number = self.get(name), self.number(name)
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
            same = now is not None and now.watch == route.watch
            since = now.since if now is not None and same else number + 1
            route = msgspec.structs.replace(route, revision=number + 1, since=since)
        return Revision(number + 1, time.time(), route)

    def enter(self, name: str, revision: Revision) -> None:
        """Put it in force."""
        self._revisions.setdefault(name, []).append(revision)
        del self._revisions[name][:-_KEPT]


def weights_of(text: str) -> tuple[Arm, ...]:
    """``3=0.9,4=0.1`` or ``3=90%,4=10%`` as weights. Raises `SettingsError`."""
    arms: list[Arm] = []
    for part in text.split(","):
        version, _, share = part.strip().partition("=")
        arms.append(Arm(version.strip(), _share(share, part)))
    return tuple(arms)


def shadow_of(text: str) -> Shadow:
    """``4`` or ``4=10%`` as a shadow. Raises `SettingsError`."""
    version, given, share = text.strip().partition("=")
    try:
        return Shadow(version.strip(), _share(share, text) if given else 1.0)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def rule_of(text: str) -> Rule:
    """``4: header.x-group=beta|inner, column.plan=gold, share=10%, after=2026-11-21T08:00Z`` as a rule.

    Raises `SettingsError`.
    """
    version, given, conditions = text.partition(":")
    if not given:
        raise SettingsError(f"no version in the rule {text[:80]!r}", hint=_RULE)
    named: dict[str, dict[str, tuple[str, ...]]] = {"header": {}, "parameter": {}, "column": {}}
    times: dict[str, float | None] = {"after": None, "before": None}
    share: float | None = None
    for part in conditions.split(","):
        name, has_value, value = (word.strip() for word in part.partition("="))
        kind, _, of = name.partition(".")
        if kind in named and of:
            named[kind][of] = tuple(v.strip() for v in value.split("|")) if has_value else ()
        elif name == "share":
            share = _share(value, part)
        elif name in times:
            times[name] = _moment(value)
        else:
            raise SettingsError(f"no condition {part.strip()[:80]!r} for a rule", hint=_RULE)
    try:
        return Rule(
            version.strip(),
            named["header"],
            named["parameter"],
            named["column"],
            share,
            times["after"],
            times["before"],
        )
    except ValueError as error:
        raise SettingsError(str(error), hint=_RULE) from error


def _share(text: str, part: str) -> float:
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise SettingsError(
            f"no share in {part.strip()[:80]!r}", hint="write VERSION=0.1 or VERSION=10%"
        ) from error


def _moment(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(
            f"{text[:40]!r} is no time",
            hint="write 2026-11-21T08:00:00+00:00, or without a zone for local time",
        ) from error
    return moment.timestamp()


def rebalanced(route: Route, rewards: Mapping[str, tuple[float, float]]) -> Route | None:
    """A bandit's route with weights by what its versions have earned, whatever they were; None where they are so.

    Servers that know of the same rewards so share keys out alike. ``rewards``: see
    `parbake.serving.route.bandit_weights`.
    """
    weights = bandit_weights({arm.version: rewards.get(arm.version, (0.0, 0.0)) for arm in route.arms})
    # Up: who is hardly ever the best one is still asked now and then. The best one has the rest.
    whole = _PARTS * len(weights)
    parts = {version: math.ceil(round(whole * weight, 6)) for version, weight in weights.items()}
    best = max(weights, key=weights.__getitem__)
    parts[best] += whole - sum(parts.values())
    arms = tuple(Arm(version, part / whole) for version, part in parts.items())
    return None if arms == route.arms else msgspec.structs.replace(route, arms=arms)


def added(
    here: Mapping[str, tuple[float, float]], elsewhere: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Rewards of several servers, by version."""
    none = 0.0, 0.0
    return {
        version: (
            here.get(version, none)[0] + elsewhere.get(version, none)[0],
            here.get(version, none)[1] + elsewhere.get(version, none)[1],
        )
        for version in {**here, **elsewhere}
    }


def add_counts(parts: Sequence[RouteCounts]) -> RouteCounts:
    """The sum of several fronts' counts; of what is watched, only what is watched as it was last."""
    requests: dict[str, dict[str, dict[str, int]]] = {}
    shadows: dict[str, dict[str, ShadowCounts]] = {}
    latest: dict[str, int] = {}
    observed: dict[tuple[str, str, Role], Observed] = {}
    for part in parts:
        for name, versions in part.requests.items():
            for version, reasons in versions.items():
                mine = requests.setdefault(name, {}).setdefault(version, {})
                for why, count in reasons.items():
                    mine[why] = mine.get(why, 0) + count
        for name, counts in part.shadows.items():
            for version, count_of in counts.items():
                shadows.setdefault(name, {}).setdefault(version, ShadowCounts()).add(count_of)
        for item in part.observed:
            latest[item.deployment] = max(latest.get(item.deployment, 0), item.since)
    for part in parts:
        for item in part.observed:
            if item.since != latest[item.deployment]:
                continue
            place = (item.deployment, item.version, item.role)
            before = observed.get(place)
            if before is not None:
                total = before.observation.add(item.observation)
                item = msgspec.structs.replace(item, observation=total)
            observed[place] = item
    return RouteCounts(requests, shadows, tuple(observed.values()))


def default_watch(watch: Watch, bundle: StoredBundle) -> Watch:
    """A watch with bins, by what the champion's goldens are. Raises `InvalidInput`."""
    if watch.bins is not None:
        return watch
    _, spec = watched(bundle.contract, watch.output)
    values = bundle.goldens().outputs[spec.name]
    known: list[float | str] = []
    if values.size:
        flat = values.reshape(len(values), -1)
        place = 0 if spec.datatype == "BYTES" else min(watch.place, flat.shape[1] - 1)
        column = flat[:, place]
        known = (as_text(column) if spec.datatype == "BYTES" else column).tolist()
    return msgspec.structs.replace(watch, bins=default_bins(spec, known))
