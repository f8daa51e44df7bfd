"""What becomes of a job, decided from values alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.queue.model import Options, Reply, Request
from parbake.queue.service import Again, Answered, GivenUp, judge, pause_s, share_out

OPTIONS = Options(waiting=10, at_once=4, bytes=1 << 20, keep_s=60, attempts=3, give_up_s=600, lease_s=5)


def refusal(status: int, code: str) -> Reply:
    return Reply(status, (), b'{"error":"why","code":"%s"}' % code.encode())


@pytest.mark.parametrize("status", [200, 202, 204])
def test_a_success_is_the_answer(status: int) -> None:
    reply = Reply(status, (), b"{}")
    assert judge(reply, attempts=1, refusals=0, options=OPTIONS, chance=0.5) == Answered(failed=False)


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 500, 501])
def test_an_error_that_would_be_the_same_again_is_the_answer(status: int) -> None:
    reply = refusal(status, "invalid_input")
    assert judge(reply, attempts=1, refusals=0, options=OPTIONS, chance=0.5) == Answered(failed=True)


@pytest.mark.parametrize(
    ("status", "code", "counted"),
    [
        (503, "overloaded", False),
        (503, "not_ready", False),
        (429, "rate_limited", False),
        (503, "runner_down", True),
        (504, "deadline_exceeded", True),
        (503, "something new", True),
    ],
)
def test_what_says_nothing_of_the_request_is_tried_again(status: int, code: str, counted: bool) -> None:
    verdict = judge(refusal(status, code), attempts=1, refusals=2, options=OPTIONS, chance=1.0)
    assert verdict == Again(1.0, counted, f"{status} {code}: why")
    last = judge(refusal(status, code), attempts=3, refusals=2, options=OPTIONS, chance=1.0)
    if counted:
        assert last == GivenUp(f"attempt 3 of 3 failed: {status} {code}: why")
    else:
        assert isinstance(last, Again), "a refusal before any work is no attempt"


def test_a_refusal_without_words_counts() -> None:
    verdict = judge(Reply(503, (), b"\xff"), attempts=1, refusals=0, options=OPTIONS, chance=0.0)
    assert isinstance(verdict, Again)
    assert verdict.counted


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_pauses_grow_and_end_and_are_spread(before: int, chance: float) -> None:
    pause = pause_s(before, chance)
    assert 0.125 <= pause <= 60
    assert pause <= pause_s(before + 1, chance)
    assert pause_s(before, 1.0) == 2 * pause_s(before, 0.0)


@given(
    st.lists(st.sampled_from("abc"), unique=True),
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2)),
    st.booleans(),
)
def test_no_deployment_takes_all_places(able: list[str], busy: dict[str, int], alone: bool) -> None:
    room = share_out(able, busy, OPTIONS, alone=alone)
    free = OPTIONS.at_once - sum(busy.values())
    assert room.keys() <= set(able)
    for name, places in room.items():
        assert 0 < places <= free
        assert places + busy.get(name, 0) <= (4 if alone else 3)
    if free >= OPTIONS.at_once:
        assert room.keys() == set(able)


def test_a_digest_tells_requests_apart_and_leaves_out_what_does_not_concern_the_body() -> None:
    def request(**more: object) -> Request:
        values = {
            "deployment": "a",
            "version": "",
            "form": "infer",
            "query": b"",
            "headers": (),
            "body": b"x",
        }
        return Request(**{**values, **more})  # type: ignore[arg-type]  # each test gives what fits

    same = request(headers=((b"accept-encoding", b"gzip"), (b"x-request-id", b"7")))
    assert same.digest() == request().digest()
    others: list[dict[str, object]] = [
        {"deployment": "ax", "body": b""}, {"version": "1"}, {"form": "predict"}, {"query": b"x"},
        {"body": b"y"}, {"headers": ((b"content-encoding", b"gzip"),)},
    ]  # fmt: skip
    digests = {request(**other).digest() for other in others}
    assert len(digests | {request().digest()}) == len(others) + 1
