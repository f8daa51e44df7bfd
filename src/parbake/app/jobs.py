"""The jobs of one front: takes them, has them answered when there is room, and tells what became of them.

The store is asked in threads of their own, one question after the other, so that no request waits for a disk: one for
callers, and one for the front itself, so that no crowd of callers keeps it from saying that it is there. A job is
answered by what would have answered its request; a front has its jobs for as long as it says so (the lease), and one
that is killed is silent, whereupon another front, or the next server, begins them again.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from msgspec import Struct

from parbake.errors import (
    Conflict,
    JobCancelled,
    JobDead,
    JobNotFound,
    Overloaded,
    ParbakeError,
    Unavailable,
)
from parbake.logs import log
from parbake.queue.clock import Clock, machine_clock
from parbake.queue.model import Claim, Depth, Job, NewJob, Options, Reply, Request, Revival, State
from parbake.queue.ports import JobStore
from parbake.queue.service import Again, Answered, judge, share_out
from parbake.settings import QueueSettings

LONGEST_WAIT_S: Final = 60.0
"""Longest that a caller is kept waiting for a job to finish."""
LONGEST_KEY: Final = 255

_LOOK_S: Final = 1.0
"""How often a front looks whether others, or a server before this one, have left jobs."""
_POLL_S: Final = 0.2
"""The same while there are jobs, or somebody waits for one."""
_TIDY_S: Final = 5.0
_COUNT_S: Final = 0.5
_AGAIN_S: Final = 1.0
"""Pause after the store could not be used."""
_SAY_S: Final = 60.0
"""How often that is said in the log, at most."""
_RENEWALS: Final = 3
"""How often a lease is renewed before it would end."""
_MOST_PENDING: Final = 256
"""Questions of callers that wait for the store at a time."""
_MOST_WATCHERS: Final = 1000
"""Callers that are kept waiting for jobs at a time; others are told at once how it is."""
_GONE_S: Final = 1.0
"""How often it is looked whether a caller who is kept waiting is still there."""
_YIELD_S: Final = 0.5
"""How long callers' questions stand back for those of the front, at most."""
_LEAVE: Final = 0.5
"""Part of the time to drain after which jobs that are still under way are left to others."""
_MOST_LETTERS: Final = 100
"""Dead jobs that are told one by one."""
_MOST_AT_ONCE: Final = 10_000
"""Dead jobs that are begun again, or removed, at one word."""
_STEP: Final = 100
"""Of those, in one transaction: callers' jobs are taken in between."""
_ID_BYTES: Final = 16
_ID_CHARACTERS: Final = 22
_SEND_AGAIN: Final = "send the request again"

_BUG: Final = Reply(500, (), b'{"error":"an error of the server","code":"error"}')

Answerer = Callable[[Request, str, Callable[[Reply], None]], Callable[[], None]]
"""Has a request answered as one that came in, for the client of that name, and calls back once, now or later. Gives
what lets go of it: whatever has not begun by then is not begun."""

P = ParamSpec("P")
T = TypeVar("T")


class JobDepth(Struct, frozen=True):
    """Unanswered jobs of a deployment."""

    queued: int
    running: int
    oldest_s: float


class JobCounts(Struct, frozen=True):
    """The queue as a front sees it, which is the same for all, and what this front has done since it started."""

    depths: dict[str, JobDepth] = {}
    bytes: int = 0
    taken: dict[str, int] = {}
    """New jobs, by deployment."""
    ended: dict[str, dict[str, int]] = {}
    """Jobs that came to an end (done, failed, dead, cancelled), by deployment."""

    def plus(self, other: JobCounts) -> JobCounts:
        """Two fronts together: they have one queue, and each has done its own part."""
        ended = {name: Counter(counts) for name, counts in self.ended.items()}
        for name, counts in other.ended.items():
            ended.setdefault(name, Counter()).update(counts)
        return JobCounts(
            other.depths or self.depths,
            max(self.bytes, other.bytes),
            dict(Counter(self.taken) + Counter(other.taken)),
            {name: dict(counts) for name, counts in ended.items()},
        )

    def without_process(self) -> JobCounts:
        """What remains when the process is gone that looked at the queue."""
        return JobCounts({}, 0, self.taken, self.ended)


class JobTally(Struct, frozen=True):
    """The jobs of a deployment in one state."""

    deployment: str
    state: State
    count: int
    oldest_s: float
    """Since the oldest was taken."""


class DeadJob(Struct, frozen=True):
    """A job that was given up."""

    id: str
    deployment: str
    version: str
    """As the request named it."""
    client: str
    """Name of the API key that asked."""
    attempts: int
    created: float
    """Unix time."""
    dead_s: float
    """Since it was given up."""
    error: str
    kept: bool
    """Whether its request is, so that it can be begun again."""


class JobsReport(Struct, frozen=True):
    """All jobs that there are, and those that were given up last, the latest first."""

    tallies: tuple[JobTally, ...] = ()
    dead: tuple[DeadJob, ...] = ()
    bytes: int = 0
    """That the queue takes on disk, answers included."""


class JobsRetried(Struct, frozen=True):
    """Dead jobs that are to be begun again."""

    retried: tuple[str, ...]
    left: int = 0
    """For which there was no room (their deployments have ``jobs_waiting`` unanswered jobs), or no time."""
    stopped: str = ""
    """Why there was no time for all; "" where there was."""


class JobRemoved(Struct, frozen=True):
    """A job that was taken back (``cancelled``), or removed in the state that it was in."""

    id: str
    deployment: str
    state: State
    gone: bool = True
    """Whether it is not there any more: one that was taken back still says so to whoever asked."""


class DeadRemoved(Struct, frozen=True):
    """Dead jobs that were removed."""

    removed: int
    more: bool = False
    """Whether there are others, beyond what is removed at once."""


def new_id() -> str:
    """An id that nobody can guess, and that no command takes for an option."""
    while (job_id := secrets.token_urlsafe(_ID_BYTES)).startswith("-"):
        pass
    return job_id


def options_of(settings: QueueSettings) -> Options:
    """The settings, as the queue takes them."""
    return Options(
        waiting=settings.jobs_waiting,
        at_once=settings.jobs_at_once,
        bytes=settings.jobs_bytes,
        keep_s=settings.job_keep_s,
        attempts=settings.job_attempts,
        give_up_s=settings.job_give_up_s,
        lease_s=settings.job_lease_s,
    )


@dataclass(slots=True)
class _Running:
    """A job that this front is having answered."""

    claim: Claim
    let_go: Callable[[], None] = lambda: None
    settling: asyncio.Task[None] | None = None
    """Keeps the answer."""


@dataclass(slots=True)
class _Looked:
    """What the store said in one turn."""

    claims: list[Claim] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    due_in_s: float | None = None
    dead: list[tuple[str, str]] = field(default_factory=list)
    """Ids and deployments."""
    untidy: bool = False
    """Whether there is more to tidy."""


class _Asker:
    """One of the threads that ask the store, and its connection; both are made when they are first wanted.

    Those of the ``first`` go before the others: in between, whoever writes waits for the same lock, and chance would
    decide.
    """

    def __init__(self, open_: Callable[[], JobStore], free: threading.Event, *, first: bool) -> None:
        self._open = open_
        self._free = free
        self._first = first
        self._thread: ThreadPoolExecutor | None = None
        self._store: JobStore | None = None

    @property
    def store(self) -> JobStore:
        """The store; nothing is read before it is asked."""
        if self._store is None:
            self._store = self._open()
        return self._store

    @property
    def opened(self) -> bool:
        """Whether the store was ever wanted."""
        return self._store is not None

    async def ask(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Have something done in the thread."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "jobs")

        def work() -> T:
            if not self._first:
                self._free.wait(_YIELD_S)
                return function(*args, **kwargs)
            self._free.clear()
            try:
                return function(*args, **kwargs)
            finally:
                self._free.set()

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        """Let go of the store, unless it is held up."""
        store, thread = self._store, self._thread
        if store is None or thread is None:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ask(store.close), _AGAIN_S)
        thread.shutdown(wait=False)


class Jobs:
    """The jobs of one front. ``able`` gives the deployments that could answer a job now, and whether there are others.

    Off until `configure`. ``clock`` is the one that leases go by: the machine's, if none is given.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        able: Callable[[], tuple[Collection[str], bool]],
        clock: Clock | None = None,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._able = able
        self.answer: Answerer | None = None
        """Set by whoever knows how requests are answered."""
        self._options: Options | None = None
        self._path: Path | None = None
        self._takes = False
        self._callers: _Asker | None = None
        self._own: _Asker | None = None
        self._now: Callable[[], float] = loop.time
        self._pending = 0
        self._pending_bytes = 0
        self._most_pending_bytes = 0
        self._running: dict[str, _Running] = {}
        """By id: in another file the same numbers are other jobs."""
        self._watched: dict[str, set[asyncio.Future[None]]] = {}
        self._watchers = 0
        self._wake = asyncio.Event()
        self._turning = asyncio.Lock()
        self._depths: tuple[list[Depth], int] = ([], 0)
        self._working: asyncio.Task[None] | None = None
        self._draining = False
        self._closed = False
        self._renewed = self._tidied = self._said = -1e9
        self._taken: Counter[str] = Counter()
        self._ended: dict[str, Counter[str]] = {}

    def configure(
        self, settings: QueueSettings, path: Path, store: Callable[[Path], JobStore], max_body_bytes: int
    ) -> None:
        """Take jobs from now on, and answer those that are there. ``store`` opens one, when it is wanted."""
        # Where none are taken, those that were are answered all the same.
        self._takes = settings.jobs_waiting > 0
        self._options = options_of(settings)
        self._path = path
        # As the leases go: not as the loop's, which stands still while the machine is suspended.
        self._now = (self._clock or machine_clock()).ticks
        free = threading.Event()
        free.set()
        self._callers = _Asker(lambda: store(path), free, first=False)
        self._own = _Asker(lambda: store(path), free, first=True)
        # As much as may be arriving at once.
        self._most_pending_bytes = max(4 * max_body_bytes, 256 * 1024 * 1024)
        self._working = self._loop.create_task(self._work())

    @property
    def on(self) -> bool:
        """Whether jobs are taken here."""
        return self._takes

    @property
    def patience_s(self) -> float:
        """How long a job may stand in front of a model, behind those who wait themselves."""
        return self._options.give_up_s if self._options is not None else 0.0

    # Callers ---------------------------------------------------------------------------------------

    async def take(self, request: Request, owner: str, key: str) -> Job:
        """Keep a request as a job; it is on disk when this returns.

        Raises `Conflict` where another request came under that idempotency key, `Overloaded`, `QueueAway`.
        """
        if not self._takes:
            raise _not_found("")
        with self._holding(request):
            return await self._taken_in(request, owner, key, None)

    async def take_once(self, request: Request, owner: str, key: str, fits: Callable[[], bool]) -> Job | None:
        """The job that this request is under its idempotency key already, whatever would come of it today.

        Where there is none it is taken if it ``fits``; None where it does not. Raises as `take`.
        """
        if not self._takes:
            raise _not_found("")
        with self._holding(request):
            digest, desk = None, self._found(self._callers)
            if desk is not None:
                digest, job = await self._ask(_same, desk.store, owner, key, request)
                if job is not None:
                    return job
            return await self._taken_in(request, owner, key, digest) if fits() else None

    @contextmanager
    def _holding(self, request: Request) -> Iterator[None]:
        """Have the request wait for the store. Raises `Overloaded` where too much does."""
        size = len(request.body)
        if self._pending_bytes and self._pending_bytes + size > self._most_pending_bytes:
            raise Overloaded(
                f"{self._pending_bytes} bytes of jobs are being written down, all that are held at a time",
                hint="send it again in a moment",
            )
        self._pending_bytes += size
        try:
            yield
        finally:
            self._pending_bytes -= size

    async def _taken_in(self, request: Request, owner: str, key: str, digest: bytes | None) -> Job:
        options, desk = self._there()
        new = NewJob(new_id(), owner, key, request, digest)
        job, is_new = await self._ask(desk.store.take, new, options)
        if is_new:
            self._taken[request.deployment] += 1
            self._wake.set()
        return job

    async def find(
        self, job_id: str, owner: str, wait_s: float = 0.0, gone: Callable[[], bool] = lambda: False
    ) -> Job:
        """A job, as soon as it is finished, ``wait_s`` have passed, or whoever asks is ``gone``.

        Where too many wait already it is given as it is. Raises `JobNotFound`, `Overloaded`, `QueueAway`.
        """
        _, desk = self._there(job_id)
        store = desk.store
        if wait_s <= 0 or self._watchers >= _MOST_WATCHERS:
            return self._known(await self._ask(store.find, job_id), job_id, owner)
        end = self._loop.time() + min(wait_s, LONGEST_WAIT_S)
        self._watchers += 1
        changed: asyncio.Future[None] = self._loop.create_future()
        # First be told, then look: what happens in between must not be missed.
        self._watched.setdefault(job_id, set()).add(changed)
        try:
            job = self._known(await self._ask(store.find, job_id), job_id, owner)
            if job.finished or self._draining:
                return job
            self._wake.set()
            while not changed.done() and (left_s := end - self._loop.time()) > 0:
                await asyncio.wait((changed,), timeout=min(left_s, _GONE_S))
                if gone():
                    return job
        finally:
            self._watchers -= 1
            waiting = self._watched.get(job_id, set())
            waiting.discard(changed)
            if not waiting:
                self._watched.pop(job_id, None)
        return self._known(await self._ask(store.find, job_id), job_id, owner)

    async def result(
        self, job_id: str, owner: str, wait_s: float = 0.0, gone: Callable[[], bool] = lambda: False
    ) -> Job | Reply:
        """The answer to a job, or the job where it has none yet; otherwise as `find`.

        Raises `JobNotFound`, `JobCancelled`, `JobDead`, `Overloaded`, `QueueAway`.
        """
        job = await self.find(job_id, owner, wait_s, gone)
        if not job.finished:
            return job
        if job.state == "cancelled":
            raise JobCancelled(f"job {job_id} was cancelled", hint=_SEND_AGAIN)
        if job.state == "dead":
            raise JobDead(f"job {job_id} was given up: {job.error}", hint=_SEND_AGAIN)
        _, desk = self._there(job_id)
        reply = await self._ask(desk.store.reply, job_id)
        if reply is None:
            # Removed in between.
            raise _not_found(job_id)
        return reply

    async def cancel(self, job_id: str, owner: str) -> Job:
        """Take back a job that waits, and remove one that has come to its end, with its answer.

        One that was taken back already stays so. Raises `Conflict` where somebody is at work on it, `JobNotFound`,
        `Overloaded`, `QueueAway`.
        """
        _, desk = self._there(job_id)
        job = self._known(await self._ask(desk.store.find, job_id), job_id, owner)
        if job.state == "cancelled":
            return job
        return (await self._end(desk.store, job_id, all_=False))[0]

    async def _end(self, store: JobStore, job_id: str, *, all_: bool) -> tuple[Job, bool]:
        """Take a job back, or remove it; gives it, and whether it is gone. ``all_``: also one that was taken back."""
        if await self._ask(store.cancel, job_id):
            self._tell((job_id,))
            job = _there_is(await self._ask(store.find, job_id), job_id)
            self._count(job.deployment, "cancelled")
            return job, False
        job = _there_is(await self._ask(store.find, job_id), job_id)
        if not job.finished:
            raise Conflict(
                f"job {job_id} is {job.state}, and only one that waits can be cancelled",
                hint=f"GET /v2/jobs/{job_id}/result has the answer soon",
            )
        if job.state == "cancelled" and not all_:
            return job, False
        if not await self._ask(store.forget, job_id):
            # Somebody was faster: it is gone, or was dead and is begun again.
            job = _there_is(await self._ask(store.find, job_id), job_id)
            raise Conflict(f"job {job_id} is {job.state} now", hint="look at it again")
        return job, True

    # Whoever runs the server -----------------------------------------------------------------------

    async def report(self) -> JobsReport:
        """What there is. Raises `QueueAway`, `QueueTorn`, `Overloaded`."""
        desk = self._found(self._callers)
        if desk is None:
            return JobsReport()
        store = desk.store
        tallies = await self._ask(store.tally)
        letters = await self._ask(store.letters, _MOST_LETTERS)
        _, size = await self._ask(store.depths)
        dead = (
            DeadJob(
                item.job.id,
                item.job.deployment,
                item.job.version,
                item.job.owner,
                item.job.attempts,
                item.job.created,
                item.dead_s,
                item.job.error,
                item.kept,
            )
            for item in letters
        )
        return JobsReport(
            tuple(JobTally(item.deployment, item.state, item.count, item.oldest_s) for item in tallies),
            tuple(dead),
            size,
        )

    async def retry(self, job_id: str) -> JobsRetried:
        """Have a dead job begun again.

        Raises `JobNotFound`, `Conflict` where it is not dead or its request was not kept, `Overloaded`, `QueueAway`.
        """
        options, desk = self._there(job_id)
        store = desk.store
        came = (await self._revive((job_id,), options, desk))[job_id]
        if came == "not dead":
            job = _there_is(await self._ask(store.find, job_id), job_id)
            raise Conflict(f"job {job_id} is {job.state}, and only one that is dead can be retried")
        if came == "not kept":
            raise Conflict(
                f"the request of job {job_id} is not there any more",
                hint="whoever asked has to send it again",
            )
        if came == "no room":
            raise Overloaded(
                f"{options.waiting} jobs of the deployment of job {job_id} are not answered yet, and that is the limit",
                hint="try it again later, or raise jobs_waiting",
            )
        if came == "missing":
            raise _not_found(job_id)
        return JobsRetried((job_id,))

    async def retry_dead(self, deployment: str = "") -> JobsRetried:
        """Have all dead jobs begun again whose requests were kept, or those of one deployment, as far as there is room.

        Raises `Overloaded`, `QueueAway`.
        """
        desk, options = self._found(self._callers), self._options
        if desk is None or options is None:
            return JobsRetried(())
        # Those that are dead now: what dies once more must not be begun again by the same word.
        job_ids = await self._ask(desk.store.dead, deployment, _MOST_AT_ONCE)
        came: dict[str, Revival] = {}
        stopped = ""
        for begin in range(0, len(job_ids), _STEP):
            try:
                came |= await self._revive(job_ids[begin : begin + _STEP], options, desk)
            except Unavailable as error:
                if not came:
                    raise
                # What was begun again is told all the same.
                stopped = error.message
                break
        words = list(came.values())
        return JobsRetried(
            tuple(job_id for job_id, word in came.items() if word == "queued"),
            words.count("no room") + len(job_ids) - len(came),
            stopped,
        )

    async def _revive(self, job_ids: Sequence[str], options: Options, desk: _Asker) -> dict[str, Revival]:
        came = await self._ask(desk.store.revive, job_ids, options)
        revived = [job_id for job_id, word in came.items() if word == "queued"]
        if revived:
            log().info("jobs.retried", count=len(revived), first=revived[0])
            self._wake.set()
        return came

    async def remove(self, job_id: str) -> JobRemoved:
        """Take a job back that waits, or remove one that has come to its end, whosever it is, and however it ended.

        Raises as `cancel`.
        """
        _, desk = self._there(job_id)
        job, gone = await self._end(desk.store, job_id, all_=True)
        log().info("job.removed", job=job.id, deployment=job.deployment, state=job.state)
        return JobRemoved(job.id, job.deployment, job.state, gone)

    async def remove_dead(self, deployment: str = "") -> DeadRemoved:
        """Remove all dead jobs, or those of one deployment. Raises `Overloaded`, `QueueAway`."""
        desk = self._found(self._callers)
        if desk is None:
            return DeadRemoved(0)
        removed, more = 0, True
        try:
            while more and removed < _MOST_AT_ONCE:
                count = await self._ask(desk.store.forget_dead, deployment, _STEP)
                removed, more = removed + count, count == _STEP
        except Unavailable:
            if not removed:
                raise
        if removed:
            log().info("jobs.removed", count=removed, deployment=deployment)
        return DeadRemoved(removed, more)

    async def counts(self) -> JobCounts | None:
        """What there is to count; None where there never was a job."""
        desk = self._found(self._callers)
        if desk is None:
            return None
        # A store that is slow, or away, must not keep the rest from being counted.
        with suppress(ParbakeError, TimeoutError):
            self._depths = await asyncio.wait_for(desk.ask(desk.store.depths), _COUNT_S)
        depths, size = self._depths
        return JobCounts(
            {item.deployment: JobDepth(item.queued, item.running, item.oldest_s) for item in depths},
            size,
            dict(self._taken),
            {name: dict(counts) for name, counts in self._ended.items()},
        )

    # The end ---------------------------------------------------------------------------------------

    async def drain(self, limit_s: float) -> None:
        """Begin nothing more; wait for what is under way, and leave to others what takes longer than half of that."""
        self._draining = True
        self._tell(tuple(self._watched))
        end = self._loop.time() + _LEAVE * limit_s
        # Jobs that are being taken at this moment are left again before anybody lets go of the store.
        with suppress(TimeoutError):
            async with asyncio.timeout(max(_LEAVE * limit_s, _COUNT_S)), self._turning:
                pass
        while self._running and self._loop.time() < end:
            await asyncio.sleep(0.005)
        left = [running for running in self._running.values() if running.settling is None]
        for running in left:
            running.let_go()
            del self._running[running.claim.id]
        # A store that is held up must not hold up the end: then the leases end by themselves.
        with suppress(TimeoutError):
            async with asyncio.timeout(max(_LEAVE * limit_s, _COUNT_S)):
                for running in left:
                    await self._leave(running.claim)

    async def close(self) -> None:
        """Let go of the store."""
        self._closed = True
        if self._working is not None:
            self._working.cancel()
        for desk in (self._own, self._callers):
            if desk is not None:
                await desk.close()

    async def _leave(self, claim: Claim) -> None:
        if self._own is None:
            return
        try:
            await self._own.ask(self._own.store.put_off, claim, 0.0, counted=False, error="")
        except ParbakeError as error:
            # The lease ends by itself.
            log().warning("jobs.not_left", job=claim.id, error=error.message)

    # Work ------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._closed:
            try:
                async with self._turning:
                    pause_s = await self._turn()
            except ParbakeError as error:
                self._say(error)
                pause_s = _AGAIN_S
            except Exception:
                log().exception("jobs.failed")
                pause_s = _AGAIN_S
            if pause_s > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), pause_s)
            self._wake.clear()

    async def _turn(self) -> float:
        """Look after the jobs once; gives the longest pause before the next time."""
        desk, options = self._found(self._own), self._options
        if desk is None or options is None:
            return _LOOK_S
        store, now = desk.store, self._now()
        if self._running and now - self._renewed >= options.lease_s / _RENEWALS:
            claims = [running.claim for running in self._running.values()]
            held = await desk.ask(store.renew, claims, options.lease_s)
            self._renewed = now
            for claim in claims:
                lost = self._running.get(claim.id)
                if claim.id not in held and lost is not None and lost.claim is claim:
                    # Somebody else has it now, or has answered it; what it comes to here would not be kept.
                    log().warning("job.lost", job=claim.id, deployment=claim.request.deployment)
                    if lost.settling is None:
                        lost.let_go()
                        del self._running[claim.id]
        room: dict[str, int] = {}
        busy = Counter(running.claim.request.deployment for running in self._running.values())
        alone = any(running.claim.lost for running in self._running.values())
        if self.answer is not None and not self._draining and not alone:
            able, only = self._able()
            room = share_out(able, busy, options, alone=only)
        tidies = now - self._tidied >= min(_TIDY_S, options.keep_s / 2, options.give_up_s / 2)
        looked = await desk.ask(self._look, store, options, room, tuple(self._watched), tidies)
        if tidies and not looked.untidy:
            self._tidied = now
        for job_id, name in looked.dead:
            log().error("job.dead", deployment=name, job=job_id)
            self._count(name, "dead")
        self._tell(looked.finished)
        if not self._running:
            self._renewed = now
        # What there is to answer with may have changed while the store was asked.
        able = self._able()[0] if looked.claims else ()
        for claim in looked.claims:
            if claim.request.deployment in able:
                self._begin(claim)
            else:
                self._spawn_leave(claim)
        if looked.claims:
            return 0.0
        if self._watched or self._running or looked.untidy or looked.due_in_s is not None:
            return min(_POLL_S, options.lease_s / _RENEWALS)
        return _LOOK_S

    def _look(
        self, store: JobStore, options: Options, room: dict[str, int], watched: Collection[str], tidies: bool
    ) -> _Looked:
        """What a turn asks of the store, in its thread."""
        dead, untidy = store.tidy(options) if tidies else ([], False)
        finished = store.finished(watched) if watched else []
        due_in_s = store.due_in_s()
        free = options.at_once - len(self._running)
        # Last: what is claimed must not be forgotten because something else cannot be read.
        claims = store.claim(room, free, options, idle=not self._running) if room else []
        return _Looked(claims, finished, due_in_s, dead, untidy)

    def _begin(self, claim: Claim) -> None:
        if self.answer is None or self._draining:
            self._spawn_leave(claim)
            return
        running = self._running[claim.id] = _Running(claim)

        def done(reply: Reply) -> None:
            if running.settling is None and self._running.get(claim.id) is running:
                running.settling = self._loop.create_task(self._settle(running, reply))

        try:
            running.let_go = self.answer(claim.request, claim.owner, done)
        except Exception:
            # A bug of ours: one job ends with it, and not all that share its place.
            log().exception("job.failed", job=claim.id)
            done(_BUG)

    def _spawn_leave(self, claim: Claim) -> None:
        running = self._running[claim.id] = _Running(claim)

        async def leave() -> None:
            await self._leave(claim)
            self._forget(running)

        running.settling = self._loop.create_task(leave())

    def _forget(self, running: _Running) -> None:
        if self._running.get(running.claim.id) is running:
            del self._running[running.claim.id]

    async def _settle(self, running: _Running, reply: Reply) -> None:
        """Keep what a job came to, however long that takes: until it is kept, the lease is renewed."""
        claim = running.claim
        try:
            while not self._closed:
                try:
                    await self._keep(claim, reply)
                    return
                except ParbakeError as error:
                    self._say(error)
                    await asyncio.sleep(_AGAIN_S)
        except Exception:
            # The lease ends, and it is begun again.
            log().exception("job.not_kept", job=claim.id)
        finally:
            self._forget(running)
            self._wake.set()

    async def _keep(self, claim: Claim, reply: Reply) -> None:
        options, desk = self._options, self._own
        if options is None or desk is None:
            return
        store = desk.store
        name = claim.request.deployment
        verdict = judge(
            reply,
            attempts=claim.attempts,
            refusals=claim.refusals,
            options=options,
            chance=random.random(),  # noqa: S311  it spreads retries, and hides nothing
        )
        if isinstance(verdict, Answered):
            kept = await desk.ask(store.finish, claim, reply, failed=verdict.failed)
            state = "failed" if verdict.failed else "done"
        elif isinstance(verdict, Again):
            counted, error = verdict.counted, verdict.error
            await desk.ask(store.put_off, claim, verdict.delay_s, counted=counted, error=error)
            return
        else:
            kept, state = await desk.ask(store.give_up, claim, verdict.error), "dead"
            log().error("job.dead", deployment=name, job=claim.id, error=verdict.error)
        if kept:
            self._count(name, state)
            self._tell((claim.id,))

    # Parts -----------------------------------------------------------------------------------------

    async def _ask(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the store for a caller. Raises `Overloaded` where too many do."""
        if self._callers is None:
            raise _not_found("")
        if self._pending >= _MOST_PENDING:
            raise Overloaded(
                f"{self._pending} questions wait for the queue of jobs, all that are held at a time",
                hint="send it again in a moment",
            )
        self._pending += 1
        try:
            return await self._callers.ask(function, *args, **kwargs)
        finally:
            self._pending -= 1

    def _found(self, desk: _Asker | None) -> _Asker | None:
        """Where the store is asked, where there is one."""
        if desk is None or self._path is None or not (desk.opened or self._path.exists()):
            return None
        return desk

    def _there(self, job_id: str = "") -> tuple[Options, _Asker]:
        """Options, and where the store is asked, for a job that there may be. Raises `JobNotFound`."""
        options, desk = self._options, self._callers
        if options is None or desk is None:
            raise _not_found(job_id)
        if job_id and (len(job_id) != _ID_CHARACTERS or self._found(desk) is None):
            raise _not_found(job_id)
        return options, desk

    def _known(self, job: Job | None, job_id: str, owner: str) -> Job:
        if job is None or owner != job.owner:
            raise _not_found(job_id)
        return job

    def _count(self, deployment: str, state: str) -> None:
        self._ended.setdefault(deployment, Counter())[state] += 1

    def _tell(self, job_ids: Collection[str]) -> None:
        """Wake those who wait for these jobs."""
        for job_id in job_ids:
            for waiting in self._watched.get(job_id, ()):
                if not waiting.done():
                    waiting.set_result(None)

    def _say(self, error: ParbakeError) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_S:
            self._said = now
            log().error("jobs.away", error=error.message, hint=error.hint)


def _same(store: JobStore, owner: str, key: str, request: Request) -> tuple[bytes, Job | None]:
    digest = request.digest()
    return digest, store.same(owner, key, digest)


def _there_is(job: Job | None, job_id: str) -> Job:
    """The job, whosever it is. Raises `JobNotFound`."""
    if job is None:
        raise _not_found(job_id)
    return job


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(
        f"no job {job_id[:60]!r}", hint="results are kept for a while only, and for the API key that asked"
    )
