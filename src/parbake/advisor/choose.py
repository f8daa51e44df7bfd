"""Choose a way to serve by its predicted cost and latency, say why in one sentence, and name what is known to hurt."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Final

from parbake.advisor.model import (
    Antipattern,
    Costs,
    Prediction,
    Promise,
    Recommendation,
    Served,
    Traffic,
)

LEAST_GAIN: Final = 0.1
"""How much better (of cost times latency, as their geometric mean) a way must be than a simpler one."""

_ORDER: Final = {"dynamic": 0, "static": 1, "hybrid": 2}
_ENOUGH_REQUESTS: Final = 1000
_HARDLY: Final = 0.01


def choose(
    options: Sequence[Prediction], traffic: Traffic, costs: Costs, antipatterns: Sequence[Antipattern] = ()
) -> Recommendation:
    """The best of some ways to serve, dynamic mode among them.

    From simple to complicated (dynamic, static, hybrid by budget), each takes the place of the best so far if its
    score is less by `LEAST_GAIN`. The score is the square root of an hour's cost times the mean latency. What is
    refused counts only where everything is.
    """
    ordered = sorted(options, key=lambda option: (_ORDER[option.mode], option.budget or 0.0))
    dynamic = ordered[0]
    possible = [option for option in ordered if not option.refused]
    if not possible:
        best = min(ordered, key=lambda option: (option.unanswered > 0, option.p99_s))
        reason = f"nothing keeps every promise, and {best.name} comes nearest: {best.refused[0]}"
    else:
        best = possible[0]
        for option in possible[1:]:
            if score(option) <= (1 - LEAST_GAIN) * score(best):
                best = option
        reason = _reason(best, dynamic, ordered, traffic, costs)
    rest = sorted((o for o in ordered if o is not best), key=lambda o: (bool(o.refused), score(o)))
    return Recommendation(best, reason, (best, *rest), tuple(antipatterns))


def score(option: Prediction) -> float:
    """Geometric mean of what an hour costs and how long an answer takes: less is better."""
    return sqrt(option.hour_cost * option.mean_s)


def antipatterns_of(
    costs: Costs, promise: Promise, options: Sequence[Prediction], served: Served | None = None
) -> tuple[Antipattern, ...]:
    """What is known to hurt and can be seen here; ``served`` is what runs now."""
    found: list[Antipattern] = []
    if costs.model.one_s > promise.deadline_s:
        found.append(
            Antipattern(
                "slow_model",
                "online big-size",
                f"the model takes {1e3 * costs.model.one_s:.3g} ms for one row, the deadline is "
                f"{1e3 * promise.deadline_s:g} ms",
                "bake it ahead (static), or make it smaller; no batching makes one row quicker",
            )
        )
    if promise.freshness_s is not None:
        static = next((option for option in options if option.mode == "static"), None)
        if static is not None and costs.model.best_row_s * static.rows > promise.freshness_s * costs.cores:
            found.append(
                Antipattern(
                    "stale_promise",
                    "stale before it is baked",
                    f"all {static.rows} keys take longer to bake than the {promise.freshness_s:g} s for which the "
                    "contract lets a prediction hold",
                    "bake the head only (hybrid), or allow older predictions",
                )
            )
    if served is None:
        return tuple(found)
    if served.inline and served.inline_others:
        found.append(
            Antipattern(
                "all_in_one",
                "all in one",
                f"{served.name!r} runs in the front process together with {served.inline_others} other models: one "
                "that crashes takes all of them along",
                "--placement process gives each model walls of its own",
            )
        )
    if served.table_rows and served.requests >= _ENOUGH_REQUESTS and served.coverage < _HARDLY:
        found.append(
            Antipattern(
                "unread_table",
                "a table that nobody reads",
                f"{served.table_rows} predictions are baked, and {100 * served.coverage:.2g} % of "
                f"{served.requests} requests were answered from them",
                "bake the keys that are asked for (hybrid learns them), or stop baking",
            )
        )
    if served.logged is False:
        found.append(
            Antipattern(
                "no_log",
                "no log",
                f"nobody can say later what {served.name!r} has answered",
                "switch the prediction log on",
            )
        )
    return tuple(found)


def _reason(
    best: Prediction, dynamic: Prediction, options: Sequence[Prediction], traffic: Traffic, costs: Costs
) -> str:
    distinct = round(traffic.distinct.value)
    if best.mode == "static":
        why = (
            f"only {distinct:,} different keys are asked for"
            if distinct < 100_000
            else (f"all {distinct:,} keys can be baked")
        )
        return f"{why}, and a lookup takes {_time(best.p50_s)} at the median{_instead(dynamic)}"
    if best.mode == "hybrid":
        return (
            f"{best.rows:,} of {distinct:,} keys ({100 * (best.budget or 0):g} %) answer {100 * best.coverage:.0f} % "
            f"of the requests, so that the mean answer takes {_time(best.mean_s)}"
            + (
                f" and {_percent(1 - best.compute_s / dynamic.compute_s)} less compute"
                if dynamic.compute_s
                else ""
            )
            + (
                f" instead of {_time(dynamic.mean_s)}"
                if not dynamic.refused
                else f", where dynamic fails: {dynamic.refused[0]}"
            )
        )
    hybrids = [option for option in options if option.mode == "hybrid"]
    top = max(hybrids, key=lambda option: option.coverage, default=None)
    if costs.model.one_s <= costs.front.hit_s + costs.front.hop_s:
        return (
            f"the model takes {_time(costs.model.one_s)} for a row, so that looking its answer up would save next to "
            "nothing"
        )
    if top is not None and not top.refused:
        return (
            f"{distinct:,} keys are asked for so evenly that even {100 * (top.budget or 0):g} % of them "
            f"would answer only {100 * top.coverage:.0f} % of the requests"
        )
    refused = next((option for option in options if option.refused and option is not best), None)
    return "it keeps every promise" + (
        f", which {refused.name} does not: {refused.refused[0]}" if refused else ""
    )


def _instead(dynamic: Prediction) -> str:
    if dynamic.refused:
        return f", while dynamic mode fails: {dynamic.refused[0]}"
    return f" instead of {_time(dynamic.p50_s)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
