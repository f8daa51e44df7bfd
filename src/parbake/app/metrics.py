"""The page for Prometheus, made by the one process that owns the node's metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from parbake.app.control import AllCounts
from parbake.app.follow import Following
from parbake.app.jobs import JobDepth
from parbake.monitoring.model import Traffic
from parbake.serving.route import Route
from parbake.serving.stats import BATCH_BOUNDS, BOUNDS_S, STAGES, Histogram, no_counts

MOST_IN_DETAIL: Final = 100
"""Models loaded on demand beyond which each has the histogram of its whole time only, and no traffic profile."""
_LABELS = ("deployment", "version")


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the supervisor knows of itself; ``started`` is Unix time."""

    started: float
    fronts: int
    front_restarts: int
    generation: int
    following: Sequence[Following] = ()


@dataclass(frozen=True, slots=True)
class VersionState:
    """A served version."""

    name: str
    version: str
    mode: str
    digest: str
    table_rows: int
    table_expires: float | None = None
    """Unix time at which the table stops to be used; 0 for never, None where there is no table."""


@dataclass(frozen=True, slots=True)
class RunnerState:
    """The runners of a version."""

    name: str
    version: str
    restarts: int
    up: int


@dataclass(frozen=True, slots=True)
class DemandState:
    """A model that is loaded on demand."""

    name: str
    version: str
    loaded: bool
    bytes: int
    loads: int
    evictions: int


@dataclass(frozen=True, slots=True)
class RoomsState:
    """All models that are loaded on demand. ``load_counts`` has one number more than ``load_bounds_s``."""

    models: Sequence[DemandState]
    memory_bytes: int
    """Budget; 0 for none."""
    restarts: int
    load_bounds_s: Sequence[float]
    load_counts: Sequence[int]
    load_seconds: float


@dataclass(frozen=True, slots=True)
class RoutesState:
    """The routes in force, and what became of labels and of the predictions that they may be for."""

    routes: Sequence[Route]
    labels_accepted: int
    labels_unknown: int
    predictions_untold: int


def render(
    server: ServerState,
    versions: Sequence[VersionState],
    runners: Sequence[RunnerState],
    counts: AllCounts,
    traffic: Mapping[str, Traffic],
    rooms: RoomsState | None = None,
    routes: RoutesState | None = None,
) -> str:
    """Prometheus text format. ``rooms`` is None where no model is loaded on demand, ``routes`` where none ever was."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(server, versions, runners, counts, traffic, rooms, routes))
    return generate_latest(registry).decode()


class _Page(Collector):
    def __init__(
        self,
        server: ServerState,
        versions: Sequence[VersionState],
        runners: Sequence[RunnerState],
        counts: AllCounts,
        traffic: Mapping[str, Traffic],
        rooms: RoomsState | None,
        routes: RoutesState | None = None,
    ) -> None:
        self._rooms = rooms
        self._routes = routes
        self._server = server
        self._versions = versions
        self._runners = runners
        self._counts = counts
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("parbake_start_time_seconds", "Unix time of the start.", self._server.started)
        yield GaugeMetricFamily("parbake_fronts", "Front processes running.", self._server.fronts)
        yield CounterMetricFamily(
            "parbake_front_restarts", "Front processes started again.", self._server.front_restarts
        )
        yield GaugeMetricFamily(
            "parbake_plan_generation", "Changes of what is served.", self._server.generation
        )
        yield GaugeMetricFamily("parbake_connections", "Open HTTP connections.", self._counts.connections)
        yield from self._of_registry()
        yield from self._of_versions()
        yield from self._of_heads()
        yield from self._of_runners()
        yield from self._of_rooms()
        yield from self._of_requests()
        yield from self._of_routes()
        yield from self._of_clients()
        yield from self._of_traffic()
        yield from self._of_log()
        yield from self._of_jobs()

    def _of_registry(self) -> Iterator[Metric]:
        following = self._server.following
        if not following:
            return
        yield GaugeMetricFamily(
            "parbake_registry_away_since_timestamp_seconds",
            "Unix time since which the registry does not answer; 0 while it does.",
            max(item.away_since for item in following),
        )
        behind = GaugeMetricFamily(
            "parbake_reference_behind",
            "1: what a reference to the registry means now is not what is served (the log says why); else 0.",
            labels=("deployment", "reference"),
        )
        for item in following:
            behind.add_metric([item.name, item.reference], bool(item.problem))
        yield behind

    def _of_versions(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "parbake_version_info", "What is served.", labels=(*_LABELS, "mode", "digest")
        )
        rows = GaugeMetricFamily("parbake_table_rows", "Keys in the prediction table.", labels=_LABELS)
        expired = GaugeMetricFamily(
            "parbake_table_expired",
            "1: the prediction table is older than the contract's freshness, and is not used; else 0.",
            labels=_LABELS,
        )
        expires = GaugeMetricFamily(
            "parbake_table_expires_timestamp_seconds",
            "Unix time at which the prediction table expires, where the contract limits its age.",
            labels=_LABELS,
        )
        for version in self._versions:
            labels = [version.name, version.version]
            info.add_metric([*labels, version.mode, version.digest], 1)
            if version.mode != "dynamic":
                rows.add_metric(labels, version.table_rows)
            if version.table_expires is not None:
                expired.add_metric(
                    labels, bool(version.table_expires) and time.time() > version.table_expires
                )
            if version.table_expires:
                expires.add_metric(labels, version.table_expires)
        yield info
        yield rows
        yield expired
        yield expires

    def _of_heads(self) -> Iterator[Metric]:
        rows = GaugeMetricFamily("parbake_head_rows", "Predictions in the learned head.", labels=_LABELS)
        size = GaugeMetricFamily("parbake_head_bytes", "Memory of the learned head.", labels=_LABELS)
        changes = CounterMetricFamily(
            "parbake_head_changes",
            "Predictions stored in the learned head, evicted, refused, expired, or baked ahead (warmed).",
            labels=(*_LABELS, "change"),
        )
        joined = CounterMetricFamily(
            "parbake_joined_rows", "Rows answered together with an identical one under way.", labels=_LABELS
        )
        for item in self._counts.versions:
            if item.head is None:
                continue
            labels = [item.name, item.version]
            rows.add_metric(labels, item.head.rows)
            size.add_metric(labels, item.head.bytes)
            joined.add_metric(labels, item.head.joined)
            for change in ("stored", "evicted", "refused", "expired", "warmed"):
                changes.add_metric([*labels, change], getattr(item.head, change))
        yield rows
        yield size
        yield changes
        yield joined

    def _of_runners(self) -> Iterator[Metric]:
        restarts = CounterMetricFamily(
            "parbake_runner_restarts", "Runner processes started again.", labels=_LABELS
        )
        up = GaugeMetricFamily("parbake_runners_up", "Runner processes running.", labels=_LABELS)
        for runner in self._runners:
            restarts.add_metric([runner.name, runner.version], runner.restarts)
            up.add_metric([runner.name, runner.version], runner.up)
        yield restarts
        yield up

    def _of_rooms(self) -> Iterator[Metric]:
        rooms = self._rooms
        if rooms is None:
            return
        models = rooms.models
        yield GaugeMetricFamily(
            "parbake_models_loaded",
            "Models loaded on demand that are in memory.",
            sum(m.loaded for m in models),
        )
        yield GaugeMetricFamily(
            "parbake_models_bytes", "Memory of those models.", sum(m.bytes for m in models if m.loaded)
        )
        yield GaugeMetricFamily(
            "parbake_models_budget_bytes", "Memory that they may take; 0 for no limit.", rooms.memory_bytes
        )
        yield CounterMetricFamily(
            "parbake_room_restarts",
            "Processes of models loaded on demand that were started again.",
            rooms.restarts,
        )
        size = GaugeMetricFamily(
            "parbake_model_bytes", "Memory of a model loaded on demand that is in memory.", labels=_LABELS
        )
        loads = CounterMetricFamily("parbake_model_loads", "Loads of models on demand.")
        evictions = CounterMetricFamily(
            "parbake_model_evictions", "Models put away because others needed the memory."
        )
        for model in models:
            # Those that sleep are many, and there is nothing to say of them.
            if model.loaded:
                size.add_metric([model.name, model.version], model.bytes)
        loads.add_metric([], sum(m.loads for m in models))
        evictions.add_metric([], sum(m.evictions for m in models))
        yield size
        yield loads
        yield evictions
        cold = HistogramMetricFamily(
            "parbake_model_load_seconds", "Time from a model being wanted to its being loaded."
        )
        counted = Histogram(list(rooms.load_counts), rooms.load_seconds)
        cold.add_metric([], _buckets(counted, rooms.load_bounds_s), counted.sum)
        yield cold

    def _of_traffic(self) -> Iterator[Metric]:
        of = ("deployment",)
        keys = GaugeMetricFamily("parbake_traffic_keys", "Different keys asked for (an estimate).", labels=of)
        peakedness = GaugeMetricFamily(
            "parbake_traffic_peakedness", "0: all keys alike; 1: one key is all that is asked for.", labels=of
        )
        first = GaugeMetricFamily(
            "parbake_traffic_first_touch_ratio", "Share of rows that were the first of their key.", labels=of
        )
        turnover = GaugeMetricFamily(
            "parbake_traffic_turnover_ratio",
            "Share of the head's weight that is gone from one minute to the next.",
            labels=of,
        )
        for name, traffic in self._traffic.items():
            keys.add_metric([name], traffic.cardinality.value)
            peakedness.add_metric([name], traffic.peakedness)
            first.add_metric([name], traffic.first_touch_share)
            if traffic.turnover is not None:
                turnover.add_metric([name], traffic.turnover)
        yield keys
        yield peakedness
        yield first
        yield turnover

    def _of_log(self) -> Iterator[Metric]:
        rows = self._counts.log
        if rows is None:
            return
        taken = CounterMetricFamily(
            "parbake_log_rows",
            "Rows given to the prediction log: written, sampled_out, dropped_ring (it could not keep up), "
            "dropped_disk.",
            labels=("outcome",),
        )
        for outcome in ("written", "sampled_out", "dropped_ring", "dropped_disk"):
            taken.add_metric([outcome], getattr(rows, outcome))
        yield taken
        yield GaugeMetricFamily("parbake_log_files", "Files of the prediction log.", rows.files)
        yield GaugeMetricFamily("parbake_log_bytes", "Size of the prediction log.", rows.bytes)

    def _of_jobs(self) -> Iterator[Metric]:
        jobs = self._counts.jobs
        if jobs is None:
            return
        waiting = GaugeMetricFamily(
            "parbake_jobs", "Jobs without an answer, queued or running.", labels=("deployment", "state")
        )
        oldest = GaugeMetricFamily(
            "parbake_jobs_oldest_age_seconds",
            "Age of the oldest job without an answer.",
            labels=("deployment",),
        )
        for name in jobs.taken.keys() | jobs.ended.keys() | jobs.depths.keys():
            depth = jobs.depths.get(name, JobDepth(0, 0, 0.0))
            waiting.add_metric([name, "queued"], depth.queued)
            waiting.add_metric([name, "running"], depth.running)
            oldest.add_metric([name], depth.oldest_s)
        yield waiting
        yield oldest
        taken = CounterMetricFamily("parbake_jobs_taken", "Jobs that were taken.", labels=("deployment",))
        for name, count in jobs.taken.items():
            taken.add_metric([name], count)
        yield taken
        ended = CounterMetricFamily(
            "parbake_jobs_ended",
            "Jobs that came to an end: done, failed (the answer is an error), dead (given up), cancelled.",
            labels=("deployment", "outcome"),
        )
        for name, outcomes in jobs.ended.items():
            for outcome, count in outcomes.items():
                ended.add_metric([name, outcome], count)
        yield ended
        yield GaugeMetricFamily(
            "parbake_jobs_bytes", "Size of the queue of jobs, results that are kept included.", jobs.bytes
        )

    def _of_routes(self) -> Iterator[Metric]:
        state, counts = self._routes, self._counts.routes
        if state is None:
            return
        weight = GaugeMetricFamily(
            "parbake_route_weight", "Share of the keys that a version has by its weight.", labels=_LABELS
        )
        revision = GaugeMetricFamily(
            "parbake_route_revision", "Number of the route in force.", labels=("deployment",)
        )
        for route in state.routes:
            revision.add_metric([route.deployment], route.revision)
            for arm in route.arms:
                share = float(arm.version == route.champion) if route.killed else arm.weight
                weight.add_metric([route.deployment, arm.version], share)
        yield weight
        yield revision
        requests = CounterMetricFamily(
            "parbake_routed_requests",
            "Requests that a route gave to a version, by reason (weights, rule, kill, absent); rescued are those of "
            "them that the champion answered in its place.",
            labels=(*_LABELS, "reason"),
        )
        for name, versions in counts.requests.items():
            for version, reasons in versions.items():
                for reason, count in reasons.items():
                    requests.add_metric([name, version, reason], count)
        yield requests
        copies = CounterMetricFamily(
            "parbake_shadow_requests",
            "Copies of requests for a version that shadows: answered, failed, dropped.",
            labels=(*_LABELS, "outcome"),
        )
        rows = CounterMetricFamily(
            "parbake_shadow_rows",
            "Rows that were compared, by whether the answers agree.",
            labels=(*_LABELS, "same"),
        )
        difference = CounterMetricFamily(
            "parbake_shadow_difference",
            "Sum of the absolute differences of the numbers compared.",
            labels=_LABELS,
        )
        values = CounterMetricFamily("parbake_shadow_values", "Numbers that were compared.", labels=_LABELS)
        for name, shadows in counts.shadows.items():
            for version, seen in shadows.items():
                for outcome in ("answered", "failed", "dropped"):
                    copies.add_metric([name, version, outcome], getattr(seen, outcome))
                rows.add_metric([name, version, "yes"], seen.same_rows)
                rows.add_metric([name, version, "no"], seen.rows - seen.same_rows)
                difference.add_metric([name, version], seen.difference)
                values.add_metric([name, version], seen.values)
        yield copies
        yield rows
        yield difference
        yield values
        labels = CounterMetricFamily(
            "parbake_labels",
            "Labels by outcome: accepted, unknown (no prediction was found).",
            labels=("outcome",),
        )
        labels.add_metric(["accepted"], state.labels_accepted)
        labels.add_metric(["unknown"], state.labels_unknown)
        yield labels
        yield CounterMetricFamily(
            "parbake_predictions_untold",
            "Predictions that no label can find, because there was no room for them.",
            state.predictions_untold,
        )

    def _of_clients(self) -> Iterator[Metric]:
        if not self._counts.clients:
            return
        requests = CounterMetricFamily(
            "parbake_client_requests", "Requests let in, by the name of their API key.", labels=("client",)
        )
        for client, count in sorted(self._counts.clients.items()):
            requests.add_metric([client], count)
        yield requests

    def _of_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "parbake_requests",
            "Requests by outcome; the reason is the code of the error.",
            labels=(*_LABELS, "outcome", "reason"),
        )
        rescued = CounterMetricFamily(
            "parbake_fallbacks",
            "Requests that the fallback answered; the reason is the code of the error in whose place it did.",
            labels=(*_LABELS, "reason"),
        )
        rows = CounterMetricFamily("parbake_rows", "Rows answered.", labels=_LABELS)
        hits = CounterMetricFamily(
            "parbake_table_hits",
            "Rows answered from the prediction table or the learned head.",
            labels=_LABELS,
        )
        batches = HistogramMetricFamily("parbake_batch_rows", "Rows per batch of the model.", labels=_LABELS)
        latency = HistogramMetricFamily(
            "parbake_request_duration_seconds",
            "Time in the server by stage: parse, queue, model, total.",
            labels=(*_LABELS, "stage"),
        )
        many = self._rooms is not None and len(self._rooms.models) > MOST_IN_DETAIL
        on_demand = {(m.name, m.version) for m in self._rooms.models} if self._rooms is not None else set()
        for code, count in sorted(self._counts.refused.items()):
            requests.add_metric(["", "", "error", code], count)
        for item in self._counts.versions:
            if item.counts == no_counts() and (item.name, item.version) in on_demand:
                # Of a thousand models most are never asked, and then this is all there would be.
                continue
            labels = [item.name, item.version]
            for outcome, count in sorted(item.counts.outcomes.items()):
                failed = outcome != "ok"
                requests.add_metric([*labels, "error" if failed else "ok", outcome if failed else ""], count)
            for code, count in sorted(item.counts.rescued.items()):
                rescued.add_metric([*labels, code], count)
            rows.add_metric(labels, item.counts.rows)
            hits.add_metric(labels, item.counts.baked_rows)
            brief = many and (item.name, item.version) in on_demand
            if not brief:
                batches.add_metric(
                    labels, _buckets(item.counts.batches, BATCH_BOUNDS), item.counts.batches.sum
                )
            for stage in ("total",) if brief else STAGES:
                histogram = item.counts.stages[stage]
                latency.add_metric([*labels, stage], _buckets(histogram, BOUNDS_S), histogram.sum)
        yield requests
        yield rescued
        yield rows
        yield hits
        yield batches
        yield latency


def _buckets(histogram: Histogram, bounds: Sequence[float]) -> list[tuple[str, float]]:
    """Cumulative counts, as the text format wants them."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(float, bounds), float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), total))
    return buckets
