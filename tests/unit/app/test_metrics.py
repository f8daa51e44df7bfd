"""The page for Prometheus: every number where it belongs, and nothing that its parser does not read."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from parbake.app.control import AllCounts, VersionCounts
from parbake.app.metrics import RunnerState, ServerState, VersionState, render
from parbake.app.supervisor import add_counts
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
    counts = AllCounts((VersionCounts("eta", "1", counted().counts(5)),), 4, {"model_not_found": 7})
    page = samples(
        render(
            ServerState(1000.0, 2, 1, 3),
            [
                VersionState("eta", "1", "hybrid", "sha256:0", 99),
                VersionState("b", "1", "dynamic", "sha256:1", 0),
            ],
            [RunnerState("eta", "1", 5, 1)],
            counts,
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


def test_buckets_are_cumulative_and_end_with_everything() -> None:
    counts = AllCounts((VersionCounts("eta", "1", counted().counts(5)),))
    page = samples(render(ServerState(0, 1, 0, 1), [], [], counts))
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
    page = samples(render(ServerState(0, 1, 0, 1), [], [RunnerState(name, "1", 1, 1)], AllCounts(())))
    assert value(page, "parbake_runners_up", deployment=name, version="1") == 1
