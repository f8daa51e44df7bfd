"""Frames between fronts and runners: what goes in comes out, and a torn frame is never read as another."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.runtime import wire

NUMBERS = st.integers(0, 2**64 - 1)
TENSORS = st.lists(
    st.tuples(st.binary(max_size=40), st.lists(st.integers(-1, 2**62), max_size=4).map(tuple)), max_size=5
)


@given(NUMBERS, st.integers(0, 2**32 - 1), TENSORS)
def test_a_request_comes_out_as_it_went_in(
    number: int, rows: int, tensors: list[tuple[bytes, tuple[int, ...]]]
) -> None:
    raws, shapes = [raw for raw, _ in tensors], [shape for _, shape in tensors]
    frame = b"".join(wire.request_frame(number, rows, raws, shapes))
    assert wire.frame_length(frame) == len(frame)
    assert wire.read_request(frame) == (number, rows, raws, shapes)


@given(NUMBERS, st.sampled_from([wire.OK, wire.REJECTED, wire.FAILED]), st.floats(0, 1e6), TENSORS)
def test_a_reply_comes_out_as_it_went_in(
    number: int, status: int, seconds: float, tensors: list[tuple[bytes, tuple[int, ...]]]
) -> None:
    raws, shapes = [raw for raw, _ in tensors], [shape for _, shape in tensors]
    frame = b"".join(wire.reply_frame(number, status, seconds, raws, shapes))
    assert wire.frame_length(frame) == len(frame)
    assert wire.read_reply(frame) == (number, status, seconds, raws, shapes)


@given(TENSORS, st.data())
def test_a_frame_that_is_cut_short_is_refused(
    tensors: list[tuple[bytes, tuple[int, ...]]], data: st.DataObject
) -> None:
    raws, shapes = [raw for raw, _ in tensors], [shape for _, shape in tensors]
    request = b"".join(wire.request_frame(7, 3, raws, shapes))
    reply = b"".join(wire.reply_frame(7, wire.OK, 0.5, raws, shapes))
    with pytest.raises(ValueError, match="frame"):
        wire.read_request(request[: data.draw(st.integers(0, len(request) - 1))])
    with pytest.raises(ValueError, match="frame"):
        wire.read_reply(reply[: data.draw(st.integers(0, len(reply) - 1))])
    with pytest.raises(ValueError, match="frame"):
        wire.read_request(request + b"more")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_an_error(data: bytes) -> None:
    for read in (wire.read_request, wire.read_reply):
        try:
            read(data)
        except ValueError:
            continue


@given(TENSORS)
def test_the_length_is_known_as_soon_as_it_is_there(tensors: list[tuple[bytes, tuple[int, ...]]]) -> None:
    raws, shapes = [raw for raw, _ in tensors], [shape for _, shape in tensors]
    frame = b"".join(wire.request_frame(1, 1, raws, shapes))
    assert [wire.frame_length(frame[:size]) for size in range(8)] == [None] * 8
    assert wire.frame_length(bytearray(frame) + b"the next one") == len(frame)


def test_an_absurd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        wire.frame_length(struct.pack("<Q", wire.MAX_FRAME_BYTES + 1))


def test_the_head_of_a_request_can_be_told_without_reading_it() -> None:
    for rows in (0, 1, 77):
        frame = b"".join(wire.request_frame(3, rows, [b"\0" * rows], [(1,)]))
        assert wire.request_head(frame) == (3, rows)
    with pytest.raises(ValueError, match="torn"):
        wire.request_head(b"\0" * 5)


def test_a_goodbye_is_a_reply_to_nothing() -> None:
    frame = b"".join(wire.reply_frame(wire.BYE, wire.OK, 0.0, (), ()))
    assert wire.frame_length(frame) == len(frame)
    assert wire.read_reply(frame)[0] == wire.BYE == 0
