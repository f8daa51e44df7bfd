"""What a batch costs is learned from measured batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.runtime.costs import BatchCost

SECONDS = st.floats(0, 1e3)
ROWS = st.integers(1, 4096)


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.lists(ROWS, min_size=2, max_size=40, unique=True))
def test_a_straight_line_is_found(fixed_s: float, row_s: float, sizes: list[int]) -> None:
    cost = BatchCost()
    if max(sizes) < 2 * min(sizes):
        sizes = [*sizes, 3 * max(sizes)]
    for rows in sizes:
        cost.observe(rows, fixed_s + row_s * rows)
    for rows in sizes:
        assert cost.seconds(rows) == pytest.approx(fixed_s + row_s * rows, rel=0.02)


@given(st.lists(st.tuples(ROWS, SECONDS), max_size=60))
def test_whatever_is_measured_the_estimate_stays_usable(batches: list[tuple[int, float]]) -> None:
    cost = BatchCost()
    assert not cost.known
    assert cost.rows_within(0.001, 512) == 512
    for rows, seconds in batches:
        cost.observe(rows, seconds)
        assert cost.known
        assert cost.fixed_s >= 0
        assert cost.row_s >= 0
        assert 1 <= cost.rows_within(0.25, 512) <= 512


def test_batches_of_one_size_put_all_cost_on_the_rows() -> None:
    cost = BatchCost()
    for _ in range(5):
        cost.observe(4, 0.4)
    assert cost.row_s == pytest.approx(0.1)
    assert cost.fixed_s == pytest.approx(0)


def test_what_was_long_ago_is_forgotten() -> None:
    cost = BatchCost()
    cost.observe(1, 100.0)
    for _ in range(400):
        cost.observe(1, 0.01)
    assert cost.seconds(1) < 0.02


def test_the_largest_batch_fits_into_the_time() -> None:
    cost = BatchCost()
    for rows in (1, 10, 100):
        cost.observe(rows, 0.01 + 0.001 * rows)
    assert cost.rows_within(0.11, 1024) in (98, 99, 100, 101, 102)
    # No batch is quicker than a batch: rows go along until they cost as much as it does by itself.
    assert cost.rows_within(0.001, 1024) in (9, 10)


def test_a_batch_of_one_row_does_not_keep_batches_at_one_row() -> None:
    # Given a model that takes its time whatever the size, and one row at first
    cost = BatchCost()
    cost.observe(1, 0.3)
    # When batches are as large as is allowed, then they soon are as large as can be
    sizes = []
    for _ in range(12):
        sizes.append(cost.rows_within(0.25, 1024))
        cost.observe(sizes[-1], 0.3)
    assert sizes[0] == 2
    assert sizes[-1] == 1024


def test_nobody_is_refused_for_a_cost_per_row_that_was_never_measured() -> None:
    cost = BatchCost()
    cost.observe(1, 0.3)
    assert not cost.sloped
    assert cost.waiting_s(2, 40) == pytest.approx(0.6)
    cost.observe(9, 0.3)
    assert cost.sloped
    assert cost.waiting_s(1, 40) == pytest.approx(0.3, rel=0.1)
    assert cost.rows_within(60, 1024) == 1024
