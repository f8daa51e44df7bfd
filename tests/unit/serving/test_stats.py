"""Counting: every request once, in the right bucket, however it is summed up."""

from __future__ import annotations

import bisect
import time

from hypothesis import given
from hypothesis import strategies as st

from parbake.serving.stats import BATCH_BOUNDS, BOUNDS_S, FOLD_AT, STAGES, Counts, Stats, no_counts

SECONDS = st.floats(0, 20)
REQUEST = st.tuples(
    SECONDS, SECONDS, st.one_of(st.just(0.0), SECONDS), SECONDS, st.integers(1, 9), st.integers(0, 9)
)


def bucket(value: float, bounds: tuple[float, ...]) -> int:
    """The first bucket whose upper bound is not below the value."""
    return bisect.bisect_left(bounds, value)


@given(
    st.lists(REQUEST, max_size=30),
    st.lists(st.tuples(st.integers(1, 5000), SECONDS), max_size=20),
    st.lists(st.sampled_from(["overloaded", "invalid_input"]), max_size=9),
)
def test_every_request_is_counted_once_in_its_bucket(
    requests: list[tuple[float, float, float, float, int, int]],
    batches: list[tuple[int, float]],
    refused: list[str],
) -> None:
    stats = Stats()
    for request in requests:
        stats.answered(*request)
    for batch in batches:
        stats.batch(*batch)
    for code in refused:
        stats.refused(code)
    counts = stats.counts(1000)
    expected = no_counts()
    for *stages, rows, baked_rows in requests:
        for name, value in zip(STAGES, stages, strict=True):
            if name in ("queue", "model") and not stages[2]:
                continue
            expected.stages[name].counts[bucket(value, BOUNDS_S)] += 1
        expected.rows += rows
        expected.baked_rows += baked_rows
    for rows, _ in batches:
        expected.batches.counts[bucket(rows, BATCH_BOUNDS)] += 1
    for code in ["ok"] * len(requests) + refused:
        expected.outcomes[code] = expected.outcomes.get(code, 0) + 1
    assert {name: h.counts for name, h in counts.stages.items()} == {
        n: h.counts for n, h in expected.stages.items()
    }
    assert counts.batches.counts == expected.batches.counts
    assert counts.outcomes == expected.outcomes
    assert (counts.rows, counts.baked_rows) == (expected.rows, expected.baked_rows)
    assert counts.executions == len(batches)
    assert counts.last_ms == (1000 if requests else 0)


def test_a_long_log_is_summed_up_by_itself_and_nothing_is_lost() -> None:
    stats = Stats()
    most = 0
    for _ in range(5000):
        stats.answered(0.001, 0.001, 0.001, 0.003, 1, 0)
        most = max(most, len(stats.log))
    assert most <= FOLD_AT
    counts = stats.counts(2000)
    assert counts.outcomes == {"ok": 5000}
    assert sum(counts.stages["total"].counts) == 5000
    assert counts.last_ms == 2000


def test_when_the_last_request_came_is_known_though_the_log_was_just_summed_up() -> None:
    stats = Stats()
    for _ in range(FOLD_AT // 6):
        stats.answered(0.001, 0.001, 0.001, 0.003, 1, 0)
    assert not stats.log
    assert stats.counts(3000).last_ms == 3000
    assert stats.counts(4000).last_ms == 3000


@given(st.lists(st.lists(REQUEST, max_size=8), max_size=4))
def test_the_counts_of_several_fronts_add_up(
    fronts: list[list[tuple[float, float, float, float, int, int]]],
) -> None:
    total = no_counts()
    together = Stats()
    for now, requests in enumerate(fronts, start=1):
        stats = Stats()
        for request in requests:
            stats.answered(*request)
            together.answered(*request)
        total.add(stats.counts(now))
    whole: Counts = together.counts(int(time.time()))
    assert total.outcomes == whole.outcomes
    assert total.rows == whole.rows
    assert {n: h.counts for n, h in total.stages.items()} == {n: h.counts for n, h in whole.stages.items()}
