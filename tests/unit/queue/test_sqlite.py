"""The store of jobs: whatever happens in whatever order, nothing acknowledged is lost and a job has one answer."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


@pytest.fixture
def moved() -> Time:
    return Time()


@pytest.fixture
def store(tmp_path: Path, moved: Time) -> Iterator[SqliteJobs]:
    opened = SqliteJobs(tmp_path / "deep" / "queue.db", clock=moved.clock())
    yield opened
    opened.close()


def test_a_job_goes_its_way(store: SqliteJobs, moved: Time, tmp_path: Path) -> None:
    assert not store.exists()
    assert store.find("job-1") is None
    assert store.due_in_s() is None
    job, is_new = store.take(new(1, body=b"\0\xff" * 10), OPTIONS)
    assert (job.state, job.attempts, job.age_s, is_new, store.due_in_s()) == ("queued", 0, 0, True, 0)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "deep").iterdir()} == {0o600}
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
    with sqlite3.connect(tmp_path / "deep" / "queue.db") as db:
        for table in ("jobs", "requests", "replies"):
            assert db.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    db.close()


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
    assert store.renew([first], 10) == {first.number}
    moved.ticks += 9
    assert claim(store) == []
    moved.ticks += 1
    (second,) = claim(store)
    assert (second.attempts, second.lost) == (2, 1)
    assert store.renew([first, second], 10) == {second.number}
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
    assert store.tidy(OPTIONS) == (["eta"], False)
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
    assert store.tidy(OPTIONS) == (["gone"], False), "whoever is at work on one may finish it"
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
    with pytest.raises(Conflict, match="became job job-1"):
        store.take(new(3, owner="ann", key="k", body=b"y"), OPTIONS)
    assert store.take(new(4, owner="bob", key="k", body=b"y"), OPTIONS)[1]
    assert store.take(new(5, owner="ann"), OPTIONS)[1]
    assert store.take(new(6, owner="ann"), OPTIONS)[1]
    assert store.find("job-2") is None
    assert store.find("job-3") is None


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
    other = SqliteJobs(tmp_path / "deep" / "queue.db", clock=moved.clock())
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
    other = SqliteJobs(tmp_path / "deep" / "queue.db", clock=moved.clock())
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

    answer: Reply | None = None
    ended: str = ""
    holder: Claim | None = None
    """Whose it is."""
    until: float = 0.0
    """Nobody else's before this time."""
    tokens: set[int] = field(default_factory=set)


class Queue(RuleBasedStateMachine):
    """Two processes with one store, whose holders may fall silent, and whose clocks jump."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.time = Time()
        path = Path(self.folder.name) / "queue.db"
        self.stores = [SqliteJobs(path, clock=self.time.clock()) for _ in range(2)]
        self.known: dict[str, Known] = {}
        self.claims: list[Claim] = []
        self.options = replace(OPTIONS, waiting=6)

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
        number = len(self.known)
        asked = new(number, name=name, key=str(key) if key > 2 else "")
        try:
            job, is_new = self.stores[which].take(asked, self.options)
        except Overloaded:
            open_ = [k for k in self.known.values() if not k.ended]
            assert len(open_) >= self.options.waiting
        except Conflict:
            assert key > 2
        else:
            assert is_new == (job.id not in self.known)
            self.known.setdefault(job.id, Known())

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
            known = self.known[taken.id]
            known.answer, known.ended = words, "failed" if failed else "done"

    @rule(which=st.integers(0, 1), at=st.integers(0, 3), counted=st.booleans(), delay_s=st.integers(0, 30))
    def put_off(self, which: int, at: int, counted: bool, delay_s: int) -> None:
        if self.claims:
            taken = self.some_claim(at)
            if self.told(taken, self.stores[which].put_off(taken, delay_s, counted=counted, error="x")):
                self.known[taken.id].until = self.time.ticks + delay_s

    @rule(which=st.integers(0, 1), at=st.integers(0, 3))
    def give_up(self, which: int, at: int) -> None:
        if self.claims:
            taken = self.some_claim(at)
            if self.told(taken, self.stores[which].give_up(taken, "x")):
                self.known[taken.id].ended = "dead"

    @rule(which=st.integers(0, 1), at=st.integers(0))
    def cancel(self, which: int, at: int) -> None:
        job_id = [*self.known][at % len(self.known)]
        known = self.known[job_id]
        if self.stores[which].cancel(job_id):
            assert not known.ended
            assert known.holder is None or known.until <= self.time.ticks, "somebody is at work on it"
            known.ended, known.holder = "cancelled", None

    @rule(which=st.integers(0, 1))
    def renew(self, which: int) -> None:
        held = self.stores[which].renew(self.claims, self.options.lease_s)
        for known in self.known.values():
            if known.holder is not None:
                assert known.holder.number in held
                known.until = self.time.ticks + self.options.lease_s
        assert len(held) == sum(known.holder is not None for known in self.known.values())

    @rule(seconds=st.sampled_from([0.5, 4, 11]))
    def wait(self, seconds: float) -> None:
        self.time.ticks += seconds

    @rule(seconds=st.sampled_from([-1e7, 1e7]))
    def jump(self, seconds: float) -> None:
        self.time.wall += seconds

    @rule(which=st.integers(0, 1))
    def tidy(self, which: int) -> None:
        before = {job_id for job_id, known in self.known.items() if not known.ended}
        gone, _ = self.stores[which].tidy(self.options)
        dead = [job_id for job_id in before if self.state(job_id) == "dead"]
        assert len(dead) == len(gone)
        for job_id in dead:
            known = self.known[job_id]
            assert known.until <= self.time.ticks
            known.ended, known.holder = "dead", None

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.stores[which].close()

    def some_claim(self, at: int) -> Claim:
        """One of the last claims, of a job without an end if there is one: there, most can go wrong."""
        claims = [c for c in self.claims if not self.known[c.id].ended] if at else self.claims
        return (claims or self.claims)[-(at % len(claims or self.claims)) - 1]

    def told(self, taken: Claim, done: bool) -> bool:
        """Whether it was done, which is for whoever has the job, and nobody else; then he has it no more."""
        known = self.known[taken.id]
        assert done == (known.holder is taken)
        if done:
            known.holder = None
        return done

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
    path = tmp_path / "queue.db"
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


@pytest.fixture(params=["limit", "disk"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder for half a megabyte: by a limit on files, and by a disk where that may be mounted."""
    if request.param == "disk":
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            yield folder, 0
            subprocess.run(["umount", "-l", folder], check=True)
            return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, before[1]))
    yield tmp_path, before[0]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_refuses_what_does_not_fit_and_keeps_the_rest(small: tuple[Path, int]) -> None:
    folder, limit = small
    store = SqliteJobs(folder / "queue.db")
    taken, refused = filled(store, range(1000), 10_000)
    assert isinstance(refused, QueueAway)
    assert not isinstance(refused, QueueTorn)
    assert "cannot be written" in refused.message
    assert "free space" in refused.hint
    assert taken > 3
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        subprocess.run(["mount", "-o", "remount,size=32m", str(folder)], check=True)
    claims = store.claim(ROOM, 1000, OPTIONS, idle=True)
    assert [c.id for c in claims] == [f"job-{number}" for number in range(taken)]
    assert all(store.finish(c, reply(c.id), failed=False) for c in claims)
    assert store.take(new(2000), OPTIONS)[1]
    store.close()


@pytest.mark.parametrize("how", ["no database", "cut", "overwritten", "another database"])
def test_a_torn_file_is_said_to_be_torn_and_is_not_touched(tmp_path: Path, how: str) -> None:
    path = tmp_path / "queue.db"
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
                db.execute("PRAGMA user_version = 7")
            db.close()
            raw = bytearray(path.read_bytes())
    path.write_bytes(raw)
    for _ in range(2):
        with pytest.raises(QueueTorn, match=r"is damaged|is no queue") as caught:
            store.take(new(100), OPTIONS)
        assert "put the file aside" in caught.value.hint
    assert path.read_bytes() == bytes(raw)
    path.rename(tmp_path / "aside")
    assert store.take(new(100), OPTIONS)[1]
    store.close()


def test_a_newer_queue_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    store = SqliteJobs(path)
    store.take(new(1), OPTIONS)
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with pytest.raises(QueueAway, match="newer parbake"):
        store.find("job-1")
    store.close()


def test_a_file_that_is_taken_away_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    store = SqliteJobs(path)
    store.take(new(1), OPTIONS)
    for file in tmp_path.glob("queue.db*"):
        file.rename(tmp_path / f"aside-{file.name}")
    with pytest.raises(QueueAway, match="cannot be opened"):
        store.find("job-1")
    assert store.take(new(2), OPTIONS)[1]
    assert store.find("job-1") is None
    assert store.find("job-2") is not None
    store.close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SqliteJobs(tmp_path / "file" / "queue.db")
    assert not store.exists()
    with pytest.raises(QueueAway, match="cannot be made") as caught:
        store.take(new(1), OPTIONS)
    assert "state_dir" in caught.value.hint


def test_many_threads_and_connections_take_and_answer_each_job_once(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"

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
    assert os.path.getsize(path) > 0
