"""Replies are remembered for bodies that come again, within a limit over all endpoints."""

from __future__ import annotations

from parbake.transports.http.memo import Known, ReplyMemo

KNOWN: Known = (b"k" * 16, b"record", b"reply", b"row")


def test_a_body_is_kept_when_it_comes_the_second_time() -> None:
    memo = ReplyMemo()
    shelf = memo.shelf()
    memo.offer(shelf, b"body", KNOWN)
    assert shelf == {}
    memo.offer(shelf, b"body", KNOWN)
    assert shelf == {b"body": KNOWN}


def test_a_long_body_is_not_kept() -> None:
    memo = ReplyMemo()
    shelf = memo.shelf()
    for _ in range(2):
        memo.offer(shelf, b"x" * 5000, KNOWN)
    assert shelf == {}


def test_all_shelves_share_one_limit() -> None:
    memo = ReplyMemo(limit_bytes=5000)
    one, other = memo.shelf(), memo.shelf()
    filled = False
    for _ in range(2):
        for i in range(1000):
            memo.offer(one if i % 2 else other, b"%d" % i, KNOWN)
            held = sum(len(body) + 400 for shelf in (one, other) for body in shelf)
            assert held <= 5000
            filled = filled or bool(one and other)
    # Now and then all of it is forgotten.
    assert filled
