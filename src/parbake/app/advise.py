"""Advise how to serve a bundle: bring traffic, measured costs and promises together, and have the advisor choose."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from parbake.advisor.choose import antipatterns_of, choose
from parbake.advisor.model import Costs, Load, Prediction, Prices, Promise, Recommendation, Served, Traffic
from parbake.advisor.predict import BUDGETS, Question, predictions
from parbake.advisor.traffic import Keys, numbered, traffic_of
from parbake.app.measure import measure
from parbake.contract.bundle import read_bundle
from parbake.contract.key import KEY_BYTES
from parbake.contract.model import Contract
from parbake.errors import InputFileError
from parbake.serving.head import Head, Row
from parbake.settings import DEADLINE_MS, Placement

CONNECTIONS: Final = 64
_EXPIRE_EVERY: Final = 256
_EMPTY: Final = Row((), ())


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


def asked_in_trace(path: Path) -> Asked:
    """The traffic of a trace file. Raises `InputFileError`."""
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rb") as handle:
            raw = handle.read()
    except (OSError, lzma.LZMAError) as error:
        raise InputFileError(f"{path} cannot be read: {error}") from error
    if not raw or len(raw) % 4:
        raise InputFileError(f"{path} is not a trace: {len(raw)} bytes are no sequence of 32-bit keys")
    keys = numbered(np.frombuffer(raw, ">u4"))
    return Asked(traffic_of(keys, f"trace {path.name}"), keys)


def promise_of(contract: Contract, deadline_ms: float | None = None) -> Promise:
    """What a contract promises; ``deadline_ms`` is the deployment's, where it has one of its own."""
    return Promise(
        deadline_s=(deadline_ms or contract.deadline_ms or DEADLINE_MS) / 1e3, freshness_s=contract.freshness_s
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

    Takes some seconds; ``stage`` is told what is under way. Raises what reading the bundle and starting a server
    for the measurement raise.
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
    )
