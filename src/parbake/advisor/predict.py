"""Predict what each way of serving would do with the traffic: coverage, latency, throughput, compute, storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from parbake.advisor.model import MONTH_H, Costs, Load, Prediction, Prices, Promise, Traffic
from parbake.advisor.queueing import Answers, Simulated, simulate
from parbake.advisor.traffic import Keys
from parbake.settings import Mode

BUDGETS: Final = (0.01, 0.05, 0.2)
_HOUR_S: Final = 3600.0
_GB: Final = 1e9

_KEEPS_UP: Final = 0.97
_BUSY: Final = 0.5
"""Where the rate is not known, compute is that of half the rate that dynamic mode can take."""
_SEED: Final = 0

Bools = npt.NDArray[np.bool_]


class Kept(Protocol):
    """What hybrid mode keeps, asked in the order of the requests."""

    def hit(self, key: int) -> bool:
        """Whether a request for ``key`` is answered from what is kept."""

    def computed(self, key: int) -> None:
        """The answer to ``key`` was computed just now."""


MakeKept = Callable[[int, float | None], Kept]
"""Makes a learned head of so many rows whose answers hold for so many requests (None: for good)."""


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a prediction is made from. ``keys`` is the sequence behind ``traffic``, where there is one."""

    traffic: Traffic
    costs: Costs
    promise: Promise
    load: Load
    prices: Prices
    keys: Keys | None = None
    make_kept: MakeKept | None = None
    followed: int = 10_000
    """Requests that are followed through the queues: enough for a 99th percentile."""


def predictions(question: Question, budgets: Sequence[float] = BUDGETS) -> Iterator[Prediction]:
    """Dynamic, static, and hybrid at each budget (share of the distinct keys), one after another."""
    dynamic = _follow(question, None)
    rate = question.load.rate_per_s or _BUSY * dynamic.most.per_s
    yield _prediction(question, "dynamic", None, 0, 0.0, 0.0, dynamic, rate)
    traffic = question.traffic
    distinct = max(round(traffic.distinct.value), 1)
    unanswered = traffic.unseen
    everything = _follow(question, np.ones(1, np.bool_))
    coverage = 1.0 - traffic.unseen
    yield _prediction(question, "static", None, distinct, coverage, unanswered, everything, rate)
    seen: set[int] = set()
    for budget in budgets:
        rows = max(int(distinct * budget), 1)
        if rows in seen:
            # Few keys: another share is the same head.
            continue
        seen.add(rows)
        hits = coverage_of(question, rows)
        followed = _follow(question, hits)
        yield _prediction(question, "hybrid", budget, rows, float(hits.mean()), 0.0, followed, rate)


def coverage_of(question: Question, rows: int) -> Bools:
    """For each request in turn (or for some that stand for all) whether a learned head of ``rows`` answers it."""
    if question.keys is not None and question.make_kept is not None:
        return kept_hits(question.keys, question.make_kept(rows, _holds(question)))
    # Without the sequence: the head is taken to hold the keys asked for most, each of which was asked for a
    # first time in the window.
    traffic = question.traffic
    share = max(traffic.share_of(rows) - min(rows, traffic.distinct.value) / traffic.requests, 0.0)
    return np.random.default_rng(_SEED).random(question.followed) < share


def kept_hits(keys: Keys, kept: Kept) -> Bools:
    """Ask a head for each key in turn, one request at a time."""
    hits = np.zeros(len(keys), np.bool_)
    hit, computed = kept.hit, kept.computed
    for i, key in enumerate(keys.tolist()):
        if hit(key):
            hits[i] = True
        else:
            computed(key)
    return hits


def _holds(question: Question) -> float | None:
    """For how many requests an answer is fresh."""
    freshness_s, rate = question.promise.freshness_s, question.load.rate_per_s
    return None if freshness_s is None or not rate else freshness_s * rate


@dataclass(frozen=True, slots=True)
class _Followed:
    most: Simulated
    """All connections busy."""
    usual: Simulated
    """At the rate, where one is known."""
    keeps_up: bool


def _follow(question: Question, hits: Bools | None) -> _Followed:
    """Follow some requests; ``hits`` is of one request (then of all), or None where nothing is kept."""
    keys = question.keys
    length = question.followed
    start = 0
    if hits is not None and len(hits) > 1:
        # From the second half: what a cold start costs is over by then.
        length = min(question.followed, len(hits) - len(hits) // 2)
        start = len(hits) - length - (len(hits) - len(hits) // 2 - length) // 2
    if hits is None:
        answers = Answers(lambda number: False, lambda number: None)
    else:
        picked = hits[start : start + length].tolist() if len(hits) > 1 else hits.tolist() * length
        key: Callable[[int], int] | None = None
        if keys is not None and len(hits) == len(keys):
            key = keys[start : start + length].tolist().__getitem__
        answers = Answers(picked.__getitem__, lambda number: None, key)
    warm_up = length // 10
    most = simulate(
        question.costs, Load(question.load.connections), answers, requests=length, warm_up=warm_up
    )
    rate = question.load.rate_per_s
    if rate is None:
        return _Followed(most, most, True)
    usual = simulate(question.costs, question.load, answers, requests=length, warm_up=warm_up)
    # Arrivals are random: what counts is whether the end kept up with the beginning.
    return _Followed(most, usual, rate <= _KEEPS_UP * most.per_s)


def _prediction(
    question: Question,
    mode: Mode,
    budget: float | None,
    rows: int,
    coverage: float,
    unanswered: float,
    followed: _Followed,
    rate: float,
) -> Prediction:
    costs, promise, prices = question.costs, question.promise, question.prices
    usual, most = followed.usual, followed.most
    cpu_s = usual.front_s + usual.model_s * costs.threads
    stale_s: float | None = 0.0
    storage = baked_s = 0.0
    wasted_s: float | None = 0.0
    refused: list[str] = []
    if mode == "static":
        interval_s = min(promise.bake_every_s, promise.freshness_s or promise.bake_every_s)
        one_bake_s = rows * costs.model.best_row_s
        baked_s = one_bake_s * _HOUR_S / interval_s
        unasked = question.traffic.unasked
        wasted_s = None if unasked is None else baked_s * unasked
        storage = rows * costs.table_row_bytes
        stale_s = interval_s
        if one_bake_s > interval_s * costs.cores:
            refused.append(
                f"baking {rows} rows takes {one_bake_s / costs.cores:.3g} s, longer than the {interval_s:g} s "
                "for which a prediction holds"
            )
        if unanswered > promise.most_unanswered:
            refused.append(f"{100 * unanswered:.2g} % of the requests are for keys that were never baked")
    elif mode == "hybrid":
        storage = rows * costs.head_row_bytes * costs.fronts
        stale_s = promise.freshness_s
    if usual.p99_s > promise.deadline_s:
        refused.append(
            f"p99 of {1e3 * usual.p99_s:.3g} ms is over the deadline of {1e3 * promise.deadline_s:g} ms"
        )
    if not followed.keeps_up:
        refused.append(f"at most {most.per_s:.3g} requests/s of the {rate:.3g} that come")
    compute_s = cpu_s * rate * _HOUR_S + baked_s
    hour_cost = compute_s / _HOUR_S * prices.core_hour + storage / _GB / MONTH_H * prices.gb_month
    return Prediction(
        mode=mode,
        budget=budget,
        rows=rows,
        coverage=coverage,
        unanswered=unanswered,
        p50_s=usual.p50_s,
        p99_s=usual.p99_s,
        mean_s=usual.mean_s,
        most_per_s=most.per_s,
        per_core_s=1 / cpu_s if cpu_s else 0.0,
        compute_s=compute_s,
        wasted_s=wasted_s,
        storage_bytes=storage,
        stale_s=stale_s,
        rate_per_s=rate,
        hour_cost=hour_cost,
        refused=tuple(refused),
    )
