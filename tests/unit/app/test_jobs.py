"""The jobs of fronts that share a store: each is answered once, whoever falls silent, fails, drains or cannot write."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from parbake.app.jobs import (
    DeadRemoved,
    JobCounts,
    JobDepth,
    Jobs,
    JobsReport,
    JobsRetried,
    JobTally,
    new_id,
    options_of,
)
from parbake.errors import Conflict, JobCancelled, JobDead, JobNotFound, Overloaded, QueueAway
from parbake.queue.clock import Clock
from parbake.queue.model import Claim, Job, Options, Reply, Request, Revival
from parbake.queue.sqlite import SqliteJobs
from parbake.settings import QueueSettings

LEASE_S = 60.0
SETTINGS = QueueSettings(jobs_at_once=2, job_lease_s=LEASE_S, job_attempts=3)
REFUSED = Reply(503, (), b'{"error":"full","code":"overloaded"}')
DOWN = Reply(503, (), b'{"error":"down","code":"runner_down"}')
PATIENCE_S = 60.0
"""Longest that a test waits: the machine may be busy."""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK_S", "_POLL_S"):
        monkeypatch.setattr(f"parbake.app.jobs.{name}", 0.01)


class Hours:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = Clock("boot", lambda: self.now)


class Store(SqliteJobs):
    """Tells its front when it is looked into."""

    front: Front

    def due_in_s(self) -> float | None:
        self.front.looks += 1
        return super().due_in_s()


def request(words: str) -> Request:
    return Request("eta", "", "infer", b"", (), words.encode())


class Front:
    """One front: answers by hand."""

    def __init__(
        self,
        path: Path,
        settings: QueueSettings = SETTINGS,
        hours: Hours | None = None,
        store: type[Store] = Store,
    ) -> None:
        self.able = True
        self.looks = 0
        self.asked: list[tuple[str, Callable[[Reply], None]]] = []
        self.gone: list[str] = []
        self.hours = hours or Hours()
        clock = self.hours.clock

        def open_(path: Path) -> Store:
            opened = store(path, clock=clock)
            opened.front = self
            return opened

        loop = asyncio.get_running_loop()
        self.jobs = Jobs(loop, lambda: (["eta"] if self.able else [], True), clock)
        self.jobs.answer = self.answer
        self.jobs.configure(settings, path, open_, 1000)

    def answer(self, asked: Request, owner: str, done: Callable[[Reply], None]) -> Callable[[], None]:
        words = asked.body.decode()
        self.asked.append((words, done))
        return lambda: self.gone.append(words)

    @property
    def said(self) -> list[str]:
        """What the requests say that have come."""
        return [words for words, _ in self.asked]

    async def have(self, count: int) -> list[str]:
        """Wait until so many requests have come; gives what they say."""
        await until(lambda: len(self.asked) >= count)
        return self.said

    async def look(self) -> None:
        """Wait until it has looked into the store, all of a turn long."""
        seen = self.looks
        await until(lambda: self.looks > seen + 1)

    def reply(self, at: int, words: str) -> None:
        self.asked[at][1](Reply(200, (), words.encode()))

    async def fall_silent(self) -> None:
        """As if it had been killed."""
        assert self.jobs._working is not None
        async with self.jobs._turning:
            # It may take more than one: `asyncio.wait_for` forgets one that comes in the moment that it ends.
            while not self.jobs._working.done():
                self.jobs._working.cancel()
                await asyncio.sleep(0)
        self.able = False

    async def end(self) -> None:
        await self.jobs.drain(0)
        await self.jobs.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def finished(front: Front, job: Job) -> Job:
    """The job as soon as it is finished."""
    async with asyncio.timeout(PATIENCE_S):
        while not (now := await front.jobs.find(job.id, "", 10)).finished:
            pass
        return now


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await test()

    asyncio.run(bounded())


def test_a_job_that_takes_longer_than_its_lease_is_computed_once(tmp_path: Path) -> None:
    async def test() -> None:
        hours = Hours()
        one = Front(tmp_path / "queue" / "jobs.db", hours=hours)
        job = await one.jobs.take(request("a"), "", "")
        await one.have(1)
        two = Front(tmp_path / "queue" / "jobs.db", hours=hours)
        for _ in range(4):
            hours.now += 0.4 * LEASE_S
            await one.look()
            await two.look()
        assert two.asked == []
        one.reply(0, "A")
        assert (await finished(two, job)).state == "done"
        assert await two.jobs.result(job.id, "") == Reply(200, (), b"A")
        with pytest.raises(JobNotFound):
            await two.jobs.result(job.id, "somebody else")
        for front in (one, two):
            await front.end()

    run(test)


def test_what_a_silent_front_computes_after_all_is_not_kept(tmp_path: Path) -> None:
    async def test() -> None:
        hours = Hours()
        one = Front(tmp_path / "queue" / "jobs.db", hours=hours)
        job = await one.jobs.take(request("a"), "", "")
        await one.have(1)
        await one.fall_silent()
        two = Front(tmp_path / "queue" / "jobs.db", hours=hours)
        hours.now += LEASE_S + 1
        assert await two.have(1) == ["a"]
        # It wakes up, and has an answer too.
        one.reply(0, "first computed")
        await until(lambda: not one.jobs._running)
        assert (await two.jobs.find(job.id, "")).state == "running"
        two.reply(0, "first kept")
        assert (await finished(two, job)).attempts == 2
        for front in (one, two):
            assert await front.jobs.result(job.id, "") == Reply(200, (), b"first kept")
            await front.end()

    run(test)


def test_a_front_lets_go_of_what_somebody_else_has(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db")
        job = await front.jobs.take(request("a"), "", "")
        await front.have(1)
        # It stood still for longer than its lease.
        front.able = False
        with closing(sqlite3.connect(tmp_path / "queue" / "jobs.db", timeout=PATIENCE_S)) as db, db:
            db.execute("UPDATE jobs SET token = token + 1")
        front.hours.now += LEASE_S / 2
        await until(lambda: front.gone)
        assert front.gone == ["a"]
        front.reply(0, "late")
        await front.look()
        assert (await front.jobs.find(job.id, "")).state == "running"
        await front.end()

    run(test)


def test_what_becomes_of_a_job_is_nothing_to_one_of_the_same_number_in_another_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._AGAIN_S", 0.01)
    full = True

    class Full(Store):
        def finish(self, claim: Claim, reply: Reply, *, failed: bool) -> bool:
            if claim.request.body == b"hers":
                if full:
                    raise QueueAway("the disk is full")
                return False
            return super().finish(claim, reply, failed=failed)

    async def test() -> None:
        nonlocal full
        front = Front(tmp_path / "queue" / "jobs.db", store=Full)
        await front.jobs.take(request("hers"), "her", "")
        await front.have(1)
        front.reply(0, "hers")
        # As where the queue is put aside, and begun anew.
        with closing(sqlite3.connect(tmp_path / "queue" / "jobs.db", timeout=PATIENCE_S)) as db, db:
            for table in ("jobs", "requests", "sqlite_sequence"):
                db.execute(f"DELETE FROM {table}")
        job = await front.jobs.take(request("his"), "", "")
        assert await front.have(2) == ["hers", "his"]
        full = False
        await until(lambda: len(front.jobs._running) == 1)
        front.reply(1, "his")
        assert (await finished(front, job)).state == "done"
        assert await front.jobs.result(job.id, "") == Reply(200, (), b"his")
        await front.end()

    run(test)


def test_a_job_that_was_lost_has_a_front_for_itself(tmp_path: Path) -> None:
    async def test() -> None:
        hours = Hours()
        one = Front(tmp_path / "queue" / "jobs.db", hours=hours)
        for words in ("a", "b", "c"):
            await one.jobs.take(request(words), "", "")
        assert await one.have(2) == ["a", "b"]
        await one.fall_silent()
        two = Front(tmp_path / "queue" / "jobs.db", hours=hours)
        assert await two.have(1) == ["c"]
        # The leases end, and one of the two may be what ended the front. That of the third goes on.
        for _ in range(3):
            hours.now += 0.4 * LEASE_S
            await two.look()
        assert len(two.asked) == 1
        two.reply(0, "C")
        assert await two.have(2) == ["c", "a"]
        await two.look()
        assert len(two.asked) == 2
        two.reply(1, "A")
        assert await two.have(3) == ["c", "a", "b"]
        two.reply(2, "B")
        for front in (one, two):
            await front.end()

    run(test)


def test_refusals_are_tried_again_and_attempts_come_to_an_end(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db")
        good, bad = [await front.jobs.take(request(words), "", "") for words in ("good", "bad")]

        async def reply(words: str, at: int, reply: Reply) -> None:
            def replied() -> bool:
                # As long as it takes for every pause to be over.
                front.hours.now += 1
                return front.said.count(words) > at

            await until(replied)
            [done for said, done in front.asked if said == words][at](reply)

        for at in range(5):
            await reply("good", at, REFUSED)
        for at in range(3):
            await reply("bad", at, DOWN)
        await reply("good", 5, Reply(200, (), b"at last"))
        told = await finished(front, good)
        assert (told.state, told.attempts) == ("done", 1)
        assert (await finished(front, bad)).state == "dead"
        with pytest.raises(JobDead, match="attempt 3 of 3 failed: 503 runner_down: down") as dead:
            await front.jobs.result(bad.id, "")
        assert dead.value.hint == "send the request again"
        counts = await front.jobs.counts()
        assert counts is not None
        assert (counts.taken, counts.ended) == ({"eta": 2}, {"eta": {"done": 1, "dead": 1}})
        front.able = False
        await front.look()
        gone = await front.jobs.take(request("gone"), "", "")
        assert (await front.jobs.cancel(gone.id, "")).state == "cancelled"
        with pytest.raises(JobCancelled) as cancelled:
            await front.jobs.result(gone.id, "")
        assert cancelled.value.hint == "send the request again"
        await front.end()

    run(test)


def test_an_answer_that_cannot_be_kept_is_kept_when_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._AGAIN_S", 0.01)
    full = False

    class Full(Store):
        def finish(self, claim: Claim, reply: Reply, *, failed: bool) -> bool:
            if full:
                raise QueueAway("the disk is full")
            return super().finish(claim, reply, failed=failed)

    async def test() -> None:
        nonlocal full
        front = Front(tmp_path / "queue" / "jobs.db", store=Full)
        job = await front.jobs.take(request("a"), "", "")
        await front.have(1)
        full = True
        front.reply(0, "A")
        # Longer than the lease: it goes on being renewed.
        for _ in range(4):
            front.hours.now += 0.4 * LEASE_S
            await front.look()
        assert (await front.jobs.find(job.id, "")).state == "running"
        full = False
        assert (await finished(front, job)).attempts == 1
        assert len(front.asked) == 1
        await front.end()

    run(test)


def test_a_front_that_drains_leaves_what_takes_too_long(tmp_path: Path) -> None:
    async def test() -> None:
        one = Front(tmp_path / "queue" / "jobs.db")
        jobs = [await one.jobs.take(request(words), "", "") for words in ("a", "b", "c")]
        await one.have(2)
        one.reply(0, "A")
        await one.jobs.drain(1)
        assert one.gone == ["b"]
        # An answer that comes now is not taken from it.
        one.reply(1, "late")
        states = [await one.jobs.find(job.id, "") for job in jobs]
        assert [(job.state, job.attempts) for job in states[1:]] == [("queued", 0), ("queued", 0)]
        assert (states[0].state, len(one.asked)) == ("done", 2)
        await one.jobs.close()
        two = Front(tmp_path / "queue" / "jobs.db")
        assert await two.have(2) == ["b", "c"]
        await two.end()

    run(test)


def test_a_store_that_is_held_up_does_not_hold_up_the_end(tmp_path: Path) -> None:
    held = threading.Event()
    claiming = threading.Event()

    class Held(Store):
        def claim(self, room: Mapping[str, int], most: int, options: Options, *, idle: bool) -> list[Claim]:
            claiming.set()
            assert held.wait(PATIENCE_S)
            return super().claim(room, most, options, idle=idle)

    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db", store=Held)
        job = await front.jobs.take(request("a"), "", "")
        await until(claiming.is_set)
        await asyncio.wait_for(front.jobs.drain(0.2), PATIENCE_S / 2)
        assert not held.is_set()
        held.set()
        # What it has claimed meanwhile it does not begin.
        await until(lambda: not front.jobs._turning.locked() and not front.jobs._running)
        assert front.asked == []
        assert (await front.jobs.find(job.id, "")).attempts == 0
        await front.jobs.close()

    run(test)


def test_a_job_of_what_is_gone_by_now_is_left(tmp_path: Path) -> None:
    async def test() -> None:
        class Changing(Store):
            def claim(
                self, room: Mapping[str, int], most: int, options: Options, *, idle: bool
            ) -> list[Claim]:
                claims = super().claim(room, most, options, idle=idle)
                # Another plan comes into force while the store is asked.
                front.able = bool(changed)
                changed.append(1)
                return claims

        changed: list[int] = []
        front = Front(tmp_path / "queue" / "jobs.db", store=Changing)
        job = await front.jobs.take(request("a"), "", "")
        await until(lambda: changed)
        await front.look()
        assert front.asked == []
        told = await front.jobs.find(job.id, "")
        assert (told.state, told.attempts) == ("queued", 0)
        front.able = True
        assert await front.have(1) == ["a"]
        await front.end()

    run(test)


def test_a_job_that_cannot_even_be_begun_fails_alone(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db")

        def answer(asked: Request, owner: str, done: Callable[[Reply], None]) -> Callable[[], None]:
            if asked.body == b"bad":
                raise RuntimeError("a bug")
            return front.answer(asked, owner, done)

        front.jobs.answer = answer
        bad, _ = [await front.jobs.take(request(words), "", "") for words in ("bad", "good")]
        assert await front.have(1) == ["good"]
        told = await finished(front, bad)
        assert (told.state, told.status) == ("failed", 500)
        await front.end()

    run(test)


def test_a_crowd_of_callers_is_refused_and_keeps_no_job_from_being_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._MOST_PENDING", 2)
    held = threading.Event()
    held.set()

    class Slow(Store):
        def find(self, job_id: str) -> Job | None:
            assert held.wait(PATIENCE_S)
            return super().find(job_id)

    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db", store=Slow)
        taken = await asyncio.gather(
            *(front.jobs.take(request("a"), "", "") for _ in range(5)), return_exceptions=True
        )
        assert [isinstance(item, Overloaded) for item in taken] == [False, False, True, True, True]
        job = await front.jobs.take(request("b"), "", "")
        await front.have(2)
        held.clear()
        asking = [asyncio.create_task(front.jobs.find(job.id, "")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await front.jobs.find(job.id, "")
        for _ in range(4):
            front.hours.now += 0.4 * LEASE_S
            await front.look()
        front.reply(0, "A")
        front.reply(1, "B")
        assert await front.have(3) == ["a", "a", "b"]
        held.set()
        assert {(await task).state for task in asking} == {"running"}
        await front.end()

    run(test)


def test_what_waits_to_be_recognised_by_its_idempotency_key_counts_as_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    digested: list[bytes] = []
    digest = Request.digest

    def counted(asked: Request) -> bytes:
        digested.append(asked.body)
        return digest(asked)

    class Slow(Store):
        def same(self, owner: str, key: str, digest: bytes) -> Job | None:
            assert free.wait(PATIENCE_S)
            return super().same(owner, key, digest)

    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db", store=Slow)
        front.able = False
        front.jobs._most_pending_bytes = 100
        first = await front.jobs.take(request("a"), "", "k")
        monkeypatch.setattr(Request, "digest", counted)

        def take(words: str, key: str, fits: bool = True) -> Awaitable[Job | None]:
            return front.jobs.take_once(request(words), "", key, lambda: fits)

        waiting = asyncio.create_task(asyncio.wait_for(take("b" * 80, "l"), PATIENCE_S))
        await until(lambda: front.jobs._pending_bytes)
        with pytest.raises(Overloaded, match="80 bytes of jobs are being written down"):
            await take("c" * 80, "m")
        free.set()
        taken = await waiting
        assert taken is not None
        assert digested == [b"b" * 80], "it takes a while for a large one"
        # What is there under its key needs to fit no more, what is not has to, and what was refused holds no place.
        again = await take("a", "k", fits=False)
        assert again is not None
        assert again.id == first.id
        assert await take("c" * 80, "m", fits=False) is None
        assert await take("c" * 80, "m") is not None
        counts = await front.jobs.counts()
        assert counts is not None
        assert counts.taken == {"eta": 3}
        with pytest.raises(Conflict):
            await take("d", "k")
        await front.end()

    run(test)


def test_nobody_is_kept_waiting_beyond_a_number_or_after_hanging_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._MOST_WATCHERS", 1)
    monkeypatch.setattr("parbake.app.jobs._GONE_S", 0.01)

    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db")
        job = await front.jobs.take(request("a"), "", "")
        gone = False
        waiting = asyncio.create_task(front.jobs.find(job.id, "", 60, lambda: gone))
        await until(lambda: front.jobs._watched)
        told = await asyncio.wait_for(front.jobs.find(job.id, "", 60), 30)
        assert not told.finished
        assert not waiting.done()
        gone = True
        await asyncio.wait_for(waiting, 30)
        assert not front.jobs._watched
        # There is a place again.
        waiting = asyncio.create_task(front.jobs.find(job.id, "", 60))
        await until(lambda: front.jobs._watched)
        await front.have(1)
        front.reply(0, "A")
        assert (await waiting).state == "done"
        await front.end()

    run(test)


def test_where_no_jobs_are_taken_any_more_those_that_were_are_answered(tmp_path: Path) -> None:
    async def test() -> None:
        one = Front(tmp_path / "queue" / "jobs.db")
        job = await one.jobs.take(request("a"), "", "")
        await one.have(1)
        await one.end()
        off = Front(tmp_path / "queue" / "jobs.db", QueueSettings(jobs_waiting=0))
        assert not off.jobs.on
        with pytest.raises(JobNotFound):
            await off.jobs.take(request("b"), "", "")
        assert await off.have(1) == ["a"]
        off.reply(0, "A")
        assert (await finished(off, job)).state == "done"
        assert await off.jobs.result(job.id, "") == Reply(200, (), b"A")
        await off.end()

    run(test)


def test_whoever_runs_the_server_sees_what_was_given_up_and_has_it_begun_again(tmp_path: Path) -> None:
    async def test() -> None:
        hours = Hours()
        settings = QueueSettings(jobs_at_once=2, job_attempts=1)
        front = Front(tmp_path / "queue" / "jobs.db", settings, hours)
        assert await front.jobs.report() == JobsReport()
        assert await front.jobs.retry_dead() == JobsRetried(())
        first, second = [await front.jobs.take(request(words), "ann", "") for words in "ab"]
        await front.have(2)
        for _, done in front.asked:
            done(DOWN)
        assert {(await finished_of(front, job, "ann")).state for job in (first, second)} == {"dead"}
        hours.now += 9
        report = await front.jobs.report()
        assert report.tallies == (JobTally("eta", "dead", 2, 9.0),)
        assert report.bytes > 0
        assert {item.id for item in report.dead} == {first.id, second.id}
        item = report.dead[0]
        assert (item.deployment, item.client, item.attempts, item.dead_s, item.kept) == (
            "eta",
            "ann",
            1,
            9,
            True,
        )
        assert item.error == "attempt 1 of 1 failed: 503 runner_down: down"
        assert await front.jobs.retry_dead("price") == JobsRetried(())
        assert await front.jobs.retry(first.id) == JobsRetried((first.id,))
        await front.have(3)
        with pytest.raises(Conflict, match="is running, and only one that is dead can be retried"):
            await front.jobs.retry(first.id)
        # It waits, though nobody asked: another front looks for the second one all the same.
        other = Front(tmp_path / "queue" / "jobs.db", settings, hours)
        assert await other.jobs.retry_dead("eta") == JobsRetried((second.id,))
        await until(lambda: len(front.asked) + len(other.asked) == 4)
        for said, done in (front.asked + other.asked)[2:]:
            done(Reply(200, (), said.encode()))
        for job, said in ((first, "a"), (second, "b")):
            await finished_of(front, job, "ann")
            assert await front.jobs.result(job.id, "ann") == Reply(200, (), said.encode())
        with pytest.raises(JobNotFound):
            await front.jobs.retry("x" * 22)
        await front.end()
        await other.end()

    run(test)


async def finished_of(front: Front, job: Job, owner: str) -> Job:
    async with asyncio.timeout(PATIENCE_S):
        while not (now := await front.jobs.find(job.id, owner, 10)).finished:
            pass
        return now


def test_dead_jobs_are_left_where_there_is_no_room_for_them(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "queue" / "jobs.db"
        settings = QueueSettings(jobs_waiting=2, jobs_at_once=4, job_attempts=1)
        front = Front(path, settings)
        jobs: list[Job] = []
        for words in ("ab", "cd"):
            jobs = [await front.jobs.take(request(letter), "", "") for letter in words]
            await until(lambda: len(front.asked) >= 2)
            while front.asked:
                front.asked.pop()[1](DOWN)
            for job in jobs:
                await finished(front, job)
        front.able = False
        told = await front.jobs.retry_dead()
        assert (len(told.retried), told.left) == (2, 2)
        with pytest.raises(Overloaded, match="2 jobs of the deployment of job"):
            await front.jobs.retry(jobs[0].id)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("DELETE FROM requests")
        with pytest.raises(Conflict, match="is not there any more") as caught:
            await front.jobs.retry(jobs[0].id)
        assert caught.value.hint == "whoever asked has to send it again"
        assert not any(item.kept for item in (await front.jobs.report()).dead)
        await front.end()

    run(test)


def test_whoever_runs_the_server_removes_jobs_of_anybody(tmp_path: Path) -> None:
    async def test() -> None:
        front = Front(tmp_path / "queue" / "jobs.db", QueueSettings(jobs_at_once=1, job_attempts=1))
        bad, running, waiting = [await front.jobs.take(request(words), "ann", "") for words in "abc"]
        await front.have(1)
        front.asked[0][1](DOWN)
        assert (await finished_of(front, bad, "ann")).state == "dead"
        await front.have(2)
        assert (await front.jobs.remove(bad.id)).state == "dead"
        with pytest.raises(JobNotFound):
            await front.jobs.find(bad.id, "ann")
        with pytest.raises(JobNotFound):
            await front.jobs.remove(bad.id)
        told = await front.jobs.remove(waiting.id)
        assert (told.state, told.gone) == ("cancelled", False)
        for _ in range(2):
            assert (await front.jobs.cancel(waiting.id, "ann")).state == "cancelled"
            with pytest.raises(JobCancelled):
                await front.jobs.result(waiting.id, "ann")
        # It has an end now, and is removed as any other that has.
        told = await front.jobs.remove(waiting.id)
        assert (told.state, told.gone) == ("cancelled", True)
        with pytest.raises(JobNotFound):
            await front.jobs.result(waiting.id, "ann")
        with pytest.raises(JobNotFound):
            await front.jobs.cancel(running.id, "bob")
        with pytest.raises(Conflict, match="only one that waits can be cancelled"):
            await front.jobs.remove(running.id)
        front.reply(1, "B")
        assert (await finished_of(front, running, "ann")).state == "done"
        await front.end()

    run(test)


def test_what_was_begun_again_or_removed_is_told_where_the_rest_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._STEP", 1)
    left = 2

    class Full(Store):
        def revive(self, job_ids: Sequence[str], options: Options) -> dict[str, Revival]:
            self.count()
            return super().revive(job_ids, options)

        def forget_dead(self, deployment: str, most: int) -> int:
            self.count()
            return super().forget_dead(deployment, most)

        def count(self) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise QueueAway("the disk is full")

    async def test() -> None:
        nonlocal left
        path = tmp_path / "queue" / "jobs.db"
        front = Front(path, QueueSettings(jobs_at_once=8), store=Full)
        assert await front.jobs.remove_dead() == DeadRemoved(0)
        jobs = [await front.jobs.take(request(words), "", "") for words in "abcdef"]
        await front.have(6)
        front.able = False
        with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as db, db:
            db.execute("UPDATE jobs SET state = 'dead', finished = number, token = token + 1")
        told = await front.jobs.retry_dead()
        assert told == JobsRetried((jobs[0].id, jobs[1].id), 4, "the disk is full")
        with pytest.raises(QueueAway):
            await front.jobs.retry_dead()
        left = 2
        assert await front.jobs.remove_dead("eta") == DeadRemoved(2, more=True)
        with pytest.raises(QueueAway):
            await front.jobs.remove_dead()
        left = 9
        assert await front.jobs.remove_dead("price") == DeadRemoved(0)
        assert await front.jobs.remove_dead() == DeadRemoved(2)
        assert [tally.state for tally in (await front.jobs.report()).tallies] == ["queued"]
        await front.end()

    run(test)


def test_no_id_of_a_job_looks_like_an_option() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(job_id) for job_id in ids} == {22}
    assert not [job_id for job_id in ids if job_id.startswith("-")]


def test_without_a_job_there_is_no_file_and_no_thread(tmp_path: Path) -> None:
    async def test() -> None:
        for settings in (SETTINGS, QueueSettings(jobs_waiting=0)):
            front = Front(tmp_path / "queue" / "jobs.db", settings)
            await asyncio.sleep(0.05)
            with pytest.raises(JobNotFound):
                await front.jobs.find("x" * 22, "", 5)
            assert await front.jobs.counts() is None
            assert front.jobs._own is not None
            assert front.jobs._callers is not None
            assert front.jobs._own._thread is front.jobs._callers._thread is None
            await front.end()
        assert list(tmp_path.iterdir()) == []

    run(test)


def test_counts_of_two_fronts_are_of_one_queue() -> None:
    one = JobCounts({"eta": JobDepth(1, 2, 3.0)}, 10, {"eta": 1}, {"eta": {"done": 1}})
    two = JobCounts({"eta": JobDepth(1, 2, 3.0)}, 11, {"eta": 2}, {"eta": {"done": 1, "dead": 1}})
    assert one.plus(two) == JobCounts(two.depths, 11, {"eta": 3}, {"eta": {"done": 2, "dead": 1}})
    assert one.without_process().plus(two).ended == {"eta": {"done": 2, "dead": 1}}
    assert options_of(SETTINGS).lease_s == LEASE_S
