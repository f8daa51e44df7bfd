"""Compare a challenger with the champion, look by look: promote, hold, or roll back, and why."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from parbake.errors import SettingsError
from parbake.release.sequential import (
    EFFECTS,
    SHARES,
    STAKES,
    Floats,
    bet_on_means,
    bet_on_share,
    bet_on_shares,
    share_of_alpha,
    wealth,
)
from parbake.runtime.observation import LATENCY_EDGES_MS, Bins, Observation, empty

FAMILIES: Final = {
    "failures": 0.2,
    "rescued": 0.05,
    "p50": 0.125,
    "p99": 0.125,
    "outputs": 0.25,
    "labels": 0.25,
}
"""What is watched, and its part of alpha."""
_BY_KEY: Final = ("failures", "p50", "p99", "outputs")
"""What counts each key once in each step."""
_IN_PARTS: Final = ("failures", "outputs", "labels")
"""What is compared for parts of the requests too: those of a turn, or of a segment."""
QUANTILES: Final = {"p50": 0.5, "p99": 0.99}
BEYOND: Final = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Margins of failures that are tested besides the stated one, so that "at least so much worse" can be said."""
SUSPICION: Final = 10.0
"""Odds of harm from which on a step waits, however many requests it has had."""
MOST_SEGMENTS: Final = 100
_HALF_LIFE: Final = 20_000
"""Requests of the champion after which what it did counts half in guesses."""
_WARM: Final = 100
"""Requests of the champion before its quantiles are guessed."""
_BLIND: Final = 3
"""Times the requests of a step that are waited for until latencies can be compared: with few keys they never can."""
_MOST_POINTS: Final = 200
_EDGES: Final = np.array(LATENCY_EDGES_MS)

Counts = tuple[float, ...]


class Margins(Struct, frozen=True, forbid_unknown_fields=True):
    """How much worse a challenger may be, and how sure one wants to be."""

    failures: float = 0.005
    """Share of requests that may fail more."""
    p50: float = 0.10
    """What may be slower: a tenth."""
    p99: float = 0.10
    outputs: float = 0.05
    """Largest difference of the distribution functions (of the shares, where outputs are classes)."""
    loss: float = 0.02
    """Mean loss may be higher by this."""
    loss_bound: float = 1.0
    """No loss is above it: who counts them cuts them there."""
    alpha: float = 0.01
    """Chance of rolling back a challenger that is within all margins, over the whole release."""
    requests: int = 1000
    """Of the challenger, in each step."""
    proof: bool = False
    """Promote only when failures, p50 and p99 are surely (to alpha) within their margins."""

    def __post_init__(self) -> None:
        shares = {"failures": self.failures, "outputs": self.outputs}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise SettingsError(
                    f"margin {name} is {value}, which is no share", hint="0.005 is half a point"
                )
        for name, value in {"p50": self.p50, "p99": self.p99, "loss": self.loss}.items():
            if not 0 <= value < math.inf:
                raise SettingsError(f"margin {name} is {value}", hint="0 or more; 0.1 is 10 %")
        if not 0 < self.loss_bound < math.inf:
            raise SettingsError(f"loss_bound is {self.loss_bound}", hint="the most that one loss can be")
        if not 0 < self.alpha < 1:
            raise SettingsError(
                f"alpha is {self.alpha}", hint="0.01 is one wrong rollback in a hundred releases"
            )
        if self.requests < 1:
            raise SettingsError(f"requests is {self.requests}", hint="at least 1")


class Decision(StrEnum):
    """What to do."""

    PROMOTE = "promote"
    HOLD = "hold"
    ROLL_BACK = "roll_back"


class Evidence(Struct, frozen=True):
    """One comparison: in words, and in numbers."""

    test: str
    segment: str
    words: str
    champion: float
    challenger: float
    odds_log10: float
    """The highest so far of what a bet of 1 on harm became, as a power of ten."""
    needed_log10: float
    """From where on it is harm."""
    at_least: float | None = None
    """Failures: this much worse, surely."""
    proven: bool = False
    """Surely within the margin."""


class Verdict(Struct, frozen=True):
    """What to do, and why; the test that speaks loudest comes first."""

    decision: Decision
    reason: str
    evidence: tuple[Evidence, ...] = ()


class Test(Struct, frozen=True):
    """The state of one comparison."""

    __test__ = False

    name: str
    segment: str
    alpha: float
    logs: Counts
    """Logarithms of the bets on harm: for each margin, by event and effect."""
    peaks: Counts
    """By margin: the highest logarithm of the wealth so far."""
    inside: Counts = ()
    """Logarithms of the bets on being within the margin."""
    inside_peak: float = 0.0
    base: Counts = ()
    """The champion's counts, the older the less: what guesses are made of."""
    own: Counts = ()
    pending: tuple[Counts, Counts] = ((), ())
    """Champion and challenger, until both have something."""

    @property
    def needed(self) -> float:
        """The logarithm from where on it is harm."""
        return -math.log(self.alpha)

    @property
    def odds(self) -> float:
        """The logarithm of the wealth now."""
        return float(_wealths(self.logs, len(self.peaks))[0])


class Point(Struct, frozen=True):
    """A moment of the release, for a picture."""

    seconds: float
    odds: dict[str, float]
    """Logarithm of the wealth as a share of what is needed, by test."""


class Judge(Struct, frozen=True):
    """All that is known so far; a value, so that who dies goes on where it was."""

    margins: Margins
    bins: Bins | None = None
    champion: Observation = empty()
    challenger: Observation = empty()
    tests: tuple[Test, ...] = ()
    seconds: float = 0.0
    steps: int = 1
    """Of the release: what counts each key once in each of them has such a part of alpha in each."""
    step_requests: int = 0
    step_base_requests: int = 0
    points: tuple[Point, ...] = ()
    every: float = 0.0
    """Seconds between points."""

    @classmethod
    def start(cls, margins: Margins, bins: Bins | None = None, steps: int = 1) -> Judge:
        """Before anything was seen; without ``bins`` outputs are not compared."""
        tests = [_new(name, "", 0, margins, bins, steps) for name in ("failures", "rescued", "p50", "p99")]
        return cls(margins, bins, tests=tuple(tests), steps=steps)

    def next_step(self) -> Judge:
        """After a promotion: requests begin anew, and keys do, so what counts each key once is judged by this step.

        Bets that went on would be won twice by one key. What labels and pairs said stays.
        """
        tests = tuple(_anew(test) if test.name in _BY_KEY else test for test in self.tests)
        return msgspec.structs.replace(self, tests=tests, step_requests=0, step_base_requests=0)

    def with_margins(self, margins: Margins) -> Judge:
        """Judge by other margins from now on: what they are about begins anew, as bets on other margins say nothing."""
        before = self.margins
        if margins == before:
            return self
        changed = {name for name in (*_BY_KEY, "loss") if getattr(margins, name) != getattr(before, name)}
        changed |= {"rescued"} if "failures" in changed else set()
        changed |= {"labels"} if "loss" in changed or margins.loss_bound != before.loss_bound else set()
        places: dict[str, int] = {}
        tests = []
        for test in self.tests:
            place = places[test.name] = places.get(test.name, -1) + 1
            new = _new(test.name, test.segment, place, margins, self.bins, self.steps)
            tests.append(
                msgspec.structs.replace(new, base=test.base, own=test.own)
                if test.name in changed
                else msgspec.structs.replace(test, alpha=new.alpha)
            )
        return msgspec.structs.replace(self, margins=margins, tests=tuple(tests))

    def look(self, champion: Observation, challenger: Observation, seconds: float) -> tuple[Judge, Verdict]:
        """Take what both did since the last look, ``seconds`` after the start; what cannot be counts is left out.

        An increase that has nothing of one version waits for more. Whatever happened is held against both in the same
        while, so the looks may be as often as one likes; fewer looks compare longer whiles.
        """
        fault = self._fault(champion, challenger)
        if fault is not None:
            # Bad labels must not blind it for failures.
            champion, challenger = _plain(champion), _plain(challenger)
            if champion.fault() is not None or challenger.fault() is not None:
                champion = challenger = empty()
        tests = [
            _taken(test, _counts_of(test, champion), _counts_of(test, challenger), self.margins, self.bins)
            for test in self._with_new_segments(champion, challenger)
        ]
        both = msgspec.structs.replace(
            self,
            champion=self.champion.add(champion),
            challenger=self.challenger.add(challenger),
            tests=tuple(tests),
            seconds=max(self.seconds, seconds),
            step_requests=self.step_requests + challenger.requests,
            step_base_requests=self.step_base_requests + champion.requests,
        )._with_point()
        verdict = both.verdict()
        if fault is not None and verdict.decision is not Decision.ROLL_BACK:
            verdict = Verdict(Decision.HOLD, f"counts that cannot be: {fault}", verdict.evidence)
        return both, verdict

    def verdict(self) -> Verdict:
        """What the evidence so far says."""
        margins, evidence = self.margins, self._evidence()
        harmful = [test for test in self.tests if test.peaks[0] >= test.needed]
        if harmful:
            return Verdict(Decision.ROLL_BACK, "; ".join(e.words for e in evidence[: len(harmful)]), evidence)
        if not self.step_requests or not self.step_base_requests:
            who = "the challenger" if not self.step_requests else "the champion"
            return Verdict(Decision.HOLD, f"{who} has had no requests in this step", evidence)
        if self.step_requests < margins.requests:
            missing = margins.requests - self.step_requests
            return Verdict(
                Decision.HOLD, f"about {_round(missing)} more requests of the challenger", evidence
            )
        blind = self._blind()
        if blind and self.step_requests < _BLIND * margins.requests:
            return Verdict(
                Decision.HOLD,
                f"{blind} not compared yet: too few keys of the champion to know how long it takes",
                evidence,
            )
        doubted = [test for test in self.tests if test.odds >= math.log(SUSPICION)]
        if doubted:
            words = ", ".join(_title(test) for test in doubted)
            return Verdict(
                Decision.HOLD,
                f"{words}: odds of harm are above {SUSPICION:g} to 1, but not sure yet",
                evidence,
            )
        if margins.proof:
            open_ = [
                test for test in self.tests if test.inside and test.inside_peak < -math.log(margins.alpha)
            ]
            if open_:
                return Verdict(Decision.HOLD, self._to_prove(open_), evidence)
            return Verdict(
                Decision.PROMOTE, f"failures, p50 and p99 are within the margins, {self._sure()}", evidence
            )
        words = f"{self.step_requests:,} requests in this step and no sign of harm"
        if blind:
            words += f" ({blind} not compared: too few keys)"
        return Verdict(Decision.PROMOTE, words, evidence)

    def _blind(self) -> str:
        """The quantiles on which nobody has bet in this step, in words; "" where there are none."""
        if not any(self.champion.latency) or not any(self.challenger.latency):
            return ""
        names = [test.name for test in self.tests if test.name in QUANTILES and not any(test.logs)]
        return f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'}" if names else ""

    def _sure(self) -> str:
        return f"surely to {100 * self.margins.alpha:g} %"

    def _to_prove(self, tests: list[Test]) -> str:
        """What is missing, by the growth of the evidence so far."""
        seen = max(self.challenger.requests, 1)
        missing = [
            (-math.log(self.margins.alpha) - now) / now * seen
            for test in tests
            if (now := float(wealth(_array(test.inside)))) > 0.5
        ]
        about = (
            f"about {_round(max(missing))} more requests"
            if len(missing) == len(tests)
            else "cannot yet say how many"
        )
        return f"not yet surely within the margin: {', '.join(map(_title, tests))} ({about})"

    def _fault(self, champion: Observation, challenger: Observation) -> str | None:
        for who, seen in (("champion", champion), ("challenger", challenger)):
            fault = seen.fault()
            if (
                fault is None
                and self.bins is not None
                and any(len(c) > self.bins.count for c in seen.outputs.values())
            ):
                fault = f"more than {self.bins.count} bins of outputs"
            if fault is None and any(
                not (-1e-6 * n <= total <= n * self.margins.loss_bound * (1 + 1e-6))
                or squares > n * self.margins.loss_bound**2 * (1 + 1e-6)
                for n, total, squares in seen.labels.values()
            ):
                fault = f"losses outside of 0 to {self.margins.loss_bound:g}, the loss_bound"
            if fault is not None:
                return f"{who}: {fault}"
        return None

    def _with_new_segments(self, champion: Observation, challenger: Observation) -> list[Test]:
        tests = list(self.tests)
        for name, one, other in (
            ("failures", champion.tries, challenger.tries),
            ("outputs", champion.outputs, challenger.outputs),
            ("labels", champion.labels, challenger.labels),
        ):
            if name == "outputs" and self.bins is None:
                continue
            known = {test.segment for test in tests if test.name == name}
            for segment in sorted({*one, *other} - known)[: MOST_SEGMENTS - len(known)]:
                tests.append(_new(name, segment, len(known), self.margins, self.bins, self.steps))
                known.add(segment)
        return tests

    def _with_point(self) -> Judge:
        if self.points and self.seconds - self.points[-1].seconds < self.every:
            return self
        now = Point(self.seconds, {_title(test): test.peaks[0] / test.needed for test in self.tests})
        points = (*self.points, now)
        every = self.every
        if len(points) > _MOST_POINTS:
            points = points[::2]
            every = 2 * (points[-1].seconds - points[0].seconds) / _MOST_POINTS
        return msgspec.structs.replace(self, points=points, every=every)

    def _evidence(self) -> tuple[Evidence, ...]:
        tests = sorted(self.tests, key=lambda test: test.needed - test.peaks[0])
        return tuple(self._of(test) for test in tests)

    def _of(self, test: Test) -> Evidence:
        base, own = self._value(test, self.champion), self._value(test, self.challenger)
        at_least = None
        harm = test.peaks[0] >= test.needed
        if test.name == "failures":
            rejected = 0
            while rejected < len(test.peaks) and test.peaks[rejected] >= test.needed:
                rejected += 1
            at_least = self.margins.failures + BEYOND[rejected - 1] if rejected else None
            words = f"{_title(test)} {_percent(own)} against {_percent(base)}"
            if at_least is not None:
                words += f": at least {100 * at_least:.2g} points worse"
        elif test.name == "rescued":
            words = f"{_percent(own)} fail and the champion answers the same" + (
                f": more than {_percent(_most_rescued(self.margins))}, which chance can do" if harm else ""
            )
        elif test.name in QUANTILES:
            margin = 100 * (self.margins.p50 if test.name == "p50" else self.margins.p99)
            words = f"{test.name} {own:.3g} ms against {base:.3g} ms" + (
                f": more than {margin:g} % slower" if harm else ""
            )
        elif test.name == "outputs":
            words = f"{_title(test)} differ by {own:.3g}" + (
                f": more than {self.margins.outputs:g}" if harm else ""
            )
        else:
            words = f"{_title(test)}: mean loss {own:.3g} against {base:.3g}"
            words += f", worse by more than {self.margins.loss:g}" if harm else ""
        proven = bool(test.inside) and test.inside_peak >= -math.log(self.margins.alpha)
        ten = math.log(10)
        return Evidence(
            test.name, test.segment, words + (f", {self._sure()}" if harm else ""), base, own,
            test.peaks[0] / ten, test.needed / ten, at_least, proven,
        )  # fmt: skip

    def _value(self, test: Test, seen: Observation) -> float:
        if test.name == "failures":
            tries, failed = seen.tries.get(test.segment, (0, 0))
            return failed / tries if tries else 0.0
        if test.name == "rescued":
            return seen.paired[1] / seen.paired[0] if seen.paired[0] else 0.0
        if test.name in QUANTILES:
            below = np.cumsum(_array(seen.latency)) if seen.latency else np.zeros(1)
            edge = LATENCY_EDGES_MS[int(np.searchsorted(below, QUANTILES[test.name] * below[-1]))]
            # Beyond the last edge one knows no more than that.
            return min(edge, LATENCY_EDGES_MS[-2])
        if test.name == "labels":
            n, total, _ = seen.labels.get(test.segment, (0, 0.0, 0.0))
            return total / n if n else 0.0
        if seen is self.champion:
            return 0.0
        bins = self.bins or Bins()
        sides = [
            _shares(_padded(part.outputs.get(test.segment, ()), bins.count), bins)
            for part in (self.champion, self.challenger)
        ]
        return float(np.max(np.abs(sides[0] - sides[1])))


def _plain(seen: Observation) -> Observation:
    return Observation(seen.requests, seen.failures, seen.latency, tries=seen.tries, paired=seen.paired)


def _array(values: Counts) -> Floats:
    return np.array(values, np.float64)


def _padded(counts: tuple[float, ...], size: int) -> Floats:
    return _array((*counts, *(0.0,) * (size - len(counts))))


def _shares(counts: Floats, bins: Bins) -> Floats:
    shares: Floats = _hits(counts, bins) / max(counts.sum(), 1.0)
    return shares


def _hits(counts: Floats, bins: Bins) -> Floats:
    """How often each watched event happened: a value up to an edge, or a class."""
    return counts if bins.classes else np.cumsum(counts)[:-1]


def _title(test: Test) -> str:
    if test.name == "failures" and test.segment:
        return f"failures of a key's {test.segment} request"
    segment = f" of {test.segment}" if test.segment else ""
    return f"{test.name}{segment}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _round(requests: float) -> str:
    digits = max(len(str(math.ceil(requests))) - 2, 0)
    return f"{math.ceil(requests / 10**digits) * 10**digits:,}"


def _new(name: str, segment: str, place: int, margins: Margins, bins: Bins | None, steps: int) -> Test:
    alpha = margins.alpha * FAMILIES[name] * (share_of_alpha(place) if name in _IN_PARTS else 1.0)
    if name in _BY_KEY:
        alpha /= steps
    if name == "rescued":
        return Test(name, segment, alpha, (0.0,) * len(SHARES), (0.0,))
    if name == "failures":
        nulls = sum(margins.failures + more < 0.95 for more in BEYOND)
        # Promoting waits for the proof by first requests: of later ones there may never be enough.
        inside = () if segment else (0.0,) * len(EFFECTS)
        return Test(name, segment, alpha, (0.0,) * (nulls * len(EFFECTS)), (0.0,) * nulls, inside)
    if name in QUANTILES:
        return Test(name, segment, alpha, (0.0,) * len(EFFECTS), (0.0,), (0.0,) * len(EFFECTS))
    if name == "labels":
        return Test(name, segment, alpha, (0.0,) * len(STAKES), (0.0,))
    events = 2 * len(_hits(np.zeros(bins.count if bins else 2), bins or Bins()))
    return Test(name, segment, alpha, (0.0,) * (events * len(EFFECTS)), (0.0,))


def _anew(test: Test) -> Test:
    """The same test before any bet; what guesses are made of stays."""
    return msgspec.structs.replace(
        test,
        logs=(0.0,) * len(test.logs),
        peaks=(0.0,) * len(test.peaks),
        inside=(0.0,) * len(test.inside),
        inside_peak=0.0,
        pending=((), ()),
    )


def _counts_of(test: Test, seen: Observation) -> Counts:
    """What a test counts of an observation; () where there is nothing."""
    if test.name == "failures":
        tries, failed = seen.tries.get(test.segment, (0, 0))
        return (tries - failed, failed) if tries else ()
    if test.name == "rescued":
        return seen.paired if seen.paired[0] else ()
    if test.name in QUANTILES:
        return seen.latency if any(seen.latency) else ()
    if test.name == "outputs":
        counts = seen.outputs.get(test.segment, ())
        return counts if any(counts) else ()
    labels = seen.labels.get(test.segment, (0, 0.0, 0.0))
    return labels if labels[0] else ()


def _sum(one: Counts, other: Counts) -> Counts:
    size = max(len(one), len(other))
    return tuple((_padded(one, size) + _padded(other, size)).tolist())


def _taken(test: Test, champion: Counts, challenger: Counts, margins: Margins, bins: Bins | None) -> Test:
    """The test with a window more, or with more waiting."""
    if test.name == "rescued":
        return _bet_rescued(test, challenger, margins) if challenger else test
    if not champion and not challenger:
        return test
    base, own = _sum(test.pending[0], champion), _sum(test.pending[1], challenger)
    if not base or not own:
        return msgspec.structs.replace(test, pending=(base, own))
    test = msgspec.structs.replace(test, pending=((), ()))
    if test.name == "labels":
        test = _bet_labels(test, base, own, margins)
    elif test.name == "failures":
        test = _bet_failures(test, base, own, margins)
    elif test.name in QUANTILES:
        test = _bet_latency(test, base, own, margins)
    elif bins is not None:
        test = _bet_outputs(test, base, own, margins, bins)
    return msgspec.structs.replace(
        test,
        base=_decayed(test.base, base, _number(test, base)),
        own=_decayed(test.own, own, _number(test, own)),
    )


def _number(test: Test, counts: Counts) -> float:
    return counts[0] if test.name == "labels" else sum(counts)


def _decayed(before: Counts, more: Counts, n: float) -> Counts:
    size = max(len(before), len(more))
    faded = _padded(before, size) * 0.5 ** (n / _HALF_LIFE)
    return tuple((faded + _padded(more, size)).tolist())


def _wealths(logs: Counts, margins: int) -> Floats:
    """By margin: the logarithm of the wealth."""
    found: Floats = wealth(_array(logs).reshape(margins, -1))
    return found


def _with_gains(test: Test, gains: Floats) -> Test:
    logs = tuple((_array(test.logs) + gains.reshape(-1)).tolist())
    peaks = np.maximum(_array(test.peaks), _wealths(logs, len(test.peaks)))
    return msgspec.structs.replace(test, logs=logs, peaks=tuple(peaks.tolist()))


def _with_inside(test: Test, gains: Floats) -> Test:
    inside = tuple((_array(test.inside) + gains).tolist())
    return msgspec.structs.replace(
        test, inside=inside, inside_peak=max(test.inside_peak, float(wealth(_array(inside))))
    )


def guess_of_share(hits: Any, n: Any) -> Any:
    """A share that is likely from what was seen: 1 % before anything was."""
    return (hits + 0.5) / (n + 50.0)


def _most_rescued(margins: Margins) -> float:
    """The chance that a request fails and the champion answers it is p (1 - q), with p at most q + ``failures``."""
    return ((1 + margins.failures) / 2) ** 2


def _bet_rescued(test: Test, own: Counts, margins: Margins) -> Test:
    """Bet that more requests fail that the champion answers than could by chance, whatever the keys are like."""
    n, hits = own
    return _with_gains(test, bet_on_share(n, hits, _most_rescued(margins), _array(SHARES)))


def _bet_failures(test: Test, base: Counts, own: Counts, margins: Margins) -> Test:
    before = test.base or (0.0, 0.0)
    guess = guess_of_share(before[1], sum(before))
    nulls = _array(tuple(margins.failures + more for more in BEYOND[: len(test.peaks)]))
    effects = _array(EFFECTS)
    theirs, ours = (sum(base), base[1]), (sum(own), own[1])
    test = _with_gains(test, bet_on_shares(*ours, *theirs, guess, nulls[:, None], effects))
    if not test.inside:
        return test
    return _with_inside(test, bet_on_shares(*theirs, *ours, guess, -margins.failures, effects))


def thresholds(base: Floats, quantile: float, margin: float) -> tuple[Any, Any]:
    """The buckets above which a request is slow: of the champion (above its quantile), and of the challenger.

    The challenger's edge is the first that is at least ``1 + margin`` times the champion's, so that buckets only ever
    excuse it. ``base``: counts of the champion before, buckets on the last axis.
    """
    total = np.cumsum(base, axis=-1)
    at = np.argmax(total >= quantile * total[..., -1:], axis=-1)
    further = np.searchsorted(_EDGES, _EDGES * (1 + margin) * (1 - 1e-9))
    return at, np.minimum(further, len(_EDGES) - 1)[at]


def _bet_latency(test: Test, base: Counts, own: Counts, margins: Margins) -> Test:
    """Bet that more of the challenger's requests are above the champion's quantile with margin than its own above it.

    Were the challenger's latency that of the champion times at most 1 + margin, that could not be, at any threshold,
    and whatever the hour of the day.
    """
    size = len(LATENCY_EDGES_MS)
    before = _padded(test.base, size)
    seen = float(before.sum())
    if seen < _WARM:
        return test
    at, above = thresholds(before, QUANTILES[test.name], getattr(margins, test.name))
    guess = guess_of_share(before[at + 1 :].sum(), seen)
    effects = _array(EFFECTS)
    theirs = (sum(base), sum(base[at + 1 :]))
    ours = (sum(own), sum(own[above + 1 :]))
    gains = bet_on_shares(*ours, *theirs, guess, 0.0, effects)
    return _with_inside(_with_gains(test, gains), bet_on_shares(*theirs, *ours, guess, 0.0, effects))


def _bet_outputs(test: Test, base: Counts, own: Counts, margins: Margins, bins: Bins) -> Test:
    before, theirs, ours = (_hits(_padded(counts, bins.count), bins) for counts in (test.base, base, own))
    n, base_n = sum(own), sum(base)
    guess = guess_of_share(before, sum(test.base))[:, None]
    effects = _array(EFFECTS)
    more = bet_on_shares(n, ours[:, None], base_n, theirs[:, None], guess, margins.outputs, effects)
    less = bet_on_shares(
        n, n - ours[:, None], base_n, base_n - theirs[:, None], 1 - guess, margins.outputs, effects
    )
    return _with_gains(test, np.concatenate([more, less]))


def _bet_labels(test: Test, base: Counts, own: Counts, margins: Margins) -> Test:
    bound = margins.loss_bound
    n, total, squares, guess = _scaled(own, test.own, bound)
    base_n, base_total, base_squares, base_guess = _scaled(base, test.base, bound)
    stakes = _array(STAKES)
    gains = bet_on_means(
        n, total, squares, base_n, base_total, base_squares, guess, base_guess, margins.loss / bound, stakes
    )
    return _with_gains(test, gains)


def _scaled(counts: Counts, before: Counts, bound: float) -> Counts:
    """Number, sum and sum of squares in 0 to 1, and the mean that was likely before."""
    n, total, squares = counts
    guess = (before[1] / bound + 0.5) / (before[0] + 1) if before else 0.5
    return n, total / bound, squares / bound**2, min(max(guess, 0.0), 1.0)
