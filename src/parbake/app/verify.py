"""Hold a running server against what the advisor predicts for it: its counters and CPU time over a moment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from parbake.advisor.model import Load, Served
from parbake.advisor.predict import Question, predictions
from parbake.settings import Mode

_LINE: Final = re.compile(r"^(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Counters:
    """What a server has counted for one deployment until a moment, and the CPU time of its processes."""

    at_s: float
    """Of a clock that only goes forward."""
    requests: float
    rows: float
    hits: float
    buckets: tuple[tuple[float, float], ...]
    """Upper bound in seconds and requests answered within it, rising."""
    head_rows: float
    table_rows: float
    cpu_s: float
    """NaN where the system does not say."""
    logged: bool = False
    """Whether the server writes a prediction log."""


@dataclass(frozen=True, slots=True)
class Check:
    """One figure as predicted and as observed."""

    what: str
    unit: str
    predicted: float
    observed: float

    @property
    def error(self) -> float | None:
        """How far off the prediction is, as a share of what was observed; None where nothing was."""
        return self.predicted / self.observed - 1 if self.observed else None


def counters(page: str, name: str, at_s: float, pids: Sequence[int]) -> Counters:
    """Read the page for Prometheus: all versions of deployment ``name`` together."""
    sums: dict[str, float] = {}
    buckets: dict[float, float] = {}
    for line in page.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        labels: Mapping[str, str] = dict(_LABEL.findall(found["labels"]))
        if labels.get("deployment") != name:
            continue
        value = float(found["value"])
        if found["name"] == "parbake_request_duration_seconds_bucket":
            if labels["stage"] == "total":
                bound = float(labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + value
        else:
            sums[found["name"]] = sums.get(found["name"], 0.0) + value
    return Counters(
        at_s=at_s,
        requests=sums.get("parbake_requests_total", 0.0),
        rows=sums.get("parbake_rows_total", 0.0),
        hits=sums.get("parbake_table_hits_total", 0.0),
        buckets=tuple(sorted(buckets.items())),
        head_rows=sums.get("parbake_head_rows", 0.0),
        table_rows=sums.get("parbake_table_rows", 0.0),
        cpu_s=cpu_seconds(pids),
        logged="\nparbake_log_rows_total{" in page,
    )


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes; NaN where the system does not say."""
    total = 0
    try:
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return math.nan
    return total / os.sysconf("SC_CLK_TCK")


def quantile(before: Counters, after: Counters, share: float) -> float:
    """A quantile of the time in the server between two moments, by its bucket (within it, evenly in the logarithm)."""
    early = dict(before.buckets)
    counts = [(bound, count - early.get(bound, 0.0)) for bound, count in after.buckets]
    if not counts or counts[-1][1] <= 0:
        return 0.0
    wanted = share * counts[-1][1]
    low, passed = 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            if math.isinf(bound):
                return low
            part = (wanted - passed) / (count - passed)
            return bound * part if not low else low * (bound / low) ** part
        low, passed = bound, count
    return low


def verify(question: Question, mode: Mode, before: Counters, after: Counters) -> tuple[Check, ...]:
    """What was predicted for the way that is running, at the rate observed, and what was observed.

    ``question`` is what the advisor was asked. Raises ValueError where nothing was asked for between the moments.
    """
    seconds = after.at_s - before.at_s
    requests = after.requests - before.requests
    if requests <= 0 or seconds <= 0:
        raise ValueError("nothing was asked for")
    rows = after.rows - before.rows
    rate = requests / seconds
    # Keys of the table and of the head are not the same ones.
    held = max(after.head_rows + after.table_rows, 1.0)
    budget = min(held / max(question.traffic.distinct.value, 1.0), 1.0)
    now = replace(question, load=Load(question.load.connections, rate))
    options = predictions(now, (budget,))
    predicted = next(option for option in options if option.mode == mode)
    coverage = (after.hits - before.hits) / rows if rows else 0.0
    # The server counts from when it has the request until it has the answer.
    inside = max(predicted.p50_s - question.costs.front.wire_s, 0.0)
    checks = [
        Check("coverage", "%", 100 * predicted.coverage, 100 * coverage),
        Check("p50 in the server", "ms", 1e3 * inside, 1e3 * quantile(before, after, 0.5)),
    ]
    cpu_s = after.cpu_s - before.cpu_s
    if cpu_s > 0:
        checks.append(Check("requests/s per core", "", predicted.per_core_s, requests / cpu_s))
    return tuple(checks)


def served_of(
    name: str, mode: Mode, inline: bool, inline_others: int, counted: Counters, logged: bool | None = None
) -> Served:
    """What a server's counters say of a deployment, for its antipatterns."""
    return Served(
        name=name,
        mode=mode,
        inline=inline,
        inline_others=inline_others,
        table_rows=int(counted.table_rows),
        requests=int(counted.requests),
        coverage=counted.hits / counted.rows if counted.rows else 0.0,
        logged=logged,
    )
