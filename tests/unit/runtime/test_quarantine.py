"""What ended a process is known again, for a while, and only that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.errors import RowQuarantined
from parbake.runtime.quarantine import Quarantine, fingerprint

SHAPES = ((1,), ())
tensors = st.lists(st.binary(max_size=12), min_size=1, max_size=3)


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_twice_alone_is_enough_and_company_is_no_proof() -> None:
    quarantine = Quarantine("eta", Clock())
    assert not quarantine.found
    for _ in range(5):
        quarantine.accuse([b"a", b"b"], SHAPES, alone=False)
    quarantine.accuse([b"a", b"b"], SHAPES, alone=True)
    assert quarantine.suspects([b"a", b"b"], SHAPES)
    assert not quarantine.suspects([b"a", b"c"], SHAPES)
    quarantine.accuse([b"a", b"b"], SHAPES, alone=True)
    with pytest.raises(RowQuarantined, match="'eta' loses its process"):
        quarantine.suspects([b"a", b"b"], SHAPES)
    assert quarantine.rows == 1


def test_who_was_answered_is_no_suspect_any_more() -> None:
    quarantine = Quarantine("eta", Clock())
    quarantine.accuse([b"a", b"b"], SHAPES, alone=True)
    quarantine.acquit([b"a", b"b"], SHAPES)
    assert not quarantine.found
    quarantine.accuse([b"a", b"b"], SHAPES, alone=True)
    assert quarantine.suspects([b"a", b"b"], SHAPES)


def test_it_does_not_last_for_good() -> None:
    clock = Clock()
    quarantine = Quarantine("eta", clock)
    quarantine.take([b"a", b"b"], SHAPES)
    clock.now += 599
    with pytest.raises(RowQuarantined):
        quarantine.suspects([b"a", b"b"], SHAPES)
    clock.now += 1
    assert quarantine.rows == 0
    assert not quarantine.suspects([b"a", b"b"], SHAPES)


def test_it_does_not_grow_without_end() -> None:
    quarantine = Quarantine("eta", Clock())
    for number in range(3000):
        quarantine.take([b"%d" % number], ((1,),))
    assert quarantine.rows == len(quarantine.found) == 1024
    assert not quarantine.suspects([b"0"], ((1,),))
    with pytest.raises(RowQuarantined):
        quarantine.suspects([b"2999"], ((1,),))


@given(tensors, tensors)
def test_a_fingerprint_tells_what_stands_where(ours: list[bytes], theirs: list[bytes]) -> None:
    same = fingerprint(ours, [(1,)] * len(ours)) == fingerprint(theirs, [(1,)] * len(theirs))
    assert same == (ours == theirs)
    assert fingerprint(ours, [(1,)] * len(ours)) != fingerprint(ours, [(2,)] * len(ours))
