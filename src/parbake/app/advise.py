"""Advise how to serve a bundle: bring traffic, measured costs and promises together, and have the advisor choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from parbake.advisor.choose import antipatterns_of, choose
from parbake.advisor.model import (
    Costs,
    CurvePoint,
    Figure,
    Load,
    Prediction,
    Prices,
    Promise,
    Recommendation,
    Served,
    Traffic,
)
from parbake.advisor.predict import BUDGETS, Question, predictions
from parbake.advisor.traffic import Keys, numbered, unseen_and_unasked
from parbake.app.measure import measure
from parbake.contract.bundle import read_bundle
from parbake.contract.key import KEY_BYTES
from parbake.contract.model import Contract
from parbake.errors import InputFileError
from parbake.monitoring.log import log_keys, read_log
from parbake.monitoring.model import Traffic as Measured
from parbake.monitoring.profile import exact_traffic
from parbake.monitoring.trace import read_trace
from parbake.serving.head import Head, Row
from parbake.settings import DEADLINE_MS, Placement

CONNECTIONS: Final = 64
_EXPIRE_EVERY: Final = 256
_EMPTY: Final = Row((), ())
_ENOUGH_REQUESTS: Final = 1000
_ENOUGH_KEYS: Final = 100
_UNSTEADY: Final = 0.1
_NOT_ALL: Final = 0.9
"""A greatest key below this part of the range, among so many keys, is no chance."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Traffic, and the sequence of keys behind it where the source has one."""

    traffic: Traffic
    keys: Keys | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """Everything that the advice rests on, and the advice."""

    bundle: str
    digest: str
    traffic: Traffic
    costs: Costs
    promise: Promise
    load: Load
    prices: Prices
    recommendation: Recommendation
    notes: tuple[str, ...] = ()
    """What to think of before the figures are believed."""


class LearnedHead:
    """The learned head of hybrid mode as the advisor asks it; its clock counts requests."""

    def __init__(self, rows: int, holds: float | None) -> None:
        self._now = 0
        self._head = Head(
            most_rows=rows, most_bytes=1 << 60, clock=lambda: float(self._now), freshness_s=holds
        )
        self._holds = holds

    def hit(self, key: int) -> bool:
        """As `Kept.hit`."""
        self._now += 1
        if self._holds is not None and not self._now % _EXPIRE_EVERY:
            self._head.expire()
        return self._head.get(_key(key)) is not None

    def computed(self, key: int) -> None:
        """As `Kept.computed`."""
        self._head.store(_key(key), _EMPTY, b"")

    def joined(self, key: int) -> None:
        """A request for ``key`` came while its answer was being computed."""
        self._head.asked(_key(key))


def _key(key: int) -> bytes:
    return key.to_bytes(KEY_BYTES, "big")


def asked_in_trace(path: Path, column: str = "") -> Asked:
    """The traffic of a trace file (see `parbake.monitoring.trace`). Raises `InputFileError`."""
    return asked_in_sequence(read_trace(path, column), f"trace {path.name}")


def asked_in_log(folder: Path, deployment: str | None = None) -> Asked:
    """The traffic of one deployment in a prediction log. Raises `InputFileError`."""
    tables = read_log(folder, deployment, columns=("deployment", "key", "time"))
    found: list[Any] = []
    first_us = last_us = 0
    highest = 0
    if not folder.is_dir():
        raise InputFileError("no such folder", path=str(folder), hint="--log takes the folder given to serve")

    def timed() -> Iterator[Any]:
        nonlocal first_us, last_us, highest
        for table in tables:
            highest = max(highest, _highest(table))
            times = table.column("time").cast("int64")
            first_us = first_us or times[0].as_py()
            last_us = times[-1].as_py()
            yield table

    by_name = log_keys(timed())
    if not by_name:
        named = f" of {deployment!r}" if deployment else ""
        raise InputFileError(
            f"the log in {folder} has no rows{named}", hint="is it the folder given to serve?"
        )
    if len(by_name) > 1:
        raise InputFileError(
            f"the log in {folder} has several deployments: {', '.join(sorted(by_name))}",
            hint="--name picks one of them",
        )
    ((name, found),) = by_name.items()
    asked = asked_in_sequence(
        np.concatenate(found), f"log of {name}", window_s=max(last_us - first_us, 1) / 1e6
    )
    # A sample is of the keys below a limit, and keys are evenly spread: the greatest is about the limit.
    share = (highest + 1) / 2**16
    if share < _NOT_ALL and asked.traffic.distinct.value >= _ENOUGH_KEYS:
        asked = replace(asked, traffic=replace(asked.traffic, sampled=share))
    return asked


def _highest(table: Any) -> int:
    """The first two bytes of the greatest key in a table of the log."""
    heads = [key.as_buffer()[:2].to_pybytes() for key in table.column("key") if key.is_valid]
    return int.from_bytes(max(heads, default=b""), "big")


def asked_in_sequence(ids: npt.NDArray[np.uint64], source: str, *, window_s: float | None = None) -> Asked:
    """The traffic of a recorded sequence of keys."""
    keys = numbered(ids)
    unseen, unasked = unseen_and_unasked(keys)
    rate = len(ids) / window_s if window_s else None
    traffic = _traffic(exact_traffic(ids), source, unseen, unasked, rate)
    return Asked(replace(traffic, window_s=window_s), keys)


def asked_of_server(report: Measured, name: str) -> Asked:
    """The traffic that a running server has measured of a deployment."""
    traffic = _traffic(
        report, f"{name}, as it is served", report.unseen_share, None, report.rate_per_s or None
    )
    return Asked(traffic)


def _traffic(
    found: Measured, source: str, unseen: float, unasked: float | None, rate_per_s: float | None
) -> Traffic:
    distinct = found.cardinality
    return Traffic(
        source=source,
        requests=found.requests,
        distinct=Figure(distinct.value, (distinct.upper - distinct.lower) / 2),
        curve=tuple(
            CurvePoint(point.keys, point.share, (point.upper - point.lower) / 2) for point in found.curve
        ),
        peakedness=found.peakedness,
        first_touch=found.first_touch_share,
        unseen=unseen,
        unasked=unasked,
        turnover=found.turnover,
        rate_per_s=rate_per_s,
    )


def promise_of(contract: Contract, deadline_ms: float | None = None) -> Promise:
    """What a contract promises; ``deadline_ms`` is the deployment's, where it has one of its own."""
    return Promise(
        deadline_s=(deadline_ms or contract.deadline_ms or DEADLINE_MS) / 1e3,
        freshness_s=contract.freshness_s,
    )


def advise(
    bundle: Path,
    asked: Asked,
    *,
    budgets: Sequence[float] = BUDGETS,
    load: Load | None = None,
    prices: Prices | None = None,
    deadline_ms: float | None = None,
    placement: Placement = "auto",
    allow_pickle: bool = False,
    served: Served | None = None,
    stage: Callable[[str], None] = lambda words: None,
) -> Advice:
    """Measure the bundle on this machine, predict what each way of serving would do, and choose.

    Takes a quarter to half a minute, longer for a slow model; ``stage`` is told what is under way. Raises what reading
    the bundle and starting a server for the measurement raise.
    """
    stored = read_bundle(bundle)
    promise = promise_of(stored.contract, deadline_ms)
    load = load or Load(CONNECTIONS, asked.traffic.rate_per_s)
    costs = measure(
        stored,
        connections=load.connections,
        deadline_s=promise.deadline_s,
        placement=placement,
        allow_pickle=allow_pickle,
        stage=stage,
    )
    question = Question(
        traffic=asked.traffic,
        costs=costs,
        promise=promise,
        load=load,
        prices=prices or Prices(),
        keys=asked.keys,
        make_kept=LearnedHead,
    )
    options: list[Prediction] = []
    for option in predictions(question, budgets):
        options.append(option)
        stage(f"what {option.name} would do")
    found = antipatterns_of(costs, promise, options, served)
    return Advice(
        bundle=stored.contract.name,
        digest=stored.digest,
        traffic=asked.traffic,
        costs=costs,
        promise=promise,
        load=load,
        prices=question.prices,
        recommendation=choose(options, asked.traffic, costs, found),
        notes=tuple(_notes(asked.traffic, costs)),
    )


def _notes(traffic: Traffic, costs: Costs) -> Iterator[str]:
    if traffic.requests < _ENOUGH_REQUESTS:
        yield f"only {traffic.requests:,} requests are known: what is said of the traffic may be chance"
    if traffic.sampled < 1:
        yield "the source holds a sample of the keys: rate and number of keys are those of the sample"
    if costs.unsteady > _UNSTEADY:
        yield (
            f"this machine was not equally quick while it was measured (by {costs.unsteady:.0%}, as a standard "
            "deviation): times are those of its mean pace; they are surer when nothing else runs"
        )
    if not costs.pace:
        yield "how quick this machine was while it was measured could not be seen: times are as they were taken"
