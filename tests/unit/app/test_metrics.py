"""The page for Prometheus: every number where it belongs, and nothing that its parser does not read."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from parbake.app.control import AllCounts, HeadCounts, LogRows, VersionCounts
from parbake.app.metrics import RunnerState, ServerState, VersionState, render
from parbake.app.supervisor import add_counts
from parbake.monitoring.model import Estimate, Traffic
from parbake.serving.stats import BOUNDS_S, Stats

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(page: Samples, name: str, **labels: str) -> float:
    return page[(name, frozenset(labels.items()))]


def counted() -> Stats:
    stats = Stats()
    stats.answered(0.00001, 0.0002, 0.003, 0.004, 2, 0)
    stats.answered(0.00002, 0.0, 0.0, 0.00003, 1, 1)
    stats.refused("overloaded")
    stats.refused("invalid_input")
    stats.refused("invalid_input")
    stats.batch(2, 0.003)
    return stats


def test_the_page_holds_what_was_counted() -> None:
    head = HeadCounts(rows=6, bytes=70, stored=8, evicted=2, joined=1)
    logged = LogRows(written=5, dropped_ring=2, files=1, bytes=1000)
    counts = AllCounts(
        (VersionCounts("eta", "1", counted().counts(5), head),), 4, {"model_not_found": 7}, logged
    )
    page = samples(
        render(
            ServerState(1000.0, 2, 1, 3),
            [
                VersionState("eta", "1", "hybrid", "sha256:0", 99, 0.0),
                VersionState("b", "1", "dynamic", "sha256:1", 0),
            ],
            [RunnerState("eta", "1", 5, 1)],
            counts,
            {"eta": Traffic(10, Estimate(4, 4, 4), 0.5, 0.4, (), 1.0, 0.25, 0.0)},
        )
    )
    eta = {"deployment": "eta", "version": "1"}
    assert value(page, "parbake_start_time_seconds") == 1000.0
    assert value(page, "parbake_fronts") == 2
    assert value(page, "parbake_front_restarts_total") == 1
    assert value(page, "parbake_plan_generation") == 3
    assert value(page, "parbake_connections") == 4
    assert value(page, "parbake_version_info", **eta, mode="hybrid", digest="sha256:0") == 1
    assert value(page, "parbake_table_rows", **eta) == 99
    assert value(page, "parbake_head_rows", **eta) == 6
    assert value(page, "parbake_head_bytes", **eta) == 70
    assert value(page, "parbake_head_changes_total", **eta, change="evicted") == 2
    assert value(page, "parbake_joined_rows_total", **eta) == 1
    assert value(page, "parbake_traffic_keys", deployment="eta") == 4
    assert value(page, "parbake_traffic_peakedness", deployment="eta") == 0.5
    assert value(page, "parbake_traffic_first_touch_ratio", deployment="eta") == 0.4
    assert value(page, "parbake_traffic_turnover_ratio", deployment="eta") == 0.25
    assert value(page, "parbake_log_rows_total", outcome="written") == 5
    assert value(page, "parbake_log_rows_total", outcome="dropped_ring") == 2
    assert value(page, "parbake_log_bytes") == 1000
    assert ("parbake_table_rows", frozenset({"deployment": "b", "version": "1"}.items())) not in page
    assert value(page, "parbake_runner_restarts_total", **eta) == 5
    assert value(page, "parbake_runners_up", **eta) == 1
    assert value(page, "parbake_requests_total", **eta, outcome="ok", reason="") == 2
    assert value(page, "parbake_requests_total", **eta, outcome="error", reason="overloaded") == 1
    assert value(page, "parbake_requests_total", **eta, outcome="error", reason="invalid_input") == 2
    nobody = {"deployment": "", "version": ""}
    assert value(page, "parbake_requests_total", **nobody, outcome="error", reason="model_not_found") == 7
    assert value(page, "parbake_rows_total", **eta) == 3
    assert value(page, "parbake_table_hits_total", **eta) == 1
    assert value(page, "parbake_batch_rows_count", **eta) == 1
    assert value(page, "parbake_batch_rows_sum", **eta) == 2
    stage = "parbake_request_duration_seconds"
    assert value(page, f"{stage}_count", **eta, stage="total") == 2
    # The row from the table never met the model.
    assert value(page, f"{stage}_count", **eta, stage="queue") == 1
    assert value(page, f"{stage}_count", **eta, stage="model") == 1
    assert abs(value(page, f"{stage}_sum", **eta, stage="total") - 0.00403) < 1e-9


def test_an_expired_table_shows() -> None:
    now = time.time()
    versions = [
        VersionState(name, "1", "hybrid", "sha256:0", 9, expires)
        for name, expires in (("old", now - 5), ("fresh", now + 500), ("ageless", 0.0), ("none", None))
    ]
    page = samples(render(ServerState(0, 1, 0, 1), versions, [], AllCounts(()), {}))
    expired, expires = (
        {dict(labels)["deployment"]: number for (name, labels), number in page.items() if name == wanted}
        for wanted in ("parbake_table_expired", "parbake_table_expires_timestamp_seconds")
    )
    assert expired == {"old": 1, "fresh": 0, "ageless": 0}
    assert expires == {"old": pytest.approx(now - 5), "fresh": pytest.approx(now + 500)}


def test_buckets_are_cumulative_and_end_with_everything() -> None:
    counts = AllCounts((VersionCounts("eta", "1", counted().counts(5)),))
    page = samples(render(ServerState(0, 1, 0, 1), [], [], counts, {}))
    labels = {"deployment": "eta", "version": "1", "stage": "total"}
    buckets = [
        value(page, "parbake_request_duration_seconds_bucket", **labels, le=str(bound)) for bound in BOUNDS_S
    ]
    assert buckets == sorted(buckets)
    assert buckets[BOUNDS_S.index(0.00002)] == 0
    assert buckets[BOUNDS_S.index(0.00005)] == 1
    assert buckets[BOUNDS_S.index(0.002)] == 1
    assert buckets[BOUNDS_S.index(0.005)] == 2
    assert value(page, "parbake_request_duration_seconds_bucket", **labels, le="+Inf") == 2


def test_the_counts_of_fronts_add_up_and_stay_what_they_were() -> None:
    one = AllCounts((VersionCounts("eta", "1", counted().counts(5)),), 1, {"too_large": 1})
    two = AllCounts(
        (VersionCounts("eta", "1", counted().counts(9)), VersionCounts("b", "2", Stats().counts(1))), 2, {}
    )
    total = add_counts([one, two, one])
    eta, b = total.versions
    assert (eta.name, b.name) == ("eta", "b")
    assert eta.counts.outcomes == {"ok": 6, "overloaded": 3, "invalid_input": 6}
    assert eta.counts.rows == 9
    assert eta.counts.last_ms == 9
    assert (total.connections, total.refused) == (4, {"too_large": 2})
    assert one.versions[0].counts.outcomes == {"ok": 2, "overloaded": 1, "invalid_input": 2}
    assert add_counts([]) == AllCounts(())


def test_odd_names_are_written_so_that_they_can_be_read_again() -> None:
    name = 'a"b\\c\nd'
    page = samples(render(ServerState(0, 1, 0, 1), [], [RunnerState(name, "1", 1, 1)], AllCounts(()), {}))
    assert value(page, "parbake_runners_up", deployment=name, version="1") == 1
