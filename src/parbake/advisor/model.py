"""What the advisor is told, and what it says: traffic, costs and promises in; predictions and a choice out."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from typing import Final, Literal

from parbake.settings import Mode

MONTH_H: Final = 730.0
"""Hours of a month, as clouds bill it."""

DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and how far off it may be: the true one is within ``error`` of it, both in the same unit."""

    value: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of the coverage curve: the ``keys`` most asked for are ``share`` of all requests, give or take."""

    keys: int
    share: float
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked for, in one window of one deployment's life."""

    source: str
    """In words: ``trace web12.trace.xz``."""
    requests: int
    """Rows asked for that were looked at."""
    distinct: Figure
    """Different keys among them: the cardinality."""
    curve: tuple[CurvePoint, ...]
    """In the order of ``keys``, rising."""
    peakedness: float
    """0 where every key is asked for equally often (but for chance), 1 where one key is all that matters; as
    `parbake.monitoring.profile` has it."""
    first_touch: float
    """Share of requests whose key had not been asked for before in the window."""
    unseen: float
    """Share of requests whose key was not asked for in a window as long just before, or what is sure to be more."""
    unasked: float | None
    """Share of a window's keys that nobody asks for in the next; None where that is not known."""
    turnover: float | None
    """Share of the head's weight that leaves the head from one part of the window to the next; None: not known."""
    rate_per_s: float | None = None
    """Rows per second; None where the source has no times."""
    window_s: float | None = None
    sampled: float = 1.0
    """Share of the keys that the source kept (whole keys, so that shares hold)."""

    def share_of(self, keys: float) -> float:
        """Share of requests that the ``keys`` most asked-for ones make up, between the points of the curve."""
        if not self.curve or keys <= 0:
            return 0.0
        at = bisect_left(self.curve, keys, key=lambda point: point.keys)
        if at == len(self.curve):
            return self.curve[-1].share
        right = self.curve[at]
        left = self.curve[at - 1] if at else CurvePoint(0, 0.0)
        return left.share + (right.share - left.share) * (keys - left.keys) / (right.keys - left.keys)


@dataclass(frozen=True, slots=True)
class BatchTime:
    """How long the model takes for ``rows`` rows together, as measured: median and 99th percentile."""

    rows: int
    p50_s: float
    p99_s: float

    def times(self, factor: float) -> BatchTime:
        """The same where everything takes so many times as long."""
        return BatchTime(self.rows, self.p50_s * factor, self.p99_s * factor)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The model alone, on this machine. ``batches`` are in the order of ``rows``, the first of one row."""

    fixed_s: float
    row_s: float
    """``fixed_s + row_s * n`` fits the medians."""
    batches: tuple[BatchTime, ...]

    def seconds(self, rows: int) -> float:
        """Time of a batch: between what was measured, and beyond it by the fitted line."""
        at = bisect_left(self.batches, rows, key=lambda batch: batch.rows)
        if at == len(self.batches):
            last = self.batches[-1]
            return last.p50_s + self.row_s * (rows - last.rows)
        right = self.batches[at]
        if right.rows == rows or not at:
            return right.p50_s
        left = self.batches[at - 1]
        return left.p50_s + (right.p50_s - left.p50_s) * (rows - left.rows) / (right.rows - left.rows)

    @property
    def one_s(self) -> float:
        """One row on its own."""
        return self.batches[0].p50_s

    @property
    def best_row_s(self) -> float:
        """A row in the batch that is the best value: what baking costs."""
        return min(batch.p50_s / batch.rows for batch in self.batches)

    def times(self, factor: float) -> ModelCost:
        """The same where everything takes so many times as long."""
        batches = tuple(batch.times(factor) for batch in self.batches)
        return ModelCost(self.fixed_s * factor, self.row_s * factor, batches)


@dataclass(frozen=True, slots=True)
class FrontCost:
    """CPU seconds of a front process, and what passes besides."""

    hit_s: float
    """A request answered from the table, among many others."""
    miss_s: float
    """One that the model answers, without the model's own time."""
    learn_s: float
    """More for one in hybrid mode, where its answer may be kept."""
    batch_s: float
    """Beside that, for each batch."""
    turn_s: float
    """More that a request costs when it comes alone: a turn of the event loop is then all its own."""
    wire_s: float
    """What a round trip takes beside all of that: sockets, and waking up."""
    hop_s: float
    """To the model's process and back; 0 where the model runs in the front."""

    def times(self, factor: float) -> FrontCost:
        """The same where everything takes so many times as long."""
        return FrontCost(**{field.name: getattr(self, field.name) * factor for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Costs:
    """What things cost on this machine, as measured there."""

    model: ModelCost
    front: FrontCost
    inline: bool
    """Whether the model runs in the front process."""
    threads: int
    """Threads that a batch takes."""
    fronts: int
    cores: float
    table_row_bytes: float
    head_row_bytes: float
    most_batch_rows: int
    """The largest batch that the server would run."""
    scatter: float = 0.0
    """Standard deviation of the logarithm of latencies among many connections, where each request costs the same: of
    lognormal ones whose mean is as far above their median."""
    pace: float = 0.0
    """How quick the machine was on average, which is what all times are for; 0 where that could not be seen."""
    unsteady: float = 0.0
    """Standard deviation of its pace meanwhile, in ratio to the mean."""

    def times(self, factor: float) -> Costs:
        """The same where everything takes so many times as long."""
        model, front = self.model.times(factor), self.front.times(factor)
        return replace(self, model=model, front=front, pace=self.pace / factor)


@dataclass(frozen=True, slots=True)
class Promise:
    """What callers were promised."""

    deadline_s: float
    freshness_s: float | None = None
    """Age at which a baked prediction must no longer be used; None: as long as the bundle is served."""
    bake_every_s: float = DAY_S
    """How often a static table is baked anew; never less often than ``freshness_s`` asks for."""
    most_unanswered: float = 0.001
    """Share of requests that static mode may leave without a prediction (a default is none)."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What CPUs and storage cost, in any currency. The defaults weigh the two where nothing is said of prices."""

    core_hour: float = 0.04
    gb_month: float = 0.10
    given: bool = False
    """Whether somebody said so; only then are costs shown."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: ``rate_per_s`` at random times, or (None) from ``connections`` that never rest."""

    connections: int
    rate_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One way to serve the traffic, and what would come of it."""

    mode: Mode
    budget: float | None
    """Of a hybrid head: share of the distinct keys."""
    rows: int
    """Predictions kept."""
    coverage: float
    """Share of the requests answered from what is kept, from a cold start in hybrid mode."""
    unanswered: float
    """Share of requests without a prediction (static mode, keys that were never baked)."""
    p50_s: float
    p99_s: float
    mean_s: float
    most_per_s: float
    """Requests per second with all connections busy."""
    per_core_s: float
    """Requests per second and core: the inverse of the CPU time of one."""
    compute_s: float
    """CPU seconds per hour at ``rate_per_s``, baking and serving."""
    wasted_s: float | None
    """Of these, for predictions that nobody asked for; None where that is not known."""
    storage_bytes: float
    stale_s: float | None
    """Age that an answer may reach; 0 where each is computed when it is asked for, None: that of the release."""
    rate_per_s: float
    """Of ``compute_s``; the traffic's, where known."""
    hour_cost: float
    """By the prices: an hour's CPU and storage."""
    refused: tuple[str, ...] = ()
    """Why this way is out of the question."""

    @property
    def name(self) -> str:
        """``hybrid 5 %``."""
        return self.mode if self.budget is None else f"{self.mode} {self.budget * 100:g} %"


AntipatternCode = Literal["slow_model", "all_in_one", "unread_table", "no_log", "stale_promise"]


@dataclass(frozen=True, slots=True)
class Antipattern:
    """Something that is known to hurt, seen here."""

    code: AntipatternCode
    name: str
    """As people call it: ``online big-size``."""
    what: str
    """What was seen, with its figures."""
    hint: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What the advisor says. ``options`` are all that were looked at, the best first."""

    best: Prediction
    reason: str
    """One sentence."""
    options: tuple[Prediction, ...]
    antipatterns: tuple[Antipattern, ...] = ()


@dataclass(frozen=True, slots=True)
class Served:
    """What a running server says of one deployment, for its antipatterns."""

    name: str
    mode: Mode
    inline: bool
    inline_others: int
    """Other models that run in the same front process."""
    table_rows: int
    requests: int
    coverage: float
    logged: bool | None = None
    """Whether a prediction log is written; None where that is not known."""
