"""A version that takes over has what the one before it has, as long as that is fresh and fits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from parbake.serving.head import Head, Row
from parbake.serving.warm import Handover

SHAPES = ((1,),)


def key(number: int) -> bytes:
    return int(number).to_bytes(16, "little")


def row(number: int) -> Row:
    return Row((key(number),), SHAPES)


def made(rows: int, clock: list[float] | None = None, freshness_s: float | None = None) -> Head:
    times = clock or [0.0]
    return Head(most_rows=rows, most_bytes=1 << 24, clock=lambda: times[0], freshness_s=freshness_s)


def filled(head: Head, keys: int, requests: int) -> Head:
    """A head after Zipf traffic: small numbers are asked for most."""
    weights = 1 / np.arange(1, keys + 1)
    for number in np.random.default_rng(0).choice(keys, requests, p=weights / weights.sum()).tolist():
        if head.get(key(number)) is None:
            head.store(key(number), row(number), b"old")
    return head


def handover(new: Head, old: Head, *, same_bundle: bool) -> Handover:
    # All that it asks of a version is the key of a row.
    served = cast("Any", SimpleNamespace(head_key=lambda row: row.raws[0]))
    return Handover(served, new, old, same_bundle=same_bundle)


def test_the_hottest_are_copied_where_not_all_fit() -> None:
    old, new = filled(made(100), 1000, 20_000), made(20)
    asyncio.run(handover(new, old, same_bundle=True).copy())
    assert new.rows == 20
    assert all(new.holds(key(number)) for number in range(10))


def test_what_is_missing_comes_with_the_share_of_hits_that_is_there() -> None:
    old, new = filled(made(100), 1000, 20_000), made(100)
    over = handover(new, old, same_bundle=False)
    missing, share = asyncio.run(over.missing())
    assert share == 0
    assert len(missing) == 100
    shares, left = [share], missing
    for name, its_row in missing:
        assert new.warm(name, its_row, b"new")
        left, share = asyncio.run(over.missing())
        shares.append(share)
    assert not left
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # The hottest come first: half of the rows have much more than half of the hits.
    assert shares[50] > 0.6


def test_what_the_old_one_dropped_makes_room() -> None:
    old, new = filled(made(50), 1000, 5000), made(50)
    over = handover(new, old, same_bundle=False)
    for name, its_row in asyncio.run(over.missing())[0]:
        new.warm(name, its_row, b"new")
    # Another head of the traffic altogether.
    for number in range(5000, 5050):
        for _ in range(100):
            if old.get(key(number)) is None:
                old.store(key(number), row(number), b"old")
    missing, share = asyncio.run(over.missing())
    assert share < 0.5
    assert new.rows + len(missing) == 50
    assert all(new.warm(name, its_row, b"new") for name, its_row in missing)


def test_what_is_not_fresh_any_more_counts_as_missing() -> None:
    clock = [0.0]
    old, new = made(10, clock, 1.0), made(10, clock, 1.0)
    over = handover(new, old, same_bundle=False)
    for number in range(5):
        old.store(key(number), row(number), b"old")
        new.warm(key(number), row(number), b"new")
    assert asyncio.run(over.missing()) == ([], 1.0)
    clock[0] = 1.5
    for number in range(5):
        old.store(key(number), row(number), b"old")
    missing, share = asyncio.run(over.missing())
    assert (len(missing), share, new.rows) == (5, 0.0, 0)


def test_counts_are_taken_over() -> None:
    old, new = filled(made(100), 1000, 20_000), made(100)
    asyncio.run(handover(new, old, same_bundle=False).learn())
    asyncio.run(handover(new, old, same_bundle=True).copy())
    assert set(new.held()) == set(old.held())
    assert hazards(new) == hazards(old)


def hazards(head: Head) -> dict[bytes, float]:
    places, found = head.hazards()
    return {head._names[place]: hazard for place, hazard in zip(places.tolist(), found.tolist(), strict=True)}
