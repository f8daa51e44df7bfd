"""The jobs of fronts that share a store: each is answered once, whoever falls silent, fails, drains or cannot write."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from parbake.app.jobs import JobCounts, JobDepth, Jobs, options_of
from parbake.errors import JobDead, JobNotFound, Overloaded, QueueAway
from parbake.queue.model import Claim, Job, Reply, Request
from parbake.queue.ports import JobStore
from parbake.queue.sqlite import SqliteJobs
from parbake.settings import QueueSettings

SETTINGS = QueueSettings(jobs_at_once=2, job_lease_s=0.3, job_attempts=3)
REFUSED = Reply(503, (), b'{"error":"full","code":"overloaded"}')
DOWN = Reply(503, (), b'{"error":"down","code":"runner_down"}')


def request(words: str) -> Request:
    return Request("eta", "", "infer", b"", (), words.encode())


class Front:
    """One front: answers by hand."""

    def __init__(self, path: Path, settings: QueueSettings = SETTINGS) -> None:
        self.able = True
        self.asked: list[tuple[str, Callable[[Reply], None]]] = []
        self.gone: list[str] = []
        self.store: JobStore = SqliteJobs(path)
        self.jobs = Jobs(asyncio.get_running_loop(), lambda: (["eta"] if self.able else [], True))
        self.jobs.answer = self.answer
        self.jobs.configure(settings, path, lambda _: self.store, 1000)

    def answer(self, asked: Request, owner: str, done: Callable[[Reply], None]) -> Callable[[], None]:
        words = asked.body.decode()
        self.asked.append((words, done))
        return lambda: self.gone.append(words)

    async def have(self, count: int) -> list[str]:
        """Wait until so many requests have come; gives what they say."""
        for _ in range(2000):
            if len(self.asked) >= count:
                break
            await asyncio.sleep(0.005)
        return [words for words, _ in self.asked]

    def reply(self, at: int, words: str) -> None:
        self.asked[at][1](Reply(200, (), words.encode()))

    def fall_silent(self) -> None:
        """As if it had been killed."""
        assert self.jobs._working is not None
        self.jobs._working.cancel()
        self.able = False


async def finished(front: Front, job: Job) -> Job:
    """The job as soon as it is finished."""
    while not (now := await front.jobs.find(job.id, "", 10)).finished:
        pass
    return now


def test_a_job_that_takes_longer_than_its_lease_is_computed_once(tmp_path: Path) -> None:
    async def run() -> None:
        one, two = Front(tmp_path / "queue.db"), Front(tmp_path / "queue.db")
        job = await one.jobs.take(request("a"), "", "")
        await one.have(1)
        await asyncio.sleep(1.2)
        assert two.asked == []
        one.reply(0, "A")
        assert (await finished(two, job)).state == "done"
        assert await two.jobs.result(job.id, "") == Reply(200, (), b"A")
        with pytest.raises(JobNotFound):
            await two.jobs.result(job.id, "somebody else")
        for front in (one, two):
            await front.jobs.drain(0.1)
            await front.jobs.close()

    asyncio.run(run())


def test_what_a_silent_front_computes_after_all_is_not_kept(tmp_path: Path) -> None:
    async def run() -> None:
        one, two = Front(tmp_path / "queue.db"), Front(tmp_path / "queue.db")
        two.able = False
        job = await one.jobs.take(request("a"), "", "")
        await one.have(1)
        one.fall_silent()
        two.able = True
        assert await two.have(1) == ["a"]
        # It wakes up, and has an answer too.
        one.reply(0, "first computed")
        await asyncio.sleep(0.2)
        assert (await two.jobs.find(job.id, "")).state == "running"
        two.reply(0, "first kept")
        assert (await finished(two, job)).attempts == 2
        for front in (one, two):
            assert await front.jobs.result(job.id, "") == Reply(200, (), b"first kept")
            await front.jobs.close()

    asyncio.run(run())


def test_a_front_lets_go_of_what_somebody_else_has(tmp_path: Path) -> None:
    async def run() -> None:
        front = Front(tmp_path / "queue.db")
        job = await front.jobs.take(request("a"), "", "")
        await front.have(1)
        # It stood still for longer than its lease.
        other = SqliteJobs(tmp_path / "queue.db")
        front.able = False
        with closing(sqlite3.connect(tmp_path / "queue.db")) as db, db:
            db.execute("UPDATE jobs SET token = token + 1")
        for _ in range(200):
            if front.gone:
                break
            await asyncio.sleep(0.01)
        assert front.gone == ["a"]
        front.reply(0, "late")
        await asyncio.sleep(0.05)
        assert (await front.jobs.find(job.id, "")).state == "running"
        assert other.reply(job.id) is None
        other.close()
        await front.jobs.drain(0)
        await front.jobs.close()

    asyncio.run(run())


def test_a_job_that_was_lost_has_a_front_for_itself(tmp_path: Path) -> None:
    async def run() -> None:
        one = Front(tmp_path / "queue.db")
        for words in ("a", "b", "c"):
            await one.jobs.take(request(words), "", "")
        assert await one.have(2) == ["a", "b"]
        one.fall_silent()
        two = Front(tmp_path / "queue.db")
        assert await two.have(1) == ["c"]
        # The leases end, and one of the two may be what ended the front.
        await asyncio.sleep(0.5)
        assert len(two.asked) == 1
        two.reply(0, "C")
        assert await two.have(2) == ["c", "a"]
        await asyncio.sleep(0.3)
        assert len(two.asked) == 2
        two.reply(1, "A")
        assert await two.have(3) == ["c", "a", "b"]
        two.reply(2, "B")
        for front in (one, two):
            await front.jobs.drain(0.5)
            await front.jobs.close()

    asyncio.run(run())


def test_refusals_are_tried_again_and_attempts_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.queue.service._FIRST_PAUSE_S", 0.01)

    async def run() -> None:
        front = Front(tmp_path / "queue.db")
        good, bad = [await front.jobs.take(request(words), "", "") for words in ("good", "bad")]
        for at in range(5):
            await front.have(at + 1)
            while [words for words, _ in front.asked].count("good") <= at:
                await asyncio.sleep(0.005)
            [done for words, done in front.asked if words == "good"][at](REFUSED)
        for at in range(3):
            while [words for words, _ in front.asked].count("bad") <= at:
                await asyncio.sleep(0.005)
            [done for words, done in front.asked if words == "bad"][at](DOWN)
        while [words for words, _ in front.asked].count("good") < 6:
            await asyncio.sleep(0.005)
        [done for words, done in front.asked if words == "good"][5](Reply(200, (), b"at last"))
        told = await finished(front, good)
        assert (told.state, told.attempts) == ("done", 1)
        assert (await finished(front, bad)).state == "dead"
        with pytest.raises(JobDead, match="attempt 3 of 3 failed: 503 runner_down: down"):
            await front.jobs.result(bad.id, "")
        counts = await front.jobs.counts()
        assert counts is not None
        assert (counts.taken, counts.ended) == ({"eta": 2}, {"eta": {"done": 1, "dead": 1}})
        await front.jobs.close()

    asyncio.run(run())


def test_an_answer_that_cannot_be_kept_is_kept_when_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._AGAIN_S", 0.05)

    class Full(SqliteJobs):
        full = False

        def finish(self, claim: Claim, reply: Reply, *, failed: bool) -> bool:
            if self.full:
                raise QueueAway("the disk is full")
            return super().finish(claim, reply, failed=failed)

    async def run() -> None:
        front = Front(tmp_path / "queue.db")
        front.store = store = Full(tmp_path / "queue.db")
        job = await front.jobs.take(request("a"), "", "")
        await front.have(1)
        store.full = True
        front.reply(0, "A")
        # Longer than the lease: it goes on being renewed.
        await asyncio.sleep(0.8)
        assert (await front.jobs.find(job.id, "")).state == "running"
        store.full = False
        assert (await finished(front, job)).attempts == 1
        assert len(front.asked) == 1
        await front.jobs.close()

    asyncio.run(run())


def test_a_front_that_drains_leaves_what_takes_too_long(tmp_path: Path) -> None:
    async def run() -> None:
        one = Front(tmp_path / "queue.db")
        jobs = [await one.jobs.take(request(words), "", "") for words in ("a", "b", "c")]
        await one.have(2)
        draining = asyncio.create_task(one.jobs.drain(0.4))
        await asyncio.sleep(0.05)
        one.reply(0, "A")
        await draining
        assert one.gone == ["b"]
        # An answer that comes now is not taken from it.
        one.reply(1, "late")
        states = [await one.jobs.find(job.id, "") for job in jobs]
        assert [(job.state, job.attempts) for job in states] == [("done", 1), ("queued", 0), ("queued", 0)]
        assert len(one.asked) == 2
        await one.jobs.close()
        two = Front(tmp_path / "queue.db")
        assert await two.have(2) == ["b", "c"]
        await two.jobs.drain(0)
        await two.jobs.close()

    asyncio.run(run())


def test_a_job_that_cannot_even_be_begun_fails_alone(tmp_path: Path) -> None:
    async def run() -> None:
        front = Front(tmp_path / "queue.db")

        def answer(asked: Request, owner: str, done: Callable[[Reply], None]) -> Callable[[], None]:
            if asked.body == b"bad":
                raise RuntimeError("a bug")
            return front.answer(asked, owner, done)

        front.jobs.answer = answer
        bad, _ = [await front.jobs.take(request(words), "", "") for words in ("bad", "good")]
        assert await front.have(1) == ["good"]
        told = await finished(front, bad)
        assert (told.state, told.status) == ("failed", 500)
        await front.jobs.drain(0)
        await front.jobs.close()

    asyncio.run(run())


def test_more_than_can_be_written_down_at_a_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parbake.app.jobs._MOST_PENDING", 2)

    async def run() -> None:
        front = Front(tmp_path / "queue.db")
        taken = await asyncio.gather(
            *(front.jobs.take(request("a"), "", "") for _ in range(5)), return_exceptions=True
        )
        assert [isinstance(item, Overloaded) for item in taken] == [False, False, True, True, True]
        assert isinstance(await front.jobs.take(request("a"), "", ""), Job)
        await front.jobs.drain(0)
        await front.jobs.close()

    asyncio.run(run())


def test_without_a_job_there_is_no_file_and_no_thread(tmp_path: Path) -> None:
    async def run() -> None:
        front = Front(tmp_path / "queue.db")
        await asyncio.sleep(0.05)
        with pytest.raises(JobNotFound):
            await front.jobs.find("x" * 22, "", 5)
        assert await front.jobs.counts() is None
        assert front.jobs._thread is None
        await front.jobs.drain(1)
        await front.jobs.close()
        assert list(tmp_path.iterdir()) == []
        off = Front(tmp_path / "queue.db", QueueSettings(jobs_waiting=0))
        assert not off.jobs.on
        with pytest.raises(JobNotFound):
            await off.jobs.take(request("a"), "", "")

    asyncio.run(run())


def test_counts_of_two_fronts_are_of_one_queue() -> None:
    one = JobCounts({"eta": JobDepth(1, 2, 3.0)}, 10, {"eta": 1}, {"eta": {"done": 1}})
    two = JobCounts({"eta": JobDepth(1, 2, 3.0)}, 11, {"eta": 2}, {"eta": {"done": 1, "dead": 1}})
    assert one.plus(two) == JobCounts(two.depths, 11, {"eta": 3}, {"eta": {"done": 2, "dead": 1}})
    assert one.without_process().plus(two).ended == {"eta": {"done": 2, "dead": 1}}
    assert options_of(SETTINGS).lease_s == 0.3
