"""How often the judge is wrong, and how soon it sees harm: simulated canaries, and Mann-Whitney's test beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.machine import this_machine
from bench.report import Section, Table, at_most
from parbake.release.judge import (
    FAMILIES,
    QUANTILES,
    Decision,
    Judge,
    Margins,
    guess_of_share,
    thresholds,
)
from parbake.release.sequential import EFFECTS, STAKES, bet_on_means, bet_on_shares, share_of_alpha, wealth
from parbake.runtime.observation import LATENCY_EDGES_MS, TURNS, Bins, Observation

Floats = NDArray[np.float64]

CANARIES: Final = 1500
LOOKS: Final = 1000
RATE: Final = 100
"""Requests per second, a look each second."""
WEIGHT: Final = 0.05
DELAY_CANARIES: Final = 50
DELAY_LOOKS: Final = 7200
BINS: Final = 10
_EDGES: Final = np.array(LATENCY_EDGES_MS)
_EFFECTS: Final = np.array(EFFECTS)
_PART_OF: Final = {"p50": "latency", "p99": "latency", "segment": "outputs"}


@dataclass(frozen=True, slots=True)
class Traffic:
    """What comes, and what the challenger does with it."""

    name: str
    failures: float = 0.01
    weight: float = WEIGHT
    drift: bool = False
    """The rates go up and down threefold over ten minutes, and latencies twofold, for both."""
    bursts: bool = False
    """Every minute, for five seconds, 40 % of all fail and all take ten times as long."""
    tail: float | None = None
    """Pareto exponent of latencies; otherwise log-normal with a sigma of 0.5."""
    clumps: int = 1
    """So many requests in a row fail, or are slow, together."""
    more_failures: float = 0.0
    slower: float = 1.0
    slow_tail: float = 1.0
    """The slowest tenth takes so many times as long."""
    shift: float = 0.0
    """Of the predictions, in standard deviations."""
    segment: float = 0.0
    """The same, in one segment with a tenth of the requests."""
    loss: float = 0.0
    """What is added to a mean loss of 0.2 (of 0 or 1); labels for every fifth request."""


CALM: Final = (
    Traffic("1 % failures"),
    Traffic("0.1 % failures", failures=0.001),
    Traffic("20 % failures", failures=0.2),
    Traffic("weight 1 %", weight=0.01),
    Traffic("weight 50 %", weight=0.5),
    Traffic("drift", drift=True),
    Traffic("bursts", bursts=True),
    Traffic("heavy tail, drift and bursts", tail=1.1, drift=True, bursts=True),
)
HARM: Final = (
    Traffic("+1 point of failures (1 % to 2 %)", more_failures=0.01),
    Traffic("+5 points of failures", more_failures=0.05),
    Traffic("+20 % of p99 alone", slow_tail=1.2),
    Traffic("+20 % latency", slower=1.2),
    Traffic("+50 % latency", slower=1.5),
    Traffic("predictions shifted by 0.3 sd", shift=0.3),
    Traffic("one segment in ten shifted by 1 sd", segment=1.0),
    Traffic("loss 0.2 to 0.3", loss=0.1),
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Peaked traffic: the k-th most asked-for of so many keys is asked for k ** -``exponent`` times as often."""

    name: str
    exponent: float
    keys: int = 20_000
    broken: float = 0.02
    """Share of the keys that always fail, in both versions."""
    flaky: float = 0.0
    """Share of the keys of which every second request fails, in both versions."""
    weight: float = WEIGHT
    alone: float = 0.0
    """Share of the requests that the challenger alone fails."""


PEAKED: Final = (
    Keys("Zipf 1.0, 2 % of the keys always fail", 1.0),
    Keys("Zipf 1.3, 2 % of the keys always fail", 1.3),
    Keys("Zipf 1.3, half of the keys move", 1.3, weight=0.5),
    Keys("Zipf 1.3, 500 keys", 1.3, keys=500, weight=0.2),
    Keys("Zipf 1.1, 5 % of the keys fail every second time", 1.1, broken=0.0, flaky=0.05, weight=0.2),
)
PEAKED_HARM: Final = (
    Keys("Zipf 1.3, fails everything", 1.3, alone=1.0),
    Keys("Zipf 1.3, 50 keys, fails everything", 1.3, keys=50, alone=1.0),
    Keys("Zipf 1.3, fails half of the requests", 1.3, alone=0.5),
    Keys("Zipf 1.1, fails every tenth request", 1.1, alone=0.1, weight=0.2),
)
_KEYED_LOOKS: Final = 60
_KEYED_EVERY_S: Final = 5
_KEYED_ALPHA: Final = 0.1
"""Ten times the usual one, so that a few hundred canaries can tell."""


class Fleet:
    """Many canaries at once, through the functions that the judge itself uses."""

    def __init__(self, traffic: Traffic, canaries: int, seed: int, margins: Margins) -> None:
        self.traffic, self.canaries, self.margins = traffic, canaries, margins
        self.random = np.random.default_rng(seed)
        started = Judge.start(margins, Bins(edges=tuple(float(k) for k in range(BINS - 1))))
        self.needed = {test.name: test.needed for test in started.tests}
        for name, place in (("outputs", 0), ("segment", 1), ("labels", 0)):
            self.needed[name] = -math.log(margins.alpha * 0.25 * share_of_alpha(place))
        self.logs = {
            "failures": np.zeros((canaries, len(EFFECTS))),
            "p50": np.zeros((canaries, len(EFFECTS))),
            "p99": np.zeros((canaries, len(EFFECTS))),
            "outputs": np.zeros((canaries, 2 * BINS, len(EFFECTS))),
            "segment": np.zeros((canaries, 2 * BINS, len(EFFECTS))),
            "labels": np.zeros((canaries, len(STAKES))),
        }
        self.base: dict[str, Any] = {
            "failures": np.zeros((canaries, 2)),
            "latency": np.zeros((canaries, len(_EDGES))),
            "outputs": np.zeros((canaries, BINS + 1)),
            "segment": np.zeros((canaries, BINS + 1)),
            "labels": np.zeros((canaries, 2)),
            "own": np.zeros((canaries, 2)),
        }
        self.crossed = np.full(canaries, -1)
        self.requests = np.zeros(canaries, np.int64)
        self.why = np.full(canaries, "", dtype="<U16")

    def look(self, second: int, only: tuple[str, ...]) -> None:
        """One second of traffic, and a look at it."""
        traffic, size = self.traffic, self.canaries
        own_n = self.random.binomial(RATE, traffic.weight, size) if traffic.clumps == 1 else (
            np.full(size, max(round(RATE * traffic.weight / traffic.clumps), 1) * traffic.clumps)
        )  # fmt: skip
        base_n = RATE - own_n
        season = 3 ** math.sin(second * 2 * math.pi / 600) if traffic.drift else 1.0
        burst = traffic.bursts and second % 60 < 5
        rate = min(traffic.failures * season, 0.9)
        rate = 0.4 + 0.6 * rate if burst else rate
        speed = season ** (math.log(2) / math.log(3)) * (10.0 if burst else 1.0)
        if "failures" in only:
            self._failures(own_n, base_n, rate)
        if "latency" in only:
            self._latency(own_n, base_n, speed)
        if "outputs" in only:
            self._outputs("outputs", own_n, base_n, traffic.shift, season - 1.0)
            self._outputs(
                "segment", self.random.binomial(own_n, 0.1), self.random.binomial(base_n, 0.1),
                traffic.segment + traffic.shift, season - 1.0,
            )  # fmt: skip
        if "labels" in only:
            self._labels(self.random.binomial(own_n, 0.2), self.random.binomial(base_n, 0.2), season)
        for name, logs in self.logs.items():
            if _PART_OF.get(name, name) not in only:
                continue
            value = wealth(logs.reshape(size, -1))
            new = (value >= self.needed[name]) & (self.crossed < 0)
            self.crossed[new], self.why[new] = second + 1, name
        self.requests += np.where(self.crossed < 0, own_n, 0)

    def _hits(self, n: Any, rate: float) -> Any:
        clumps = self.traffic.clumps
        return clumps * self.random.binomial(n // clumps, rate)

    def _failures(self, own_n: Any, base_n: Any, rate: float) -> None:
        hits, base_hits = (
            self._hits(own_n, min(rate + self.traffic.more_failures, 1.0)),
            self._hits(base_n, rate),
        )
        base = self.base["failures"]
        guess = guess_of_share(base[:, 1], base[:, 0])[:, None]
        self.logs["failures"] += bet_on_shares(
            own_n[:, None], hits[:, None], base_n[:, None], base_hits[:, None],
            guess, self.margins.failures, _EFFECTS,
        )  # fmt: skip
        base *= 0.5 ** (base_n / 20_000)[:, None]
        base += np.stack([base_n, base_hits], -1)

    def _latency(self, own_n: Any, base_n: Any, speed: float) -> None:
        """Both arms as bucket counts: multinomials with the shares of the buckets."""
        own = self._multinomial(own_n, self._buckets(speed * self.traffic.slower, self.traffic.slow_tail))
        champion = self._multinomial(base_n, self._buckets(speed))
        before = self.base["latency"]
        seen = before.sum(-1)
        if seen.min() >= 100:
            above_own, above_base = (_above(counts) for counts in (own, champion))
            above_before, row = _above(before), np.arange(self.canaries)
            for name, quantile in QUANTILES.items():
                at, above = thresholds(before, quantile, getattr(self.margins, name))
                guess = guess_of_share(above_before[row, at], seen)[:, None]
                self.logs[name] += bet_on_shares(
                    own_n[:, None], above_own[row, above][:, None], base_n[:, None],
                    above_base[row, at][:, None], guess, 0.0, _EFFECTS,
                )  # fmt: skip
        before *= 0.5 ** (base_n / 20_000)[:, None]
        before += champion

    def _outputs(self, name: str, own_n: Any, base_n: Any, shift: float, drift: float) -> None:
        own = self._multinomial(own_n, _normal_bins(shift + 0.3 * drift))
        champion = self._multinomial(base_n, _normal_bins(0.3 * drift))
        before = self.base[name]
        ours, theirs, was = (np.cumsum(c, -1)[:, :-1, None] for c in (own, champion, before))
        guess = guess_of_share(was, before.sum(-1)[:, None, None])
        n, base = own_n[:, None, None], base_n[:, None, None]
        margin = self.margins.outputs
        self.logs[name][:, :BINS] += bet_on_shares(n, ours, base, theirs, guess, margin, _EFFECTS)
        self.logs[name][:, BINS:] += bet_on_shares(
            n, n - ours, base, base - theirs, 1 - guess, margin, _EFFECTS
        )
        before *= 0.5 ** (base_n / 20_000)[:, None]
        before += champion

    def _labels(self, own_n: Any, base_n: Any, season: float) -> None:
        mean = min(0.2 * season, 0.7)
        own, base = (
            self.random.binomial(own_n, mean + self.traffic.loss),
            self.random.binomial(base_n, mean),
        )
        guess, base_guess = (
            ((kept[:, 1] + 0.5) / (kept[:, 0] + 1))[:, None]
            for kept in (self.base["own"], self.base["labels"])
        )
        n, total, champions, base_total = (part[:, None].astype(float) for part in (own_n, own, base_n, base))
        self.logs["labels"] += bet_on_means(
            n, total, total, champions, base_total, base_total,
            guess, base_guess, self.margins.loss, np.array(STAKES),
        )  # fmt: skip
        for name, count, sums in (("own", own_n, own), ("labels", base_n, base)):
            self.base[name] *= 0.5 ** (count / 20_000)[:, None]
            self.base[name] += np.stack([count, sums], -1)

    def _buckets(self, speed: float, slow_tail: float = 1.0) -> Floats:
        """The share of each bucket; the middle is 8 ms."""
        below = self._below(_EDGES, speed)
        below = np.where(below < 0.9, below, np.maximum(0.9, self._below(_EDGES / slow_tail, speed)))
        shares: Floats = np.diff(np.append(0.0, below))
        shares /= shares.sum()
        return shares

    def _below(self, ms: Floats, speed: float) -> Floats:
        if self.traffic.tail is None:
            return np.array([_phi((math.log(edge / 8) - math.log(speed)) / 0.5) for edge in ms])
        pareto: Floats = 1 - np.maximum(ms / (4 * speed), 1.0) ** -self.traffic.tail
        return pareto

    def _multinomial(self, n: Any, shares: Floats) -> Any:
        """Counts by bucket, as many rows as canaries."""
        most = int(n.max())
        drawn = np.searchsorted(
            np.cumsum(shares)[:-1], self.random.random((self.canaries, most)), side="right"
        )
        kept = np.arange(most) < n[:, None]
        flat = (np.arange(self.canaries)[:, None] * len(shares) + drawn)[kept]
        return np.bincount(flat, minlength=self.canaries * len(shares)).reshape(self.canaries, -1)


def _above(counts: Any) -> Any:
    """How many are in the buckets after each."""
    return counts.sum(-1, keepdims=True) - np.cumsum(counts, -1)


def _phi(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _normal_bins(shift: float) -> Floats:
    """Shares of ten bins that a standard normal fills alike, moved; the last bin (no number) stays empty."""
    edges = (-1.2816, -0.8416, -0.5244, -0.2533, 0.0, 0.2533, 0.5244, 0.8416, 1.2816)
    below = np.array([0.0, *(_phi(edge - shift) for edge in edges), 1.0, 1.0])
    shares: Floats = np.diff(below)
    return shares


def run(*, quick: bool, say: Callable[[str], None]) -> Section:
    """Simulate; the seeds are fixed, so that every run finds the same."""
    margins, none = Margins(), Margins(failures=0.0, p50=0.0, p99=0.0, outputs=0.0, loss=0.0)
    part = 10 if quick else 1
    plan: list[tuple[Traffic, tuple[str, ...], int, int]] = [
        (traffic, ("failures",), CANARIES, LOOKS) for traffic in CALM[:6]
    ]
    plan += [(CALM[6], ("failures", "labels"), CANARIES, LOOKS)]
    plan += [(CALM[7], ("failures", "latency", "outputs", "labels"), 400, 150)]
    plan += [(CALM[0], ("failures", "latency", "outputs", "labels"), 400, 150)]
    alarms, figures = [], []
    for number, (traffic, only, canaries, looks) in enumerate(plan):
        say(f"no difference: {traffic.name}")
        # Margins of nothing: a challenger that is exactly as good is then as close to harm as it can be.
        fleet = _run(traffic, only, canaries // part, looks // part, number, none)
        wrong, size = int((fleet.crossed >= 0).sum()), fleet.canaries
        low, high = _clopper_pearson(wrong, size)
        allowed = sum(
            math.exp(-fleet.needed[name]) for name in fleet.needed if _PART_OF.get(name, name) in only
        )
        alarms.append((wrong / size, allowed))
        figures.append((traffic.name, ", ".join(only), f"{size:,}", f"{looks // part:,}",
                        _percent(allowed), _percent(wrong / size),
                        f"{_percent(low)} to {_percent(high)}"))  # fmt: skip
    worst = max(found / allowed for found, allowed in alarms)
    say("the limit: requests that fail together")
    clumped = _run(Traffic("", clumps=5), ("failures",), CANARIES // part, LOOKS // part, 50, none)
    limit = float((clumped.crossed >= 0).mean())
    delays = []
    for number, traffic in enumerate(HARM):
        say(f"harm: {traffic.name}")
        only = _watched(traffic)
        looks = {"outputs": 1200, "latency": 3600}.get(only[0], DELAY_LOOKS)
        fleet = _run(traffic, only, DELAY_CANARIES // part, looks // part, 100 + number, margins)
        found = fleet.crossed >= 0
        needed = np.where(found, fleet.requests, np.iinfo(np.int64).max)
        p50, p90 = (float(np.quantile(needed, q, method="higher")) for q in (0.5, 0.9))
        seconds = np.where(found, fleet.crossed, np.inf)
        s50, s90 = (float(np.quantile(seconds, q, method="higher")) for q in (0.5, 0.9))
        names, counts = np.unique(fleet.why[found], return_counts=True)
        first = str(names[counts.argmax()]) if len(names) else "none"
        delays.append((traffic.name, first, _percent(found.mean()), _requests(p50), _requests(p90), _minutes(s50),
                       _minutes(s90)))  # fmt: skip
    peaked, peaked_harm, keyed_worst = _peaked(200 // part, say)
    say("Mann-Whitney")
    mann_whitney = _mann_whitney(400 // part)
    return Section(
        key="judge",
        title="The judge of a canary",
        how=(
            f"Simulated canaries with {RATE} requests/s, {100 * WEIGHT:g} % of them to the challenger unless it says "
            "otherwise, and a look every second. Wrong rollbacks: both versions are the same and all margins are 0, "
            "the worst case; what may be is the part of alpha of what is watched in the row, so only rows that watch "
            "everything can be held against 1 %, and these are short. "
            "Delay: with the default margins, in requests of the challenger. Mann-Whitney's test "
            "(one-sided, 1 %, of the minutes' failure rates, as Kayenta compares time series) knows no margins, "
            "nor does the judge in that table, where failures have a fifth of its 1 %. "
            f"Peaked traffic: {_KEYED_LOOKS * _KEYED_EVERY_S} s, a look every {_KEYED_EVERY_S} s; wrong rollbacks "
            f"there with an alpha of {100 * _KEYED_ALPHA:g} %. Each key stays with its version and counts once, "
            "as fronts count it. "
            "Independent requests are assumed: where five at a time fail together, "
            f"{_percent(limit)} of the canaries are rolled back wrongly."
        ),
        tables=(
            Table(
                "Wrong rollbacks where there is no difference (alpha 1 %)",
                ("traffic", "watched", "canaries", "looks", "may be", "wrong", "95 % interval"),
                tuple(figures),
            ),
            Table(
                "Delay until harm is rolled back",
                ("harm", "first by", "found", "requests, median", "p90", "minutes, median", "p90 "),
                tuple(delays),
            ),
            Table(
                "Wrong rollbacks in peaked traffic, where keys fail in both versions alike (failures only, no margins)",
                ("traffic", "canaries", "may be", "wrong", "95 % interval", "were each request counted"),
                peaked,
            ),
            Table(
                "Delay until failures are rolled back in peaked traffic",
                ("harm", "first by", "found", "requests, median", "p90"),
                peaked_harm,
            ),
            Table(
                "Failures, one hour, no margins: the judge and Mann-Whitney's test",
                ("test", "wrong rollbacks", "+1 point found", "minutes, median"),
                mann_whitney,
            ),
        ),
        targets=(
            at_most("wrong rollbacks / what may be, highest of all rows", worst, 1.0),
            at_most("wrong rollbacks / what may be, where keys fail in both versions", keyed_worst, 1.0),
        ),
        machine=this_machine(),
        figures={"wrong_to_allowed": alarms, "wrong_where_five_fail_together": limit, "delays": delays},
    )


def _watched(traffic: Traffic) -> tuple[str, ...]:
    if traffic.more_failures:
        return ("failures",)
    if traffic.slower != 1 or traffic.slow_tail != 1:
        return ("latency",)
    return ("labels",) if traffic.loss else ("outputs",)


def _run(
    traffic: Traffic, only: tuple[str, ...], canaries: int, looks: int, seed: int, margins: Margins
) -> Fleet:
    fleet = Fleet(traffic, max(canaries, 20), seed, margins)
    for second in range(max(looks, 20)):
        fleet.look(second, only)
        if (fleet.crossed >= 0).all():
            break
    return fleet


def _keyed(traffic: Keys, canary: int, margins: Margins, *, once: bool) -> tuple[str, float]:
    """One canary with sticky keys through the judge itself: what rolled it back ("" for nothing), requests until then.

    ``once`` counts as fronts do (`parbake.serving.observer`); otherwise each request counts.
    """
    random = np.random.default_rng((71, canary))
    popular = 1 / np.arange(1, traffic.keys + 1) ** traffic.exponent
    below = np.cumsum(popular / popular.sum())
    below[-1] = 1.0
    broken = random.random(traffic.keys) < traffic.broken
    flaky = random.random(traffic.keys) < traffic.flaky
    moved = random.random(traffic.keys) < traffic.weight
    asked = np.searchsorted(below, random.random(_KEYED_LOOKS * _KEYED_EVERY_S * RATE))
    look_of = np.arange(len(asked)) // (RATE * _KEYED_EVERY_S)

    def fails() -> Any:
        return broken[asked] | (flaky[asked] & (random.random(len(asked)) < 0.5))

    mine, alone = moved[asked], random.random(len(asked)) < traffic.alone
    failed = fails()
    saved = mine & (failed | alone) & ~fails()
    failed |= mine & alone
    turn = _turns(asked) if once else np.ones(len(asked), np.int64)
    # By look, version, turn and outcome.
    numbers = np.array(list(TURNS))
    at = np.searchsorted(numbers, turn)
    counts = np.isin(turn, numbers)
    size = (_KEYED_LOOKS, 2, len(numbers), 2)
    place = np.ravel_multi_index((look_of, mine * 1, np.minimum(at, len(numbers) - 1), failed * 1), size)
    tries = np.bincount(place[counts], minlength=int(np.prod(size))).reshape(size)
    pairs = np.stack([np.bincount(look_of[w], minlength=_KEYED_LOOKS) for w in (mine, saved)], 1)
    judge, requests = Judge.start(margins), 0
    for look in range(_KEYED_LOOKS):
        seen = [
            Observation(
                tries={name: (int(row.sum()), int(row[1])) for name, row in zip(TURNS.values(), side, strict=True)
                       if row.any()},
                paired=(int(pairs[look, 0]), int(pairs[look, 1])) if which else (0, 0),
            )
            for which, side in enumerate(tries[look])
        ]  # fmt: skip
        judge, verdict = judge.look(seen[0], seen[1], look)
        requests += int(pairs[look, 0])
        if verdict.decision is Decision.ROLL_BACK:
            return verdict.evidence[0].test, float(requests)
    return "", math.inf


def _turns(asked: Any) -> Any:
    """The how-manieth request of its key each is."""
    order = np.argsort(asked, kind="stable")
    ordered = asked[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    turn = np.arange(len(asked)) - np.repeat(begins, np.diff(np.append(begins, len(asked)))) + 1
    found = np.empty_like(turn)
    found[order] = turn
    return found


def _peaked(canaries: int, say: Callable[[str], None]) -> tuple[tuple[Any, ...], tuple[Any, ...], float]:
    """Rows on traffic where few keys make up most requests, and the worst ratio of wrong rollbacks to what may be."""
    none = Margins(failures=0.0, alpha=_KEYED_ALPHA)
    may = none.alpha * (FAMILIES["failures"] + FAMILIES["rescued"])
    calm, worst = [], 0.0
    for traffic in PEAKED:
        say(f"peaked traffic: {traffic.name}")
        wrong = {
            once: sum(bool(_keyed(traffic, n, none, once=once)[0]) for n in range(many))
            for once, many in ((True, canaries), (False, canaries // 4))
        }
        low, high = _clopper_pearson(wrong[True], canaries)
        worst = max(worst, wrong[True] / canaries / may)
        calm.append((traffic.name, f"{canaries:,}", _percent(may), _percent(wrong[True] / canaries),
                     f"{_percent(low)} to {_percent(high)}", _percent(wrong[False] / (canaries // 4))))  # fmt: skip
    harm = []
    for traffic in PEAKED_HARM:
        say(f"peaked traffic: {traffic.name}")
        found = [_keyed(traffic, n, Margins(), once=True) for n in range(DELAY_CANARIES)]
        needed = [requests for _, requests in found]
        p50, p90 = (float(np.quantile(needed, q, method="higher")) for q in (0.5, 0.9))
        names = [name for name, _ in found if name]
        first = max(set(names), key=names.count) if names else "none"
        harm.append((traffic.name, first, _percent(len(names) / len(found)), _wanted(p50), _wanted(p90)))
    return tuple(calm), tuple(harm), worst


def _wanted(requests: float) -> str:
    return f"{requests:,.0f}" if math.isfinite(requests) else "not found"


def _mann_whitney(canaries: int) -> tuple[tuple[str, ...], ...]:
    minutes, first = 60, 5
    random = np.random.default_rng(9)
    rows: dict[str, list[Any]] = {
        "judge, a look each second": [],
        "looked at each minute": [],
        "once, after an hour": [],
    }
    none = Margins(failures=0.0)
    for more in (0.0, 0.01):
        own_n = round(RATE * 60 * WEIGHT)
        own = random.binomial(own_n, 0.01 + more, (canaries, minutes)) / own_n
        base = random.binomial(RATE * 60 - own_n, 0.01, (canaries, minutes)) / (RATE * 60 - own_n)
        z = np.stack([_z(own[:, :m], base[:, :m]) for m in range(first, minutes + 1)], 1)
        crossed = z > 2.326
        at = np.where(crossed.any(1), first + crossed.argmax(1), np.inf)
        rows["looked at each minute"].append(at)
        rows["once, after an hour"].append(np.where(crossed[:, -1], float(minutes), np.inf))
        fleet = _run(Traffic("", more_failures=more), ("failures",), canaries, minutes * 60, 90, none)
        rows["judge, a look each second"].append(np.where(fleet.crossed >= 0, fleet.crossed / 60, np.inf))
    return tuple(
        (
            name if name.startswith("judge") else f"Mann-Whitney, {name}",
            _percent(float(np.isfinite(calm).mean())),
            _percent(float(np.isfinite(harm).mean())),
            _minutes(60 * float(np.quantile(harm, 0.5, method="higher"))),
        )
        for name, (calm, harm) in rows.items()
    )


def _z(own: Floats, base: Floats) -> Floats:
    """Mann-Whitney's U in standard deviations, without the correction for ties, which only makes it wait."""
    n = own.shape[1]
    bigger = (own[:, :, None] > base[:, None, :]) + 0.5 * (own[:, :, None] == base[:, None, :])
    z: Floats = (bigger.sum((1, 2)) - n * n / 2) / math.sqrt(n * n * (2 * n + 1) / 12)
    return z


def _clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper & Pearson 1934), by bisection."""

    def at_most_hits(p: float, k: int) -> float:
        logs = [
            math.lgamma(n + 1)
            - math.lgamma(i + 1)
            - math.lgamma(n - i + 1)
            + i * math.log(p)
            + (n - i) * math.log1p(-p)
            for i in range(k + 1)
        ]
        return math.fsum(map(math.exp, logs))

    def solve(k: int, wanted: float) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most_hits(middle, k) > wanted else (low, middle)
        return low

    return 0.0 if hits == 0 else solve(hits - 1, 0.975), 1.0 if hits == n else solve(hits, 0.025)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _requests(count: float) -> str:
    return f"{count:,.0f}" if count < 1e15 else "not found"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if math.isfinite(seconds) else "not found"
