"""The learned head: its budget holds always, what it answers is what was stored, and it learns what will be asked."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.serving import head as module
from parbake.serving.head import ENTRY_BYTES, Head, Row


def row(size: int = 8) -> Row:
    return Row((b"r" * size,), ((size,),))


def key(number: int) -> bytes:
    return int(number).to_bytes(16, "little")


def make(rows: int = 10, size: int = 1 << 30, **rest: object) -> Head:
    return Head(most_rows=rows, most_bytes=size, clock=lambda: 0.0, **rest)  # type: ignore[arg-type]  # rest is typed by the tests


def coverage(head: Head, trace: npt.NDArray[np.int64]) -> float:
    """Share of the requests answered from the head, which is offered every answer that it did not have."""
    hits = 0
    for number in trace.tolist():
        if head.get(key(number)) is not None:
            hits += 1
        else:
            head.store(key(number), row(), b"answer")
    return hits / len(trace)


def lru(rows: int, trace: npt.NDArray[np.int64]) -> float:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in trace.tolist():
        if number in held:
            hits += 1
            held.move_to_end(number)
            continue
        if len(held) >= rows:
            held.popitem(last=False)
        held[number] = None
    return hits / len(trace)


def best_fixed(rows: int, trace: npt.NDArray[np.int64]) -> float:
    """Coverage of the best set chosen in hindsight, first touches not counted."""
    counts = np.sort(np.unique(trace, return_counts=True)[1])[::-1]
    return float((counts[:rows] - 1).sum() / len(trace))


def zipf(s: float, keys: int, requests: int) -> npt.NDArray[np.int64]:
    weights = 1 / np.arange(1, keys + 1) ** s
    return np.random.default_rng(0).choice(keys, requests, p=weights / weights.sum())


@given(
    operations=st.lists(
        st.tuples(st.sampled_from("gsrwx"), st.integers(0, 30), st.integers(0, 3)), max_size=300
    ),
    rows=st.integers(0, 8),
    room=st.integers(0, 8),
)
def test_the_budget_holds_and_answers_are_what_was_stored(
    operations: list[tuple[str, int, int]], rows: int, room: int
) -> None:
    now = 0.0
    most_bytes = room * (ENTRY_BYTES + 64)
    head = Head(most_rows=rows, most_bytes=most_bytes, clock=lambda: now, freshness_s=5.0)
    stored: dict[bytes, tuple[bytes, float]] = {}
    for kind, number, size in operations:
        now += 0.25
        name = key(number)
        record = bytes([number, size]) * (1 + 4 * size)
        if kind == "g":
            found = head.get(name)
            assert found is None or found == stored[name][0]
        elif kind in "sw" and (head.store if kind == "s" else head.warm)(name, row(4 * size), record):
            stored[name] = (record, now)
        elif kind == "r" and head.holds(name):
            head.refresh(name, record)
            stored[name] = (record, now)
        elif kind == "x":
            head.expire()
            for held, _ in hottest_of(head):
                assert stored[held][1] > now - 5.0
        assert head.rows <= rows
        assert head.bytes <= most_bytes + 64
        assert head.rows == len(hottest_of(head))
        assert (head.bytes == 0) == (head.rows == 0)


@given(
    stored=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    many=st.lists(st.lists(st.integers(0, 50), min_size=64, max_size=300), min_size=1, max_size=3),
    few=st.lists(st.integers(0, 50), max_size=63),
    rows=st.integers(1, 20),
)
def test_requests_taken_in_many_at_once_count_as_those_taken_in_one_by_one(
    stored: list[int], many: list[list[int]], few: list[int], rows: int
) -> None:
    at_once, one_by_one = make(rows), make(rows)
    for head in (at_once, one_by_one):
        for number in stored:
            head.store(key(number), row(), b"answer")
    for asked in (*many, few):
        # Some of the keys were never heard of.
        for head, most in ((at_once, None), (one_by_one, 1)):
            head.all_asked([key(number) for number in asked])
            while head.settle(most):
                pass
        assert_same(at_once, one_by_one)
    # What was learned of them shows after the next census.
    for number in range(1000, 1600):
        for head in (at_once, one_by_one):
            head.store(key(number), row(), b"answer")
    assert_same(at_once, one_by_one)


def assert_same(one: Head, other: Head) -> None:
    (places, hazards), (other_places, other_hazards) = one.hazards(), other.hazards()
    assert places.tolist() == other_places.tolist()
    assert hazards.tolist() == pytest.approx(other_hazards.tolist(), rel=1e-12)
    # Of all classes, not only of those in which a key is held just now.
    assert one._hazards.tolist() == pytest.approx(other._hazards.tolist(), rel=1e-12)


def test_more_requests_than_are_taken_in_at_once_are_all_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [key(number) for number in np.random.default_rng(0).integers(0, 8, 1000).tolist()]
    heads = []
    for most in (10_000, 70):
        monkeypatch.setattr(module, "_LONGEST_PART", most)
        head = make()
        for number in range(8):
            head.store(key(number), row(), b"answer")
        head.all_asked(asked)
        assert head.settle() == 0
        heads.append(head)
    assert_same(*heads)


def test_a_key_that_was_asked_for_more_often_than_sixteen_bits_can_count_is_no_cold_one() -> None:
    head = make()
    for number in (1, 2):
        head.store(key(number), row(), b"answer")
    for _ in range(70):
        head.all_asked([key(1)] * 1000)
        head.settle()
    head.all_asked([key(2)])
    head.all_asked([key(9)] * 100_000)
    assert hottest_of(head)[0][0] == key(1)


def test_a_key_of_its_own_is_the_very_one_that_is_held() -> None:
    head = make()
    head.store(key(1), row(), b"answer")
    assert head.own(key(1)) is head.held()[0]
    # Baked anew from a request that has another object with the same bytes.
    head.store(key(1), row(), b"other")
    assert head.own(key(1)) is head.held()[0]
    assert head.own(key(2)) == key(2)


def hottest_of(head: Head) -> list[tuple[bytes, Row]]:
    """What is held, the likeliest to be asked for first."""
    head.settle()
    places, hazards = head.hazards()
    order = places[np.argsort(-hazards, kind="stable")].tolist()
    return [found for place in order if (found := head.at(place)) is not None]


def test_a_constant_head_is_found() -> None:
    trace = zipf(1.1, 5000, 40_000)
    assert coverage(make(250), trace) > best_fixed(250, trace) - 0.03


def test_recency_is_found() -> None:
    random = np.random.default_rng(1)
    # Each key is asked for a few times within a short while, and never again.
    trace = np.concatenate([n // 4 * 50 + random.integers(0, 50, 100) for n in range(400)])
    assert coverage(make(60), trace) > lru(60, trace) - 0.01


def test_a_loop_is_not_lost_to_itself() -> None:
    trace = np.tile(np.arange(2000), 16)
    assert lru(400, trace) == 0
    assert coverage(make(400), trace) > 0.1


def test_keys_that_come_once_do_not_push_out_the_head() -> None:
    peaked = zipf(1.2, 500, 20_000)
    once = np.arange(1_000_000, 1_020_000)
    trace = np.empty(40_000, np.int64)
    trace[0::2], trace[1::2] = peaked, once
    alone = coverage(make(100), peaked)
    assert coverage(make(100), trace) > 0.9 * alone / 2


def test_a_head_that_moves_is_followed() -> None:
    trace = np.concatenate([zipf(1.2, 2000, 10_000) + 10_000 * part for part in range(4)])
    assert coverage(make(200), trace) > lru(200, trace)


def test_large_records_have_to_be_worth_their_room() -> None:
    head = Head(most_rows=1000, most_bytes=20 * (ENTRY_BYTES + 100), clock=lambda: 0.0)
    for _ in range(50):
        for number in range(30):
            if head.get(key(number)) is None:
                # Every third one is as large as eight others.
                head.store(key(number), row(), b"a" * (2800 if number % 3 == 0 else 60))
    large = sum(head.holds(key(number)) for number in range(0, 30, 3))
    small = sum(head.holds(key(number)) for number in range(30) if number % 3)
    assert small > 2 * large


def test_what_is_not_fresh_any_more_goes_and_what_is_hot_is_named_before() -> None:
    now = 0.0
    head = Head(most_rows=100, most_bytes=1 << 20, clock=lambda: now, freshness_s=10.0)
    for number in range(20):
        head.store(key(number), row(), b"old")
    for _ in range(20):
        for number in range(3):
            head.get(key(number))
    now = 8.0
    head.store(key(50), row(), b"young")
    assert {name for name, _ in head.ageing(3.0, 10)} == {key(n) for n in range(3)}
    assert head.ageing(1.0, 10) == []
    head.refresh(key(1), b"new")
    now = 10.5
    assert head.expire() == 19
    assert head.get(key(0)) is None
    assert head.get(key(1)) == b"new"
    assert head.get(key(50)) == b"young"
    assert (head.rows, head.expired) == (2, 19)


def test_the_successor_knows_the_traffic_and_none_of_the_records() -> None:
    trace = zipf(1.1, 2000, 20_000)
    old = make(100)
    coverage(old, trace)
    hottest = hottest_of(old)
    assert {key(0), key(1), key(2)} <= {name for name, _ in hottest[:30]}
    new = make(100)
    for _ in new.take_over(old):
        assert new.rows == 0
    assert new.rows == 0
    assert new.get(hottest[0][0]) is None
    for name, its_row in hottest:
        assert new.warm(name, its_row, b"by another model")
    more = zipf(1.1, 2000, 5_000)
    assert coverage(new, more) == pytest.approx(coverage(old, more), abs=0.02)


def test_knowledge_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parbake.serving.head._FEWEST_KNOWN", 1000)
    head = make(50)
    for number in range(20_000):
        head.get(key(number % 20))
        head.store(key(number + 100), row(), b"once")
        if number < 20:
            head.store(key(number), row(), b"hot")
    assert len(head._places) <= 1000
    assert len(head._places) + len(head._free) == len(head._names) == len(head._last)
    assert all(head.holds(key(number)) for number in range(20))


def test_below_is_asked_for_what_is_not_held() -> None:
    head = make(10, below={key(7): b"baked"}.get)
    assert head.get(key(7)) == b"baked"
    assert head.get(key(8)) is None
    assert head.rows == 0


def test_a_head_that_holds_all_it_knows_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parbake.serving.head._KNOWN_BYTES", 100)
    # Memory for the history of 20 keys, and for more rows than that.
    head = make(1000, size=4000 + 40 * (ENTRY_BYTES + 30))
    head._most_known = 20
    for number in range(200):
        head.store(key(number), row(), b"answer")
    assert 1 <= head.rows <= 20
    assert len(head._places) <= 20


def test_what_is_known_of_keys_is_within_the_memory() -> None:
    head = make(1_000_000, size=1 << 20)
    for number in range(20_000):
        head.store(key(number), row(), b"answer")
    assert head.bytes + 200 * len(head._names) <= 1 << 20
    assert head.rows > 500
