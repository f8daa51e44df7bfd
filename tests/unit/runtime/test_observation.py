"""Observations add up like the whiles they are of, and every value has a bin."""

from __future__ import annotations

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from parbake.runtime.observation import (
    LATENCY_EDGES_MS,
    MOST_BINS,
    Bins,
    Observation,
    empty,
    latency_bucket,
)

SEGMENTS = st.sampled_from(["", "north", "süd"])
COUNTS = st.lists(st.integers(0, 50), max_size=4).map(tuple)
WHOLE = st.integers(-1000, 1000).map(float)
OBSERVATIONS = st.builds(
    Observation,
    st.integers(0, 1000),
    st.integers(0, 1000),
    COUNTS,
    st.dictionaries(SEGMENTS, COUNTS),
    st.dictionaries(SEGMENTS, st.tuples(st.integers(0, 50), WHOLE, WHOLE)),
    st.dictionaries(SEGMENTS, st.tuples(st.integers(0, 50), st.integers(0, 50))),
    st.tuples(st.integers(0, 50), st.integers(0, 50)),
)


@given(OBSERVATIONS, OBSERVATIONS, OBSERVATIONS)
def test_whiles_add_up_in_any_order(one: Observation, two: Observation, three: Observation) -> None:
    assert one.add(two) == two.add(one)
    assert one.add(two).add(three) == one.add(two.add(three))


@given(OBSERVATIONS, OBSERVATIONS)
def test_the_increase_and_what_was_before_are_the_whole(before: Observation, more: Observation) -> None:
    now = before.add(more)
    assert now.minus(before).add(before) == now
    assert now.minus(now).add(empty()).requests == 0


@given(OBSERVATIONS)
def test_an_observation_survives_the_wire(one: Observation) -> None:
    assert msgspec.json.decode(msgspec.json.encode(one), type=Observation) == one


@given(st.floats(allow_nan=True))
def test_every_latency_has_the_bucket_that_its_edges_say(ms: float) -> None:
    at = latency_bucket(ms)
    if ms == ms:
        assert ms <= LATENCY_EDGES_MS[at]
        assert at == 0 or ms > LATENCY_EDGES_MS[at - 1]
    else:
        assert at == len(LATENCY_EDGES_MS) - 1


def test_a_counter_that_fell_is_told_from_counts() -> None:
    assert Observation(3, 1).minus(Observation(10, 4)).fault() == "-3 failures of -7 requests"
    assert Observation(tries={"": (3, 4)}).fault() == "4 failures of 3 keys"
    assert Observation(paired=(0, -1)).fault() is not None
    assert Observation(10, 1, labels={"": (1, math.nan, 0.0)}).fault() is not None
    assert Observation(10, 1, (4, 6), {"": (3, 7)}, {"": (2, 1.0, 1.0)}).fault() is None


@given(st.lists(st.floats()), st.one_of(st.floats(), st.text()))
def test_every_value_has_a_bin(values: list[float], value: float | str) -> None:
    bins = Bins.of_numbers(values)
    assert bins.edges == tuple(sorted(set(bins.edges)))
    assert 0 <= bins.place(value) < bins.count <= MOST_BINS + 1


@given(st.lists(st.text(), min_size=1), st.text())
def test_every_class_has_a_bin_of_its_own(names: list[str], other: str) -> None:
    bins = Bins.of_classes(names)
    assert len({bins.place(name) for name in bins.classes}) == len(bins.classes)
    assert bins.place(other) < bins.count
