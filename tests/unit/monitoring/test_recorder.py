"""The ring between the hot path and the background: bounded, complete, and never in the way."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.where import HEAD, MODEL, REFUSED, TABLE
from parbake.monitoring.recorder import WIDTH, Recorder

KEY = bytes(range(16))


def recorder(rows: int = 100, bytes_limit: int = 1 << 20) -> Recorder:
    return Recorder("eta", "1", "hybrid", "d", rows=rows, bytes_limit=bytes_limit)


@given(st.integers(1, 20), st.lists(st.sampled_from(["note", "turn", "refused", "drain"]), max_size=80))
def test_the_ring_never_holds_more_than_its_limit_and_every_row_is_kept_or_counted(
    limit: int, steps: list[str]
) -> None:
    ring = recorder(limit)
    taken = added = 0
    for step in steps:
        if step == "note":
            ring.note(KEY, HEAD, 0.001, None, None)
            added += 1
        elif step == "turn":
            ring.note_turn(HEAD, [KEY] * 3, [0.001] * 3)
            added += 3
        elif step == "refused":
            ring.refused("overloaded", 0.001)
            added += 1
        else:
            taken += len(ring.drain() or ())
        assert ring.backlog <= limit
    taken += len(ring.drain() or ())
    assert taken + ring.dropped == added


def test_rows_come_out_as_columns_in_the_order_of_arrival() -> None:
    ring = recorder()
    ring.note(KEY, HEAD, 0.5, [b"in"], b"out")
    ring.refused("overloaded", 0.25)
    rows = ring.drain()
    assert rows is not None
    assert rows.keys() == [KEY, b""]
    assert list(rows.where) == [HEAD, REFUSED]
    assert rows.joined == KEY
    assert list(rows.seconds) == [0.5, 0.25]
    assert rows.extras == [[b"in"], "overloaded"]
    assert rows.records == [b"out", None]
    assert rows.times[0] <= rows.times[1]
    assert ring.drain() is None


def test_rows_noted_together_come_out_as_rows() -> None:
    ring = recorder()
    ring.note(KEY, HEAD, 0.5, None, None)
    ring.refused("overloaded", 2.0)
    ring.note_turn(TABLE, [KEY, bytes(16)], [0.25, 0.125])
    ring.note_turn(MODEL, [KEY], [1.0])
    rows = ring.drain()
    assert rows is not None
    assert (len(rows), rows.joined) == (5, KEY + KEY + bytes(16) + KEY)
    assert rows.keys() == [KEY, b"", KEY, bytes(16), KEY]
    assert list(rows.where) == [HEAD, REFUSED, TABLE, TABLE, MODEL]
    assert list(rows.seconds) == [0.5, 2.0, 0.25, 0.125, 1.0]
    assert len(rows.times) == len(rows.extras) == len(rows.records) == 5
    assert rows.times[2] == rows.times[3]
    assert ring.drain() is None
    assert ring.backlog == 0


def test_rows_noted_together_keep_their_inputs_and_outputs() -> None:
    ring = recorder()
    ring.note(KEY, HEAD, 0.5, [b"first"], b"one")
    ring.note_turn(MODEL, [KEY, KEY], [0.25, 0.125], [(b"in",), (b"IN",)], [b"out", b"OUT"])
    ring.note_turn(MODEL, [KEY, KEY], [0.25, 0.125], None, [b"yes", b"YES"])
    ring.note_turn(TABLE, [KEY], [1.0])
    rows = ring.drain()
    assert rows is not None
    assert rows.extras == [[b"first"], (b"in",), (b"IN",), None, None, None]
    assert rows.records == [b"one", b"out", b"OUT", b"yes", b"YES", None]


def test_large_rows_noted_together_fill_the_ring_by_their_bytes() -> None:
    ring = recorder(bytes_limit=1000)
    for _ in range(3):
        ring.note_turn(MODEL, [KEY, KEY], [0.1, 0.1], [(bytes(150),)] * 2, [bytes(50)] * 2)
    assert (ring.backlog, ring.dropped, ring.waiting) == (4, 2, 800)
    assert len(ring.drain() or ()) == 4
    assert ring.waiting == 0


def test_large_inputs_fill_the_ring_by_their_bytes() -> None:
    ring = recorder(bytes_limit=1000)
    for _ in range(5):
        ring.note(KEY, HEAD, 0.1, [bytes(300)], bytes(100))
    assert (len(ring.rows) // WIDTH, ring.dropped) == (2, 3)
    ring.drain()
    ring.note(KEY, HEAD, 0.1, [bytes(300)], bytes(100))
    assert (len(ring.rows) // WIDTH, ring.dropped) == (1, 3)


def test_no_row_is_lost_while_another_thread_drains() -> None:
    ring = recorder(rows=1_000_000)
    done = threading.Event()
    taken = 0

    def drain() -> None:
        nonlocal taken
        while not done.is_set():
            taken += len(ring.drain() or ())
            # Further apart than a thread's turn, as the contract of `drain` has it.
            time.sleep(0.02)

    thread = threading.Thread(target=drain)
    thread.start()
    for _ in range(100_000):
        ring.note(KEY, HEAD, 0.001, None, None)
        ring.note_turn(HEAD, [KEY, KEY], [0.001, 0.002])
    done.set()
    thread.join()
    # What was added while the list was being taken out comes with the next turn.
    for _ in range(2):
        taken += len(ring.drain() or ())
    assert taken + ring.dropped == 300_000
