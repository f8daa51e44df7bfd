"""Labels that arrive late, joined to the predictions that they are about, for deployments under a route.

Fronts tell what they predicted; it is kept within a bound and for a while. A label goes to the answer with its request
id, or to the last one for its key, and to what shadows predicted for the same key.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from msgspec import Struct

from parbake.errors import Conflict, InvalidInput
from parbake.serving.observer import Foretold, KeyTurns
from parbake.serving.route import Loss, Route, words

if TYPE_CHECKING:
    from parbake.app.routes import Observed

MOST_LABELS: Final = 10_000
"""Most labels in one request."""
_MOST_PREDICTIONS: Final = 100_000
"""Most predictions of a deployment that are kept."""
_LARGEST: Final = 1e38
"""Largest number that a label, or a prediction that is held against one, is taken for."""

Value = float | str | bool
_K = TypeVar("_K")


class Labelled(Struct, frozen=True):
    """What was true: of row ``row`` of request ``id``, or of a key."""

    label: Value
    id: str = ""
    row: int = 0
    key: bytes = b""
    at: float | None = None
    """Unix time at which it became known, for the record."""


@dataclass(slots=True)
class _Kept:
    """The predictions of one deployment, and the losses of its versions."""

    loss: Loss
    labels_s: float
    since: int
    by_id: dict[tuple[str, int], Foretold] = field(default_factory=dict)
    by_key: dict[bytes, Foretold] = field(default_factory=dict)
    shadows: dict[tuple[bytes, str], Foretold] = field(default_factory=dict)
    """By key and version."""
    shadowing: set[str] = field(default_factory=set)
    """Versions among these."""
    sums: dict[tuple[str, bool, str], tuple[int, float, float]] = field(default_factory=dict)
    """By version, whether it shadowed, and segment: number, sum and sum of squares of the losses."""
    once: dict[tuple[str, bool, str], tuple[int, float, float]] = field(default_factory=dict)
    """The same, of the first label of each key, for the first row of a request: see `parbake.serving.observer`."""
    turns: KeyTurns = field(default_factory=KeyTurns)


class LabelStore:
    """What the supervisor keeps for labels. In memory: labels for what was predicted before a restart are unknown."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self.accepted = self.unknown = self.untold = 0

    def watch(self, routes: Sequence[Route]) -> None:
        """Expect labels for these deployments, as their routes say, and for no others."""
        wanted = {r.deployment: r.watch for r in routes if r.watch is not None and r.watch.loss}
        for name in self._kept.keys() - wanted.keys():
            del self._kept[name]
        revisions = {route.deployment: route.revision for route in routes}
        for name, watch in wanted.items():
            kept = self._kept.get(name)
            if kept is None or (kept.loss, kept.labels_s) != (watch.loss, watch.labels_s):
                self._kept[name] = _Kept(watch.loss, watch.labels_s, revisions[name])

    def foretold(self, predictions: Mapping[str, Sequence[Foretold]], untold: int) -> None:
        """Keep what a front predicted."""
        self.untold += untold
        for name, items in predictions.items():
            kept = self._kept.get(name)
            if kept is None:
                continue
            for item in items:
                if item.shadow:
                    _keep(kept.shadows, (item.key, item.version), item)
                    kept.shadowing.add(item.version)
                    continue
                _keep(kept.by_key, item.key, item)
                if item.id:
                    _keep(kept.by_id, (item.id, item.row), item)
            before = time.time() - kept.labels_s
            _forget(kept.by_id, before)
            _forget(kept.by_key, before)
            _forget(kept.shadows, before)

    def take(self, name: str, labels: Sequence[Labelled]) -> tuple[int, int]:
        """Join labels to predictions: how many found theirs, and how many did not.

        Raises `Conflict` where the deployment expects none, `InvalidInput` for a label that cannot be one.
        """
        kept = self._kept.get(name)
        if kept is None:
            raise Conflict(
                f"{name!r} expects no labels",
                hint=f"parbake route {name} --loss says how they are to be used",
            )
        # All of them first: a request that is refused has changed nothing.
        truths = [_truth(kept.loss, label.label, i) for i, label in enumerate(labels)]
        accepted = 0
        for label, truth in zip(labels, truths, strict=True):
            found = _find(kept, label)
            accepted += bool(found)
            first = bool(found) and not found[0].row and kept.turns.next(found[0].key) == 1
            for item in found:
                loss = _loss(kept.loss, item.value, truth)
                for segment in dict.fromkeys(("", item.segment)):
                    place = (item.version, item.shadow, segment)
                    for sums in (kept.sums, kept.once) if first else (kept.sums,):
                        n, total, squares = sums.get(place, (0, 0.0, 0.0))
                        sums[place] = (n + 1, total + loss, squares + loss * loss)
        self.accepted += accepted
        self.unknown += len(labels) - accepted
        return accepted, len(labels) - accepted

    def sums(self, name: str, version: str, shadow: bool) -> dict[str, tuple[int, float, float]]:
        """By segment the number, sum and sum of squares of the losses of a version, one for each key."""
        kept = self._kept.get(name)
        if kept is None:
            return {}
        return {s: sums for (v, other, s), sums in kept.once.items() if (v, other) == (version, shadow)}

    def rewards(self, name: str) -> dict[str, tuple[float, float]]:
        """By version of those that answer, the sum of the rewards and of what was missing to 1."""
        kept = self._kept.get(name)
        if kept is None:
            return {}
        return {
            version: (number - loss, loss)
            for (version, shadow, segment), (number, loss, _) in kept.sums.items()
            if not shadow and not segment
        }

    def labelled(self, item: Observed) -> Observed:
        """What was observed of a version, with what labels said of it."""
        labels = self.sums(item.deployment, item.version, item.role == "shadow")
        observation = msgspec.structs.replace(item.observation, labels=labels)
        return msgspec.structs.replace(item, observation=observation)


def _keep(store: dict[_K, Foretold], place: _K, item: Foretold) -> None:
    """Put a prediction in as the newest one."""
    store.pop(place, None)
    store[place] = item
    if len(store) > _MOST_PREDICTIONS:
        del store[next(iter(store))]


def _forget(store: dict[_K, Foretold], before: float) -> None:
    """Drop what was predicted too long ago; the oldest come first."""
    while store and store[place := next(iter(store))].at < before:
        del store[place]


def _find(kept: _Kept, label: Labelled) -> list[Foretold]:
    """Take out the predictions that a label is about: each is held against one label."""
    if label.id:
        found = kept.by_id.pop((label.id, label.row), None)
        if found is not None and kept.by_key.get(found.key) is found:
            del kept.by_key[found.key]
    else:
        found = kept.by_key.pop(label.key, None)
        if found is not None:
            kept.by_id.pop((found.id, found.row), None)
    if found is None:
        return []
    others = (kept.shadows.pop((found.key, version), None) for version in kept.shadowing)
    return [found, *(other for other in others if other is not None)]


def _truth(loss: Loss, label: Value, at: int) -> float | str:
    """A label as a loss takes it. Raises `InvalidInput` for one that says nothing."""
    if loss == "zero_one":
        return words(label)
    path = f"$.labels[{at}].label"
    try:
        truth = float(label)
    except ValueError as error:
        raise InvalidInput(f"expected a number, got {label!r}"[:120], path=path) from error
    if not abs(truth) <= _LARGEST or (loss == "reward" and not 0 <= truth <= 1):
        wanted = "a reward from 0 to 1" if loss == "reward" else f"a number up to {_LARGEST:g}"
        raise InvalidInput(f"expected {wanted}, got {truth}", path=path)
    return truth


def _loss(loss: Loss, predicted: float | str, truth: float | str) -> float:
    """How far a prediction is from what was true."""
    if isinstance(truth, str):
        return float(truth != words(predicted))
    if loss == "reward":
        return 1 - truth
    # A prediction that is no number is as wrong as none at all; its loss must not swallow all others.
    guess = predicted if isinstance(predicted, float) else 0.0
    apart = abs(truth - max(-_LARGEST, min(_LARGEST, guess)))
    return apart * apart if loss == "squared" else apart
