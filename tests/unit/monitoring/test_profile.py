"""The traffic profile: within its stated errors, whatever is merged in whatever order."""

from __future__ import annotations

import base64
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parbake.contract.key import key_of
from parbake.monitoring.model import Traffic
from parbake.monitoring.profile import (
    TrafficProfile,
    exact_traffic,
    ids_of,
    ids_of_numbers,
    profile_of,
)
from parbake.monitoring.sketches import FrequentKeys, Ids, KeySample
from parbake.monitoring.trace import shifting_keys, zipf_keys

STREAM = st.lists(st.integers(0, 40), max_size=300)


def counted(numbers: list[int]) -> tuple[Ids, np.ndarray]:
    return np.unique(ids_of_numbers(np.array(numbers, np.int64)), return_counts=True)


def curve_error(found: Traffic, exact: Traffic) -> float:
    return max(abs(found.share_of(point.keys) - point.share) for point in exact.curve)


def assert_bounds_hold(sketch: FrequentKeys, numbers: list[int]) -> None:
    truth = dict(zip(*(part.tolist() for part in counted(numbers)), strict=True))
    tracked = dict(zip(sketch.ids.tolist(), zip(sketch.seen, sketch.missed, strict=True), strict=True))
    assert len(tracked) <= sketch.capacity
    assert sketch.total == len(numbers)
    assert sketch.floor <= sketch.total / sketch.capacity
    assert (np.diff(sketch.ids.astype(object)) > 0).all()
    for key, count in truth.items():
        if key in tracked:
            seen, missed = tracked[key]
            assert seen <= count <= seen + missed
        else:
            assert count <= sketch.floor


@given(st.lists(STREAM, max_size=6), st.integers(1, 12))
def test_counts_of_frequent_keys_are_within_their_bounds(batches: list[list[int]], capacity: int) -> None:
    sketch = FrequentKeys(capacity)
    for batch in batches:
        sketch.add(*counted(batch))
    assert_bounds_hold(sketch, list(chain(*batches)))


@given(st.lists(STREAM, max_size=4), st.lists(STREAM, max_size=4), st.integers(1, 12))
def test_merged_counts_of_frequent_keys_are_within_their_bounds(
    left: list[list[int]], right: list[list[int]], capacity: int
) -> None:
    sketches = []
    for side in (left, right):
        sketch = FrequentKeys(capacity)
        for batch in side:
            sketch.add(*counted(batch))
        sketches.append(sketch)
    sketches[0].merge(sketches[1])
    assert_bounds_hold(sketches[0], list(chain(*left, *right)))


@given(st.lists(STREAM, max_size=4), st.lists(STREAM, max_size=4), st.integers(1, 12))
def test_a_merged_sample_is_the_sample_of_both_streams_with_exact_counts(
    left: list[list[int]], right: list[list[int]], capacity: int
) -> None:
    sides = [KeySample(capacity), KeySample(capacity)]
    for sample, batches in zip(sides, (left, right), strict=True):
        for batch in batches:
            sample.add(*counted(batch))
    sides[0].merge(sides[1])
    ids, counts = counted(list(chain(*left, *right)))
    assert sides[0].ids.tolist() == ids[:capacity].tolist()
    assert sides[0].counts.tolist() == counts[:capacity].tolist()


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.4])
def test_figures_are_within_their_errors(exponent: float) -> None:
    keys = zipf_keys(exponent, 60_000, 300_000, seed=3)
    exact, found = exact_traffic(keys), profile_of(keys).traffic()
    assert found.requests == 300_000
    # Three standard deviations of the sketch: 0.65 % each.
    assert abs(found.cardinality.value / exact.cardinality.value - 1) < 0.02
    assert abs(found.peakedness - exact.peakedness) < 0.03
    assert curve_error(found, exact) < 0.03


@given(st.floats(0, 2), st.integers(1, 30_000), st.integers(1, 60_000), st.integers(0, 99))
@hypothesis_settings(max_examples=25)
def test_the_coverage_curve_rises_and_its_bounds_hold_the_truth(
    exponent: float, keys: int, requests: int, seed: int
) -> None:
    stream = zipf_keys(exponent, keys, requests, seed)
    found = profile_of(stream).traffic()
    _, counts = np.unique(stream, return_counts=True)
    truth = np.cumsum(-np.sort(-counts)) / requests
    # The cardinality's bounds are probable, not certain; what they move at the curve's end is allowed for.
    slack = 0.0 if found.cardinality.lower == found.cardinality.upper else 0.01
    before = 0.0
    for point in found.curve:
        assert before <= point.share <= 1
        assert point.lower <= point.share + 1e-12
        assert point.share <= point.upper + 1e-12
        exact = truth[min(point.keys, len(truth)) - 1]
        assert point.lower - slack - 1e-9 <= exact <= point.upper + slack + 1e-9
        before = point.share
    assert found.curve[-1].share == 1.0


@pytest.mark.parametrize("exponent", [0.3, 1.1])
def test_the_profile_of_two_fronts_is_that_of_their_common_traffic(exponent: float) -> None:
    keys = zipf_keys(exponent, 40_000, 200_000, seed=5)
    parts = []
    for part in (keys[::2], keys[1::2]):
        front = TrafficProfile(window_s=1.0)
        for index, chunk in enumerate(np.array_split(part, 6)):
            front.feed(chunk, float(index))
        parts.append(TrafficProfile.from_bytes(front.to_bytes()))
    parts[0].merge(parts[1])
    found, exact = parts[0].traffic(), exact_traffic(keys)
    assert found.requests == len(keys)
    assert abs(found.cardinality.value / exact.cardinality.value - 1) < 0.03
    assert curve_error(found, exact) < 0.03
    assert abs(found.peakedness - exact.peakedness) < 0.03
    assert found.turnover is not None
    assert exact.turnover is not None
    assert found.turnover == pytest.approx(exact.turnover, abs=0.12)


def test_hyperloglog_holds_its_stated_error() -> None:
    outside = 0
    for seed in range(20):
        profile = TrafficProfile()
        profile.feed(ids_of_numbers(np.arange(30_000) + seed * 1_000_000), 0.0)
        found = profile.cardinality()
        outside += not found.lower <= 30_000 <= found.upper
        assert found.value == pytest.approx(30_000, rel=0.03)
    # 95 of 100 are inside; four or more of twenty outside would happen once in sixty times.
    assert outside <= 4


def test_few_keys_are_counted_exactly() -> None:
    keys = zipf_keys(1.0, 5_000, 50_000, seed=1)
    found, exact = profile_of(keys).traffic(), exact_traffic(keys)
    assert found.cardinality == exact.cardinality
    assert found.peakedness == pytest.approx(exact.peakedness)
    assert [p.share for p in found.curve] == pytest.approx([p.share for p in exact.curve])
    assert found.head_error == 0


def test_peakedness_is_0_for_flat_traffic_however_long_and_rises_with_the_exponent_to_1() -> None:
    for requests in (1_000, 10_000, 200_000):
        assert exact_traffic(zipf_keys(0.0, 5_000, requests)).peakedness < 0.03
    found = [exact_traffic(zipf_keys(s, 5_000, 100_000)).peakedness for s in (0.0, 0.4, 0.8, 1.0, 1.3, 2.0)]
    assert found == sorted(found)
    assert found[1] > 0.15
    assert found[-1] > 0.95
    assert exact_traffic(ids_of_numbers(np.zeros(100, np.int64))).peakedness == 1.0


def test_peakedness_does_not_change_when_every_key_is_split_into_two() -> None:
    keys = np.repeat(np.arange(100), np.arange(100, 0, -1) * 100)
    twice = np.concatenate([keys, keys + 100])
    assert exact_traffic(ids_of_numbers(twice)).peakedness == pytest.approx(
        exact_traffic(ids_of_numbers(keys)).peakedness, abs=1e-9
    )


def test_turnover_shows_how_much_of_the_head_leaves() -> None:
    steady = profile_of(shifting_keys(1.1, 2_000, 120_000, every=20_000, share=0.0)).turnover()
    moving = profile_of(shifting_keys(1.1, 2_000, 120_000, every=20_000, share=0.5)).turnover()
    assert steady is not None
    assert moving is not None
    assert steady < 0.1
    assert 0.35 < moving < 0.75


def test_the_rate_is_that_of_the_last_window_that_is_over() -> None:
    profile = TrafficProfile(window_s=10.0)
    for second in range(35):
        profile.feed(zipf_keys(1.0, 100, 40 if second < 20 else 70, seed=second), 1000.0 + second)
    assert profile.rate_per_s() == pytest.approx(70)


def test_a_profile_as_bytes_is_small_and_the_same() -> None:
    keys = zipf_keys(0.7, 200_000, 400_000)
    profile = profile_of(keys)
    data = profile.to_bytes()
    assert len(base64.b64encode(data)) < 200_000
    assert TrafficProfile.from_bytes(data).traffic() == profile.traffic()


def test_an_empty_profile_can_be_asked_sent_and_merged() -> None:
    profile = TrafficProfile()
    assert profile.traffic().requests == 0
    again = TrafficProfile.from_bytes(profile.to_bytes())
    again.merge(profile)
    assert again.traffic().curve == ()


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_bytes_that_are_not_a_profile_are_refused(noise: bytes, place: int, value: int) -> None:
    with pytest.raises(ValueError, match="traffic profile"):
        TrafficProfile.from_bytes(noise)
    data = bytearray(profile_of(zipf_keys(1.0, 10, 100)).to_bytes())
    place %= len(data)
    if data[place] != value:
        data[place] = value
        with pytest.raises(ValueError, match="traffic profile"):
            TrafficProfile.from_bytes(bytes(data))


def test_keys_are_counted_by_their_first_eight_bytes() -> None:
    keys = [key_of(bytes([i])) for i in range(5)]
    assert ids_of(keys).tolist() == [int.from_bytes(key[:8], "big") for key in keys]
    with pytest.raises(ValueError, match="16 bytes"):
        ids_of([b"short"])
