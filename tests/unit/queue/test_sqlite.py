"""The store of jobs: whatever happens in whatever order, nothing acknowledged is lost and a job has one answer."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from parbake.errors import Conflict, Overloaded, ParbakeError, QueueAway, QueueTorn
from parbake.queue.clock import Clock, machine_clock
from parbake.queue.model import OPEN, Claim, NewJob, Options, Reply, Request
from parbake.queue.sqlite import SqliteJobs

OPTIONS = Options(
    waiting=10_000, at_once=8, bytes=1 << 30, keep_s=1000, attempts=3, give_up_s=5000, lease_s=10
)
ROOM = {"eta": 100, "price": 100}


class Time:
    """A clock that a test moves; the one on the wall goes its own way."""

    def __init__(self) -> None:
        self.ticks = 100.0
        self.wall = 1_000_000.0
        self.boot = "first"

    def clock(self) -> Clock:
        return Clock(self.boot, lambda: self.ticks, lambda: self.wall)


def new(number: int, *, name: str = "eta", owner: str = "", key: str = "", body: bytes = b"x") -> NewJob:
    request = Request(name, "", "infer", b"", ((b"content-type", b"a/b"),), body)
    return NewJob(f"job-{number}", owner, key, request)


def reply(words: object) -> Reply:
    return Reply(200, ((b"parbake-version", b"1"),), repr(words).encode())


def claim(store: SqliteJobs, most: int = 1, *, idle: bool = True) -> list[Claim]:
    return store.claim(ROOM, most, OPTIONS, idle=idle)


def filled(
    store: SqliteJobs, numbers: range, size: int, options: Options = OPTIONS
) -> tuple[int, ParbakeError | None]:
    """Take jobs until one is refused; gives how many were taken, and why not more."""
    for taken, number in enumerate(numbers):
        try:
            store.take(new(number, body=bytes(size)), options)
        except ParbakeError as error:
            return taken, error
    return len(numbers), None


def change(folder: Path, statement: str) -> None:
    """Do something to the file that no store would."""
    with closing(sqlite3.connect(folder / "queue" / "jobs.db")) as db, db:
        db.execute(statement)


@pytest.fixture
def moved() -> Time:
    return Time()


@pytest.fixture
def store(tmp_path: Path, moved: Time) -> Iterator[SqliteJobs]:
    opened = SqliteJobs(tmp_path / "queue" / "jobs.db", clock=moved.clock())
    yield opened
    opened.close()


def rows(folder: Path) -> dict[str, int]:
    """What is in the file."""
    with closing(sqlite3.connect(folder / "queue" / "jobs.db")) as db:
        tables = ("jobs", "requests", "replies")
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}


@pytest.mark.parametrize("how", ["forgotten", "too old"])
def test_of_a_job_that_was_given_up_nothing_stays_in_the_end(
    store: SqliteJobs, moved: Time, tmp_path: Path, how: str
) -> None:
    dead(store, 1)
    assert rows(tmp_path) == {"jobs": 1, "requests": 1, "replies": 0}
    if how == "forgotten":
        assert store.forget("job-1")
    else:
        moved.ticks += OPTIONS.keep_s
        store.tidy(OPTIONS)
    assert rows(tmp_path) == {"jobs": 0, "requests": 0, "replies": 0}


def test_a_job_goes_its_way(store: SqliteJobs, moved: Time, tmp_path: Path) -> None:
    assert not store.exists()
    assert store.find("job-1") is None
    assert store.due_in_s() is None
    job, is_new = store.take(new(1, body=b"\0\xff" * 10), OPTIONS)
    assert (job.state, job.attempts, job.age_s, is_new, store.due_in_s()) == ("queued", 0, 0, True, 0)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "queue").iterdir()} == {0o600}
    moved.ticks += 7
    (taken,) = claim(store, 5)
    assert taken.request == new(1, body=b"\0\xff" * 10).request
    assert (taken.attempts, taken.refusals, taken.lost, store.due_in_s()) == (1, 0, 0, 10)
    assert claim(store) == []
    assert store.reply("job-1") is None
    assert store.finish(taken, reply("one"), failed=False)
    assert not store.finish(taken, reply("two"), failed=False)
    job = store.find("job-1")  # type: ignore[assignment]  # it is there
    assert (job.state, job.status, job.age_s, job.finished) == ("done", 200, 7, True)
    assert store.reply("job-1") == reply("one")
    assert store.finished(["job-1", "job-2"]) == ["job-1", "job-2"]
    moved.ticks += 999
    assert store.tidy(OPTIONS) == ([], False)
    assert store.reply("job-1") == reply("one")
    moved.ticks += 1
    store.tidy(OPTIONS)
    assert store.find("job-1") is None
    assert rows(tmp_path) == {"jobs": 0, "requests": 0, "replies": 0}


def test_the_oldest_goes_first_and_a_deployment_without_room_keeps_nobody_waiting(store: SqliteJobs) -> None:
    for number in range(6):
        store.take(new(number, name="price" if number % 2 else "eta"), OPTIONS)
    assert [c.id for c in store.claim({"price": 1, "eta": 1}, 4, OPTIONS, idle=True)] == ["job-0", "job-1"]
    assert [c.id for c in store.claim({"price": 9}, 4, OPTIONS, idle=False)] == ["job-3", "job-5"]
    told = store.find("job-4")
    assert told is not None
    assert told.ahead == 2
    depths, _ = store.depths()
    assert [(d.deployment, d.queued, d.running) for d in depths] == [("eta", 2, 1), ("price", 0, 3)]


def test_a_job_whose_holder_is_silent_is_begun_again_and_has_one_answer(
    store: SqliteJobs, moved: Time
) -> None:
    store.take(new(1), OPTIONS)
    (first,) = claim(store)
    moved.ticks += 6
    assert store.renew([first], 10) == {first.id}
    moved.ticks += 9
    assert claim(store) == []
    moved.ticks += 1
    (second,) = claim(store)
    assert (second.attempts, second.lost) == (2, 1)
    assert not store.renew([first], 10)
    assert store.renew([first, second], 10) == {second.id}
    assert not store.finish(first, reply("first"), failed=False)
    assert not store.put_off(first, 0, counted=True, error="x")
    assert not store.give_up(first, "x")
    assert store.finish(second, reply("second"), failed=True)
    assert store.reply("job-1") == reply("second")


def test_an_answer_after_the_lease_is_kept_where_nobody_else_has_begun(
    store: SqliteJobs, moved: Time
) -> None:
    store.take(new(1), OPTIONS)
    (taken,) = claim(store)
    moved.ticks += 100
    assert store.finish(taken, reply("late"), failed=False)
    assert claim(store) == []


def test_jobs_that_nobody_has_room_for_are_not_gone_through(store: SqliteJobs, tmp_path: Path) -> None:
    store.take(new(1, name="price"), OPTIONS)
    change(
        tmp_path,
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000) "
        "INSERT INTO jobs (id, deployment, version, owner, key, digest, state, taken, created) "
        "SELECT 'many-' || i, deployment, version, owner, key, digest, state, taken, created FROM jobs, n",
    )
    store.take(new(2), OPTIONS)
    steps: list[None] = []
    assert store._connection is not None
    store._connection.set_progress_handler(lambda: steps.append(None), 100)
    assert store.claim({"gone": 3}, 3, OPTIONS, idle=True) == []
    assert [c.id for c in store.claim({"eta": 3}, 3, OPTIONS, idle=True)] == ["job-2"]
    assert len(steps) < 20
    # Where there is room, no more is looked at than there is room for.
    assert [c.id for c in store.claim({"price": 1}, 3, OPTIONS, idle=True)] == ["job-1"]
    assert len(steps) < 40


@pytest.mark.parametrize("how", ["DELETE FROM requests", "UPDATE requests SET headers = x'c1'"])
def test_a_job_whose_request_cannot_be_read_is_dead_and_keeps_no_other(
    store: SqliteJobs, tmp_path: Path, how: str
) -> None:
    for number in (1, 2, 3):
        store.take(new(number), OPTIONS)
    change(tmp_path, f"{how} WHERE number = 1")
    assert [c.id for c in claim(store, 2)] == ["job-2"]
    assert [c.id for c in claim(store, 2)] == ["job-3"]
    told = store.find("job-1")
    assert told is not None
    assert told.state == "dead"
    assert "its request" in told.error
    assert store.finished(["job-1", "job-2"]) == ["job-1"]


def test_an_answer_that_cannot_be_read_is_said_to_be_torn(store: SqliteJobs, tmp_path: Path) -> None:
    store.take(new(1), OPTIONS)
    (taken,) = claim(store)
    store.finish(taken, reply(1), failed=False)
    change(tmp_path, "UPDATE replies SET headers = x'c1'")
    with pytest.raises(QueueTorn, match="the answer to job job-1 cannot be read"):
        store.reply("job-1")


def test_a_job_that_was_begun_more_often_than_is_allowed_now_is_given_up(store: SqliteJobs) -> None:
    store.take(new(1), OPTIONS)
    for _ in range(2):
        (taken,) = claim(store)
        store.put_off(taken, 0, counted=True, error="503 runner_down: down")
    fewer = replace(OPTIONS, attempts=2)
    assert store.claim(ROOM, 1, fewer, idle=True) == []
    assert store.tidy(fewer) == ([("job-1", "eta")], False)
    told = store.find("job-1")
    assert told is not None
    assert told.error == "attempt 2 of 2 failed; before that 503 runner_down: down"


def test_a_job_that_was_lost_goes_alone(store: SqliteJobs, moved: Time) -> None:
    for number in range(4):
        store.take(new(number), OPTIONS)
    assert len(claim(store, 2)) == 2
    moved.ticks += 11
    # One of the two ended the process, and nobody knows which.
    assert claim(store, 9, idle=False) == []
    (one,) = claim(store, 9, idle=True)
    assert (one.id, one.lost) == ("job-0", 1)
    assert store.finish(one, reply(1), failed=False)
    (two,) = claim(store, 9, idle=True)
    assert two.id == "job-1"
    moved.ticks += 11
    (again,) = claim(store, 9, idle=True)
    assert (again.id, again.attempts) == ("job-1", 3)
    moved.ticks += 11
    # It was begun as often as may be.
    assert [c.id for c in claim(store, 9, idle=True)] == ["job-2", "job-3"]
    assert store.tidy(OPTIONS) == ([("job-1", "eta")], False)
    dead = store.find("job-1")
    assert dead is not None
    assert (dead.state, dead.error) == ("dead", "whoever had it was not heard of again, 3 times")


def test_a_job_that_is_put_off_waits_and_what_was_no_attempt_does_not_count(
    store: SqliteJobs, moved: Time
) -> None:
    store.take(new(1), OPTIONS)
    for counted, attempts in ((False, 0), (True, 1), (False, 1)):
        (taken,) = claim(store)
        assert store.put_off(taken, 5, counted=counted, error="503 overloaded: full")
        told = store.find("job-1")
        assert told is not None
        assert (told.attempts, told.error, told.state) == (attempts, "503 overloaded: full", "queued")
        assert claim(store) == []
        assert store.due_in_s() == 5
        moved.ticks += 5
    (taken,) = claim(store)
    assert (taken.refusals, taken.lost) == (3, 0)
    assert store.put_off(taken, 0, counted=False, error="")
    (taken,) = claim(store)
    assert taken.refusals == 3
    assert store.give_up(taken, "no more")
    told = store.find("job-1")
    assert told is not None
    assert (told.state, told.error) == ("dead", "no more")


def test_an_unanswered_job_is_given_up_in_the_end(store: SqliteJobs, moved: Time) -> None:
    store.take(new(1, name="gone"), OPTIONS)
    store.take(new(2), OPTIONS)
    (running,) = claim(store)
    moved.ticks += 4999
    assert store.tidy(OPTIONS) == ([], False)
    assert store.renew([running], 10)
    moved.ticks += 1
    assert store.tidy(OPTIONS) == ([("job-1", "gone")], False), "whoever is at work on one may finish it"
    told = store.find("job-1")
    assert told is not None
    assert (told.state, told.error) == ("dead", "not answered within 5000 s")
    assert store.finish(running, reply(2), failed=False)


def test_many_old_results_are_removed_step_by_step(store: SqliteJobs, moved: Time) -> None:
    for number in range(150):
        store.take(new(number, body=bytes(5000)), OPTIONS)
    for taken in store.claim({"eta": 150}, 150, OPTIONS, idle=True):
        store.finish(taken, reply(bytes(5000)), failed=False)
    _, full = store.depths()
    moved.ticks += 1000
    assert store.tidy(OPTIONS) == ([], True)
    assert store.tidy(OPTIONS) == ([], False)
    assert store.find("job-149") is None
    assert store.depths()[1] < full / 10


def test_only_a_job_that_nobody_is_at_work_on_is_cancelled(store: SqliteJobs, moved: Time) -> None:
    store.take(new(1), OPTIONS)
    store.take(new(2), OPTIONS)
    (running,) = claim(store)
    assert not store.cancel("job-1")
    assert store.cancel("job-2")
    assert not store.cancel("job-2")
    moved.ticks += 11
    assert store.cancel("job-1")
    assert not store.finish(running, reply(1), failed=False)
    assert claim(store) == []
    assert not store.cancel("job-3")


def test_an_idempotency_key_belongs_to_one_request_of_one_caller(store: SqliteJobs) -> None:
    assert store.take(new(1, owner="ann", key="k"), OPTIONS)[1]
    job, is_new = store.take(new(2, owner="ann", key="k"), replace(OPTIONS, waiting=1))
    assert (job.id, is_new) == ("job-1", False)
    with pytest.raises(Conflict, match="belongs to another request") as caught:
        store.take(new(3, owner="ann", key="k", body=b"y"), OPTIONS)
    assert "job-1" not in str(caught.value), "where no keys are needed, the owner may be anybody"
    assert store.take(new(4, owner="bob", key="k", body=b"y"), OPTIONS)[1]
    same = [
        store.same("ann", "k", new(9).request.digest()),
        store.same("bob", "k", new(9, body=b"y").request.digest()),
        store.same("ann", "k", new(9, body=b"y").request.digest()),
        store.same("eve", "k", new(9).request.digest()),
        store.same("ann", "", new(9).request.digest()),
    ]
    assert [found.id if found is not None else "" for found in same] == ["job-1", "job-4", "", "", ""]
    assert store.take(new(5, owner="ann"), OPTIONS)[1]
    assert store.take(new(6, owner="ann"), OPTIONS)[1]
    assert store.find("job-2") is None
    assert store.find("job-3") is None


@pytest.mark.parametrize("how", ["cancelled", "given up", "lost", "torn"])
def test_a_job_that_has_no_answer_frees_its_idempotency_key(
    store: SqliteJobs, moved: Time, tmp_path: Path, how: str
) -> None:
    once = replace(OPTIONS, attempts=1)
    store.take(new(1, key="k"), once)
    if how == "cancelled":
        assert store.cancel("job-1")
    elif how == "torn":
        change(tmp_path, "DELETE FROM requests")
        assert claim(store) == []
    else:
        (taken,) = claim(store)
        assert not store.take(new(2, key="k"), once)[1]
        if how == "given up":
            assert store.give_up(taken, "no more")
        else:
            moved.ticks += 11
            assert store.tidy(once) == ([("job-1", "eta")], False)
    job, is_new = store.take(new(3, key="k"), once)
    assert (job.id, is_new) == ("job-3", True)
    (taken,) = claim(store)
    assert store.finish(taken, reply(3), failed=True)
    assert store.take(new(4, key="k"), once)[0].id == "job-3", "an error is an answer"


def test_a_finished_job_that_is_forgotten_frees_its_room(store: SqliteJobs) -> None:
    small = replace(OPTIONS, bytes=1_000_000)
    assert not store.forget("job-1")
    for number in (1, 2):
        store.take(new(number, key=str(number)), small)
    (running,) = claim(store)
    assert not store.forget("job-1"), "somebody is at work on it"
    assert not store.forget("job-2")
    assert store.finish(running, Reply(200, (), bytes(900_000)), failed=False)
    with pytest.raises(Overloaded):
        store.take(new(3, body=bytes(200_000)), small)
    assert store.forget("job-1")
    assert not store.forget("job-1")
    assert store.find("job-1") is None
    assert store.reply("job-1") is None
    assert store.take(new(3, body=bytes(200_000)), small)[1]
    assert store.take(new(4, key="1"), small)[1]
    assert store.cancel("job-2")
    assert store.forget("job-2")


def dead(
    store: SqliteJobs, *numbers: int, name: str = "eta", error: str = "no more", body: bytes = b"x"
) -> None:
    """Jobs that were given up."""
    for number in numbers:
        store.take(new(number, name=name, owner="ann", key=str(number), body=body), OPTIONS)
        (taken,) = claim(store)
        assert store.give_up(taken, error)


def test_a_job_that_was_given_up_is_begun_again_with_all_that_it_had(store: SqliteJobs, moved: Time) -> None:
    dead(store, 1)
    moved.ticks += 500
    assert store.revive(["job-1", "job-2"], OPTIONS) == {"job-1": "queued", "job-2": "missing"}
    assert store.revive(["job-1"], OPTIONS) == {"job-1": "not dead"}
    told = store.find("job-1")
    assert told is not None
    assert (told.state, told.attempts, told.age_s, told.error) == ("queued", 0, 0, "")
    assert store.finished(["job-1"]) == []
    # Its age counts from now on, and so does how often it is begun.
    moved.ticks += 4999
    assert store.tidy(OPTIONS) == ([], False)
    (taken,) = claim(store)
    assert (taken.request, taken.attempts) == (new(1).request, 1)
    assert store.finish(taken, reply(1), failed=False)
    assert store.reply("job-1") == reply(1)
    assert store.revive(["job-1"], OPTIONS) == {"job-1": "not dead"}, "it has its answer"
    # Whoever sends the request again was told that there is no answer.
    assert store.take(new(2, owner="ann", key="1"), OPTIONS)[1]


def test_why_a_job_was_given_up_does_not_grow_with_every_time(store: SqliteJobs, moved: Time) -> None:
    store.take(new(1), OPTIONS)
    why = set()
    for _ in range(3):
        (taken,) = claim(store)
        store.put_off(taken, 0, counted=False, error="503 busy")
        moved.ticks += 5000
        assert store.tidy(OPTIONS) == ([("job-1", "eta")], False)
        (letter,) = store.letters(1)
        why.add(letter.job.error)
        assert store.revive(["job-1"], OPTIONS) == {"job-1": "queued"}
    assert why == {"not answered within 5000 s; before that 503 busy"}


def test_whoever_had_a_job_before_it_was_dead_has_it_no_more(store: SqliteJobs, moved: Time) -> None:
    once = replace(OPTIONS, attempts=1)
    store.take(new(1), once)
    (late,) = claim(store)
    moved.ticks += 11
    assert store.tidy(once) == ([("job-1", "eta")], False)
    assert store.revive(["job-1"], once) == {"job-1": "queued"}
    assert not store.finish(late, reply("late"), failed=False)
    (taken,) = claim(store)
    assert taken.token != late.token
    assert not store.finish(late, reply("late"), failed=False)
    assert not store.give_up(late, "late")
    assert store.renew([late, taken], 10) == {"job-1"}
    assert store.finish(taken, reply(1), failed=False)
    assert store.reply("job-1") == reply(1)


def test_a_job_that_was_lost_and_is_begun_again_goes_alone_this_time_too(
    store: SqliteJobs, moved: Time
) -> None:
    store.take(new(1), OPTIONS)
    for _ in range(OPTIONS.attempts):
        assert claim(store)
        moved.ticks += 11
    store.take(new(2), OPTIONS)
    store.tidy(OPTIONS)
    assert store.revive(["job-1"], OPTIONS) == {"job-1": "queued"}
    assert claim(store, 5, idle=False) == []
    assert [taken.id for taken in claim(store, 5)] == ["job-1"]


def test_jobs_are_begun_again_as_far_as_there_is_room_and_what_they_asked_is_there(
    store: SqliteJobs, tmp_path: Path
) -> None:
    dead(store, 1, 2, 3, 4)
    dead(store, 5, name="price")
    change(tmp_path, "DELETE FROM requests WHERE number = 2")
    assert store.dead("", 10) == ["job-1", "job-3", "job-4", "job-5"]
    assert store.dead("", 3) == ["job-1", "job-3", "job-4"]
    assert store.dead("price", 10) == ["job-5"]
    assert [letter.kept for letter in store.letters(10)] == [True, True, True, False, True]
    came = store.revive([f"job-{number}" for number in range(1, 6)], replace(OPTIONS, waiting=2))
    assert [*came.values()] == ["queued", "not kept", "queued", "no room", "queued"]
    assert store.dead("", 10) == ["job-4"]
    assert {taken.id for taken in claim(store, 10)} == {"job-1", "job-3", "job-5"}


def test_a_new_job_is_given_the_room_of_requests_whose_jobs_were_given_up(store: SqliteJobs) -> None:
    small = replace(OPTIONS, bytes=1_000_000)
    dead(store, 1, 2, 3, body=bytes(300_000))
    # What waits is nobody's room, though it was taken before the last one.
    store.take(new(4, body=bytes(10_000)), small)
    with pytest.raises(Overloaded, match="1000000 is the limit"):
        store.take(new(5, body=bytes(990_000)), small)
    assert [letter.kept for letter in store.letters(5)] == [True, True, True], "it would not have sufficed"
    assert store.take(new(6, body=bytes(100_000)), small)[1]
    assert {letter.job.id: letter.kept for letter in store.letters(5)} == {
        "job-1": False,
        "job-2": True,
        "job-3": True,
    }
    assert store.depths()[1] <= 1_000_000
    assert store.take(new(7, body=bytes(550_000)), small)[1]
    assert store.dead("", 5) == []
    assert store.revive(["job-3"], small) == {"job-3": "not kept"}
    assert store.depths()[1] <= 1_000_000
    assert [taken.id for taken in claim(store, 5)] == ["job-4", "job-6", "job-7"]


def test_dead_jobs_are_removed_together_and_nothing_else_is(store: SqliteJobs, tmp_path: Path) -> None:
    assert store.forget_dead("", 5) == 0
    dead(store, 1, 2, 3)
    dead(store, 4, name="price")
    store.take(new(5), OPTIONS)
    change(tmp_path, "DELETE FROM requests WHERE number = 1")
    assert store.forget_dead("prize", 5) == 0
    assert store.forget_dead("eta", 2) == 2
    assert store.forget_dead("eta", 2) == 1
    assert [letter.job.id for letter in store.letters(5)] == ["job-4"]
    assert store.forget_dead("", 5) == 1
    assert rows(tmp_path) == {"jobs": 1, "requests": 1, "replies": 0}


def test_jobs_are_counted_and_those_that_were_given_up_are_told(store: SqliteJobs, moved: Time) -> None:
    assert (store.tally(), store.letters(5), store.dead("", 5)) == ([], [], [])
    assert store.revive(["job-1"], OPTIONS) == {"job-1": "missing"}
    dead(store, 1, error="first")
    moved.ticks += 7
    dead(store, 2, error="second")
    for number in (3, 4, 5):
        store.take(new(number, name="price"), OPTIONS)
    (taken, _) = claim(store, 2)
    store.finish(taken, reply(3), failed=True)
    moved.ticks += 3
    told = [(tally.deployment, tally.state, tally.count, tally.oldest_s) for tally in store.tally()]
    assert told == [
        ("eta", "dead", 2, 10),
        ("price", "failed", 1, 3),
        ("price", "queued", 1, 3),
        ("price", "running", 1, 3),
    ]
    letters = store.letters(5)
    assert [(letter.job.id, letter.job.error, letter.dead_s) for letter in letters] == [
        ("job-2", "second", 3),
        ("job-1", "first", 10),
    ]
    assert (letters[0].job.owner, letters[0].job.attempts) == ("ann", 1)
    assert store.letters(1) == letters[:1]


def test_there_is_a_limit_to_jobs_and_to_bytes(store: SqliteJobs, moved: Time) -> None:
    few = replace(OPTIONS, waiting=2)
    for number in range(2):
        store.take(new(number), few)
    with pytest.raises(Overloaded, match="2 jobs of 'eta' are not answered yet"):
        store.take(new(3), few)
    store.take(new(4, name="price"), few)
    (taken, _) = claim(store, 2)
    with pytest.raises(Overloaded):
        store.take(new(3), few)
    store.finish(taken, reply(1), failed=False)
    store.take(new(3), few)
    small = replace(OPTIONS, bytes=300_000)
    kept, refused = filled(store, range(5, 100), 20_000, small)
    assert isinstance(refused, Overloaded)
    assert "300000 is the limit" in refused.message
    assert kept > 3
    # What is removed makes room.
    for taken in claim(store, 100):
        store.finish(taken, reply(taken.id), failed=False)
    moved.ticks += 1000
    store.tidy(OPTIONS)
    assert store.take(new(200, body=bytes(20_000)), small)[1]


@pytest.mark.parametrize("by_s", [-86_400.0 * 30, 86_400.0 * 30])
def test_the_wall_clock_may_jump(store: SqliteJobs, moved: Time, tmp_path: Path, by_s: float) -> None:
    for number in range(3):
        store.take(new(number), OPTIONS)
    (done, running) = claim(store, 2)
    store.finish(done, reply("kept"), failed=False)
    moved.wall += by_s
    other = SqliteJobs(tmp_path / "queue" / "jobs.db", clock=moved.clock())
    for either in (store, other):
        assert either.tidy(OPTIONS) == ([], False)
        assert either.reply(done.id) == reply("kept")
    assert [c.id for c in claim(other, 9)] == ["job-2"]
    moved.ticks += 11
    assert [c.id for c in claim(other, 9)] == [running.id]
    other.close()


@pytest.mark.parametrize("by_s", [-86_400.0 * 30, 0.0, 60.0])
def test_after_a_restart_of_the_machine_nobody_has_a_job(
    store: SqliteJobs, moved: Time, tmp_path: Path, by_s: float
) -> None:
    for number in range(3):
        store.take(new(number), OPTIONS)
    done, *_ = claim(store, 3)
    store.finish(done, reply("kept"), failed=False)
    store.close()
    moved.boot, moved.ticks = "second", 1.0
    moved.wall += by_s
    other = SqliteJobs(tmp_path / "queue" / "jobs.db", clock=moved.clock())
    assert other.reply("job-0") == reply("kept")
    assert other.tidy(OPTIONS) == ([], False)
    assert [c.id for c in claim(other, 9)] == ["job-1"]
    other.close()


def test_the_clock_of_this_machine_is_the_same_for_all_processes() -> None:
    ours = machine_clock()
    code = "from parbake.queue.clock import machine_clock as m; c = m(); print(c.boot, c.ticks())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    boot, ticks = said.rsplit(" ", 1)
    assert boot == ours.boot
    assert abs(float(ticks) - ours.ticks()) < 60


# Any order ----------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What a test knows of one job."""

    name: str
    key: str
    taken: float
    answer: Reply | None = None
    ended: str = ""
    ended_at: float = 0.0
    attempts: int = 0
    holder: Claim | None = None
    """Whose it is."""
    until: float = 0.0
    """Nobody else's before this time."""
    tokens: set[int] = field(default_factory=set)


class Queue(RuleBasedStateMachine):
    """Two processes with one store, whose holders may fall silent, whose clocks jump, and whose file is put aside."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.time = Time()
        self.path = Path(self.folder.name) / "queue" / "jobs.db"
        self.stores = [SqliteJobs(self.path, clock=self.time.clock()) for _ in range(2)]
        self.asked = 0
        self.known: dict[str, Known] = {}
        self.claims: list[Claim] = []
        self.options = replace(OPTIONS, waiting=6, keep_s=40, give_up_s=60)

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.folder.cleanup()

    @initialize(which=st.integers(0, 1))
    def begin(self, which: int) -> None:
        for _ in range(3):
            self.take(which, "eta", 0)

    @rule(which=st.integers(0, 1), name=st.sampled_from(["eta", "price"]), key=st.integers(0, 4))
    def take(self, which: int, name: str, key: int) -> None:
        self.asked += 1
        asked = new(self.asked, name=name, key=str(key) if key > 2 else "")
        same = [
            job_id
            for job_id, known in self.known.items()
            if known.key and known.key == asked.key and known.ended not in ("cancelled", "dead")
        ]
        open_ = [known for known in self.known.values() if not known.ended and known.name == name]
        try:
            job, is_new = self.stores[which].take(asked, self.options)
        except Overloaded:
            assert not same
            assert len(open_) >= self.options.waiting
        except Conflict:
            assert self.known[same[0]].name != name
        else:
            assert [job.id] == (same or [asked.id])
            assert is_new == (not same)
            self.known.setdefault(job.id, Known(name, asked.key, self.time.ticks))

    @rule(which=st.integers(0, 1), most=st.integers(1, 3), idle=st.booleans())
    def claim(self, which: int, most: int, idle: bool) -> None:
        for taken in self.stores[which].claim(ROOM, most, self.options, idle=idle):
            known = self.known[taken.id]
            assert not known.ended, "a job that has an end is begun again"
            assert known.until <= self.time.ticks, "a job is somebody's, or put off"
            assert taken.token not in known.tokens
            assert taken.attempts <= self.options.attempts
            assert idle or not taken.lost
            known.tokens.add(taken.token)
            known.attempts = taken.attempts
            known.holder, known.until = taken, self.time.ticks + self.options.lease_s
            self.claims.append(taken)

    @rule(which=st.integers(0, 1), most=st.integers(1, 3))
    def fall_silent(self, which: int, most: int) -> None:
        self.time.ticks += 11
        self.claim(which, most, True)

    @rule(which=st.integers(0, 1), at=st.integers(0, 3), failed=st.booleans())
    def finish(self, which: int, at: int, failed: bool) -> None:
        if not self.claims:
            return
        taken = self.some_claim(at)
        # Whoever computes it gets other bits: one of them is the answer, for good.
        words = reply((taken.id, taken.token))
        if self.told(taken, self.stores[which].finish(taken, words, failed=failed)):
            self.end(taken.id, "failed" if failed else "done")
            self.known[taken.id].answer = words

    @rule(which=st.integers(0, 1), at=st.integers(0, 3), counted=st.booleans(), delay_s=st.integers(0, 30))
    def put_off(self, which: int, at: int, counted: bool, delay_s: int) -> None:
        if self.claims:
            taken = self.some_claim(at)
            if self.told(taken, self.stores[which].put_off(taken, delay_s, counted=counted, error="x")):
                self.known[taken.id].until = self.time.ticks + delay_s
                self.known[taken.id].attempts -= not counted

    @rule(which=st.integers(0, 1), at=st.integers(0, 3))
    def give_up(self, which: int, at: int) -> None:
        if self.claims:
            taken = self.some_claim(at)
            if self.told(taken, self.stores[which].give_up(taken, "x")):
                self.end(taken.id, "dead")

    @rule(which=st.integers(0, 1), at=st.integers(0))
    def cancel(self, which: int, at: int) -> None:
        if not self.known:
            return
        job_id = [*self.known][at % len(self.known)]
        known = self.known[job_id]
        if self.stores[which].cancel(job_id):
            assert not known.ended
            assert known.holder is None or known.until <= self.time.ticks, "somebody is at work on it"
            self.end(job_id, "cancelled")

    @rule(which=st.integers(0, 1), at=st.integers(0))
    def forget(self, which: int, at: int) -> None:
        if not self.known:
            return
        job_id = [*self.known][at % len(self.known)]
        assert self.stores[which].forget(job_id) == bool(self.known[job_id].ended)
        if self.known[job_id].ended:
            self.gone(job_id)

    @rule(which=st.integers(0, 1), name=st.sampled_from(["", "eta", "price"]))
    def revive(self, which: int, name: str) -> None:
        store = self.stores[which]
        dead = [i for i, known in self.known.items() if known.ended == "dead" and name in ("", known.name)]
        assert store.dead(name, 100) == dead
        for job_id, came in store.revive([*dict.fromkeys([*self.known][:3] + dead)], self.options).items():
            known = self.known[job_id]
            waiting = [k for k in self.known.values() if not k.ended and k.name == known.name]
            if known.ended != "dead":
                assert came == "not dead"
            elif len(waiting) >= self.options.waiting:
                assert came == "no room"
            else:
                assert came == "queued"
                # Its key was free since it died.
                known.ended, known.key, known.attempts = "", "", 0
                known.taken, known.until = self.time.ticks, self.time.ticks

    @rule(which=st.integers(0, 1))
    def renew(self, which: int) -> None:
        held = self.stores[which].renew(self.claims, self.options.lease_s)
        assert held == {job_id for job_id, known in self.known.items() if known.holder is not None}
        for job_id in held:
            self.known[job_id].until = self.time.ticks + self.options.lease_s

    @rule(seconds=st.sampled_from([0.5, 4, 11, 35]))
    def wait(self, seconds: float) -> None:
        self.time.ticks += seconds

    @rule(seconds=st.sampled_from([-1e7, 1e7]))
    def jump(self, seconds: float) -> None:
        self.time.wall += seconds

    @rule(which=st.integers(0, 1))
    def tidy(self, which: int) -> None:
        now = self.time.ticks
        over = {
            job_id: known.name
            for job_id, known in self.known.items()
            if not known.ended
            and (known.holder is None or known.until <= now)
            and (now - known.taken >= self.options.give_up_s or known.attempts >= self.options.attempts)
        }
        old = [
            job_id
            for job_id, known in self.known.items()
            if known.ended and now - known.ended_at >= self.options.keep_s
        ]
        dead, more = self.stores[which].tidy(self.options)
        assert (dict(dead), more) == (over, False)
        for job_id in over:
            self.end(job_id, "dead")
        for job_id in old:
            self.gone(job_id)

    @rule(which=st.integers(0, 1), give_up=st.booleans())
    def much_later(self, which: int, give_up: bool) -> None:
        self.time.ticks += self.options.give_up_s if give_up else self.options.keep_s
        self.tidy(which)

    @rule(which=st.integers(0, 1), most=st.integers(1, 3))
    def put_aside(self, which: int, most: int) -> None:
        self.claim(which, most, True)
        old = self.claims[:2] + self.claims[-2:]
        self.path.parent.rename(self.path.parent.with_name(f"aside-{self.asked}"))
        # Numbers and tokens begin anew, and all that was claimed is nobody's.
        self.known.clear()
        for name in ("eta", "price"):
            self.take(which, name, 0)
        self.claim(1 - which, 2, True)
        assert self.stores[which].renew(old, 10) == frozenset()
        assert not any(self.stores[which].finish(taken, reply("late"), failed=False) for taken in old)

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.stores[which].close()

    def some_claim(self, at: int) -> Claim:
        """One of the last claims, of a job without an end if there is one: there, most can go wrong."""
        claims = [c for c in self.claims if c.id in self.known and not self.known[c.id].ended] if at else []
        return (claims or self.claims)[-(at % len(claims or self.claims)) - 1]

    def told(self, taken: Claim, done: bool) -> bool:
        """Whether it was done, which is for whoever has the job, and nobody else; then he has it no more."""
        known = self.known.get(taken.id)
        assert done == (known is not None and known.holder is taken)
        if done and known is not None:
            known.holder = None
        return done

    def end(self, job_id: str, state: str) -> None:
        """Nothing more becomes of a job."""
        known = self.known[job_id]
        known.ended, known.ended_at, known.holder = state, self.time.ticks, None

    def gone(self, job_id: str) -> None:
        """A job is not there any more."""
        del self.known[job_id]
        for store in self.stores:
            assert store.find(job_id) is None
            assert store.reply(job_id) is None

    def state(self, job_id: str) -> str:
        (one, two) = (store.find(job_id) for store in self.stores)
        assert one == two
        assert one is not None, "an acknowledged job is lost"
        return one.state

    @invariant()
    def nothing_is_lost_and_an_answer_stays(self) -> None:
        for job_id, known in self.known.items():
            state = self.state(job_id)
            assert (state == known.ended) if known.ended else (state in OPEN)
            assert self.stores[0].reply(job_id) == known.answer


Queue.TestCase.settings = settings(max_examples=20, stateful_step_count=25)
TestQueue = Queue.TestCase


# When it breaks -----------------------------------------------------------------------------------------

WORKER = """
import sys, time
from pathlib import Path
from parbake.queue.model import NewJob, Options, Reply, Request
from parbake.queue.sqlite import SqliteJobs
store = SqliteJobs(Path(sys.argv[1]))
options = Options(100_000, 8, 1 << 30, 1000, 1000, 5000, 0.05)
number = 0
while True:
    number += 1
    job_id = f"{sys.argv[2]}-{number}"
    store.take(NewJob(job_id, "", "", Request("eta", "", "infer", b"", (), b"x" * 2000)), options)
    print("taken", job_id, flush=True)
    for claim in store.claim({"eta": 2}, 2, options, idle=True):
        if number % 7 and store.finish(claim, Reply(200, (), sys.argv[2].encode()), failed=False):
            print("done", claim.id, sys.argv[2], flush=True)
"""


def test_processes_that_are_killed_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "queue" / "jobs.db"
    outputs = [tmp_path / f"{name}.out" for name in "abc"]
    processes: list[subprocess.Popen[bytes]] = []
    for name, output in zip("abc", outputs, strict=True):
        with output.open("wb") as handle:
            # All begin the file together.
            processes.append(subprocess.Popen([sys.executable, "-c", WORKER, str(path), name], stdout=handle))
    until = time.monotonic() + 60
    while any(output.read_bytes().count(b"done") < 3 for output in outputs):
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < until
        time.sleep(0.02)
    for process in processes:
        time.sleep(random.random() * 0.1)
        process.kill()
        process.wait()
    lines = [
        line.split() for output in outputs for line in output.read_text().rpartition("\n")[0].splitlines()
    ]
    taken = {line[1] for line in lines if line[0] == "taken"}
    done = [line[1] for line in lines if line[0] == "done"]
    assert len(done) == len(set(done)), "a job was answered twice"
    store = SqliteJobs(path)
    for job_id in taken:
        assert store.find(job_id) is not None, f"{job_id} was acknowledged, and is lost"
    for line in lines:
        if line[0] == "done":
            assert store.reply(line[1]) == Reply(200, (), line[2].encode())
    # The others are still to be had, once the leases of the dead are over.
    left = {job_id for job_id in taken if store.reply(job_id) is None}
    while left:
        for taken_ in store.claim({"eta": 50}, 50, replace(OPTIONS, attempts=1000), idle=True):
            assert store.finish(taken_, reply("rest"), failed=False)
            left.discard(taken_.id)
        assert time.monotonic() < until
    store.close()


FILLER = """
import json, resource, signal, subprocess, sys
from pathlib import Path
from parbake.errors import ParbakeError
from parbake.queue.model import NewJob, Options, Reply, Request
from parbake.queue.sqlite import SqliteJobs
folder, limited = Path(sys.argv[1]), sys.argv[2] == "limit"
before = resource.getrlimit(resource.RLIMIT_FSIZE)
if limited:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, before[1]))
store = SqliteJobs(folder / "queue" / "jobs.db")
options = Options(10_000, 8, 1 << 30, 1000, 3, 5000, 10)
def take(number, size):
    request = Request("eta", "", "infer", b"", (), bytes(size))
    return store.take(NewJob(f"job-{number}", "", "", request), options)
said = {"taken": []}
try:
    for number in range(1000):
        said["taken"].append(take(number, 10_000)[0].id)
except ParbakeError as error:
    said |= {"code": error.code, "message": error.message, "hint": error.hint}
if limited:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
else:
    subprocess.run(["mount", "-o", "remount,size=32m", folder], check=True)
claims = store.claim({"eta": 1000}, 1000, options, idle=True)
said["claimed"] = [claim.id for claim in claims]
said["kept"] = sum(store.finish(claim, Reply(200, (), b"x"), failed=False) for claim in claims)
said["more"] = take(2000, 10)[1]
store.close()
print(json.dumps(said))
"""


@pytest.fixture(params=["limit", "disk"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder for half a megabyte: by a limit on files, or by a disk where that may be mounted."""
    if request.param == "disk":
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            yield folder, "disk"
            subprocess.run(["umount", "-l", folder], check=True)
            return
    yield tmp_path, "limit"


def test_a_full_disk_refuses_what_does_not_fit_and_keeps_the_rest(small: tuple[Path, str]) -> None:
    # In a process of its own: the limit holds for all files that one writes.
    run = subprocess.run([sys.executable, "-c", FILLER, *small], capture_output=True, check=True, timeout=60)
    said = json.loads(run.stdout)
    assert said["code"] == "queue_away"
    assert "cannot be written" in said["message"]
    assert "free space" in said["hint"]
    assert len(said["taken"]) > 3
    assert said["claimed"] == said["taken"]
    assert said["kept"] == len(said["taken"])
    assert said["more"]


@pytest.mark.parametrize(
    "how", ["no database", "cut", "overwritten", "another database", "one without a version"]
)
def test_a_torn_file_is_said_to_be_torn_and_is_not_touched(tmp_path: Path, how: str) -> None:
    path = tmp_path / "queue" / "jobs.db"
    store = SqliteJobs(path)
    for number in range(60):
        store.take(new(number, body=bytes(2000)), OPTIONS)
    store.close()
    raw = bytearray(path.read_bytes())
    match how:
        case "no database":
            raw[:100] = b"x" * 100
        case "cut":
            del raw[len(raw) // 2 :]
        case "overwritten":
            raw[20_000:60_000] = random.Random(7).randbytes(40_000)
        case _:
            path.unlink()
            with sqlite3.connect(path) as db:
                db.execute("CREATE TABLE x (y)")
                if how == "another database":
                    db.execute("PRAGMA user_version = 7")
            db.close()
            raw = bytearray(path.read_bytes())
    path.write_bytes(raw)
    for _ in range(2):
        with pytest.raises(QueueTorn, match=r"is damaged|is no queue") as caught:
            store.take(new(100), OPTIONS)
        assert "rename its folder as a whole" in caught.value.hint
    assert path.read_bytes() == bytes(raw)
    path.parent.rename(tmp_path / "aside")
    assert store.take(new(100), OPTIONS)[1]
    store.close()


def test_a_newer_queue_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "queue" / "jobs.db"
    store = SqliteJobs(path)
    store.take(new(1), OPTIONS)
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(QueueAway, match="newer parbake"):
        store.find("job-1")
    store.close()


def test_a_job_is_on_disk_before_it_is_acknowledged(store: SqliteJobs) -> None:
    store.take(new(1), OPTIONS)
    for _ in range(2):
        assert store._connection is not None
        said = [
            store._connection.execute(f"PRAGMA {what}").fetchone() for what in ("synchronous", "journal_mode")
        ]
        assert said == [(2,), ("wal",)], "2 is FULL: in NORMAL, a power cut takes the last commits along"
        store.close()
        store.find("job-1")


def test_a_queue_that_is_put_aside_keeps_what_it_had_and_a_new_one_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "queue" / "jobs.db"
    fronts = [SqliteJobs(path), SqliteJobs(path)]
    for number in range(4):
        fronts[number % 2].take(new(number), OPTIONS)
    (done, held) = claim(fronts[0], 2)
    fronts[1].finish(done, reply("kept"), failed=False)
    path.parent.rename(tmp_path / "aside")
    with pytest.raises(QueueAway, match="cannot be opened"):
        fronts[0].find("job-1")
    # One of them is sooner to see it, and the other one lets go of the old file while there is a new one.
    assert fronts[0].take(new(10), OPTIONS)[1]
    assert not fronts[1].finish(held, reply("late"), failed=False)
    assert fronts[1].take(new(11), OPTIONS)[1]
    for store in fronts:
        assert [store.find(f"job-{number}") is not None for number in (3, 10, 11)] == [False, True, True]
        store.close()
    old, anew = SqliteJobs(tmp_path / "aside" / "jobs.db"), SqliteJobs(path)
    assert old.reply("job-0") == reply("kept")
    assert [old.find(f"job-{number}") is not None for number in (1, 2, 3, 10)] == [True, True, True, False]
    assert [anew.find(f"job-{number}") is not None for number in (10, 11)] == [True, True]
    for store in (old, anew):
        store.close()


def test_a_claim_holds_in_the_file_that_it_is_of_only(tmp_path: Path) -> None:
    path = tmp_path / "queue" / "jobs.db"
    store = SqliteJobs(path)
    store.take(new(1, owner="alice"), OPTIONS)
    (hers,) = claim(store)
    path.parent.rename(tmp_path / "aside")
    store.take(new(2, owner="bob"), OPTIONS)
    (his,) = claim(store)
    assert (hers.number, hers.token) == (his.number, his.token)
    assert store.renew([hers], 10) == frozenset()
    assert store.renew([hers, his], 10) == {"job-2"}
    assert not store.finish(hers, reply("hers"), failed=False)
    assert not store.put_off(hers, 0, counted=True, error="x")
    assert not store.give_up(hers, "x")
    assert store.finish(his, reply("his"), failed=False)
    assert store.reply("job-2") == reply("his")
    store.close()


def test_files_that_are_moved_one_by_one_lose_nothing(tmp_path: Path) -> None:
    path, aside = tmp_path / "queue" / "jobs.db", tmp_path / "aside"
    store, other = SqliteJobs(path), SqliteJobs(path)
    for number in range(3):
        store.take(new(number), OPTIONS)
    assert other.find("job-0") is not None
    aside.mkdir()
    for ending in ("", "-wal", "-shm"):
        file = path.with_name(path.name + ending)
        file.rename(aside / file.name)
        if ending != "-shm":
            # SQLite would take the log for one of the new file.
            with pytest.raises(QueueTorn, match=r"jobs\.db is gone, and jobs\.db-(wal|shm) is left of it"):
                store.take(new(10), OPTIONS)
    assert store.take(new(10), OPTIONS)[1]
    assert other.find("job-10") is not None
    store.close()
    other.close()
    old = SqliteJobs(aside / "jobs.db")
    assert all(old.find(f"job-{number}") is not None for number in range(3))
    old.close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SqliteJobs(tmp_path / "file" / "queue" / "jobs.db")
    assert not store.exists()
    with pytest.raises(QueueAway, match="cannot be made") as caught:
        store.take(new(1), OPTIONS)
    assert "state_dir" in caught.value.hint


def test_many_threads_and_connections_take_and_answer_each_job_once(tmp_path: Path) -> None:
    path = tmp_path / "queue" / "jobs.db"

    def work(who: int) -> list[str]:
        store = SqliteJobs(path)
        answered: list[str] = []
        for number in range(12):
            store.take(new(100 * who + number), OPTIONS)
            answered += [c.id for c in claim(store, 2) if store.finish(c, reply(who), failed=False)]
        while claims := claim(store, 3):
            answered += [c.id for c in claims if store.finish(c, reply(who), failed=False)]
        store.close()
        return answered

    with ThreadPoolExecutor(4) as crowd:
        answered = [job_id for part in crowd.map(work, range(4)) for job_id in part]
    assert sorted(answered) == sorted(f"job-{100 * who + number}" for who in range(4) for number in range(12))
