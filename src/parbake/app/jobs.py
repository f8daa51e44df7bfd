"""The jobs of one front: takes them, has them answered when there is room, and tells what became of them.

The store is asked in a thread of its own, one question after the other, so that no request waits for a disk. A job is
answered by what would have answered its request; a front has its jobs for as long as it says so (the lease), and one
that is killed is silent, whereupon another front, or the next server, begins them again.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from msgspec import Struct

from parbake.errors import Conflict, JobCancelled, JobDead, JobNotFound, Overloaded, ParbakeError
from parbake.logs import log
from parbake.queue.model import Claim, Depth, Job, NewJob, Options, Reply, Request
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
"""Requests that wait for the store at a time."""
_LEAVE: Final = 0.5
"""Part of the time to drain after which jobs that are still under way are left to others."""
_ID_BYTES: Final = 16
_ID_CHARACTERS: Final = 22

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


class Jobs:
    """The jobs of one front. ``able`` gives the deployments that could answer a job now, and whether there are others.

    Off until `configure`.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, able: Callable[[], tuple[Collection[str], bool]]
    ) -> None:
        self._loop = loop
        self._able = able
        self.answer: Answerer | None = None
        """Set by whoever knows how requests are answered."""
        self._options: Options | None = None
        self._path: Path | None = None
        self._open: Callable[[Path], JobStore] | None = None
        self._opened: JobStore | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending = 0
        self._pending_bytes = 0
        self._most_pending_bytes = 0
        self._running: dict[int, _Running] = {}
        self._watched: dict[str, set[asyncio.Future[None]]] = {}
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
        if not settings.jobs_waiting:
            return
        self._options = options_of(settings)
        self._path = path
        self._open = store
        # As much as may be arriving at once.
        self._most_pending_bytes = max(4 * max_body_bytes, 256 * 1024 * 1024)
        self._working = self._loop.create_task(self._work())

    @property
    def on(self) -> bool:
        """Whether jobs are taken here."""
        return self._options is not None

    @property
    def patience_s(self) -> float:
        """How long a job may stand in front of a model, behind those who wait themselves."""
        return self._options.give_up_s if self._options is not None else 0.0

    # Callers ---------------------------------------------------------------------------------------

    async def take(self, request: Request, owner: str, key: str) -> Job:
        """Keep a request as a job; it is on disk when this returns.

        Raises `Conflict` where another request came under that idempotency key, `Overloaded`, `QueueAway`.
        """
        options, store = self._there()
        size = len(request.body)
        if self._pending >= _MOST_PENDING or (
            self._pending and self._pending_bytes + size > self._most_pending_bytes
        ):
            raise Overloaded(
                f"{self._pending} jobs are being written down, all that are held at a time",
                hint="send it again in a moment",
            )
        self._pending += 1
        self._pending_bytes += size
        try:
            new = NewJob(secrets.token_urlsafe(_ID_BYTES), owner, key, request)
            job, is_new = await self._ask(store.take, new, options)
        finally:
            self._pending -= 1
            self._pending_bytes -= size
        if is_new:
            self._taken[request.deployment] += 1
            self._wake.set()
        return job

    async def find(self, job_id: str, owner: str, wait_s: float = 0.0) -> Job:
        """A job, as soon as it is finished or ``wait_s`` have passed. Raises `JobNotFound`, `QueueAway`."""
        _, store = self._there(job_id)
        if wait_s <= 0:
            return self._known(await self._ask(store.find, job_id), job_id, owner)
        changed: asyncio.Future[None] = self._loop.create_future()
        # First be told, then look: what happens in between must not be missed.
        self._watched.setdefault(job_id, set()).add(changed)
        try:
            job = self._known(await self._ask(store.find, job_id), job_id, owner)
            if job.finished or self._draining:
                return job
            self._wake.set()
            await asyncio.wait((changed,), timeout=min(wait_s, LONGEST_WAIT_S))
        finally:
            waiting = self._watched.get(job_id, set())
            waiting.discard(changed)
            if not waiting:
                self._watched.pop(job_id, None)
        return self._known(await self._ask(store.find, job_id), job_id, owner)

    async def result(self, job_id: str, owner: str, wait_s: float = 0.0) -> Job | Reply:
        """The answer to a job, or the job where it has none yet.

        Raises `JobNotFound`, `JobCancelled`, `JobDead`, `QueueAway`.
        """
        job = await self.find(job_id, owner, wait_s)
        if not job.finished:
            return job
        if job.state == "cancelled":
            raise JobCancelled(f"job {job_id} was cancelled", hint="send the request again")
        if job.state == "dead":
            raise JobDead(f"job {job_id} was given up: {job.error}", hint="send the request again")
        _, store = self._there(job_id)
        reply = await self._ask(store.reply, job_id)
        if reply is None:
            # Removed in between.
            raise _not_found(job_id)
        return reply

    async def cancel(self, job_id: str, owner: str) -> Job:
        """Take back a job that nobody is at work on. Raises `Conflict` for others, `JobNotFound`, `QueueAway`."""
        _, store = self._there(job_id)
        job = self._known(await self._ask(store.find, job_id), job_id, owner)
        if job.state == "cancelled":
            return job
        if await self._ask(store.cancel, job_id):
            self._count(job.deployment, "cancelled")
            self._tell((job_id,))
        elif (job := self._known(await self._ask(store.find, job_id), job_id, owner)).state != "cancelled":
            raise Conflict(
                f"job {job_id} is {job.state}, and only one that waits can be cancelled",
                hint=f"GET /v2/jobs/{job_id}/result has the answer, now or soon",
            )
        return self._known(await self._ask(store.find, job_id), job_id, owner)

    async def counts(self) -> JobCounts | None:
        """What there is to count; None where there never was a job."""
        store = self._found()
        if store is None:
            return None
        # A store that is slow, or away, must not keep the rest from being counted.
        with suppress(ParbakeError, TimeoutError):
            self._depths = await asyncio.wait_for(self._ask(store.depths), _COUNT_S)
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
        # Jobs that are being taken at this moment are left again before anybody lets go of the store.
        async with self._turning:
            pass
        end = self._loop.time() + _LEAVE * limit_s
        while self._running and self._loop.time() < end:
            await asyncio.sleep(0.005)
        for running in list(self._running.values()):
            if running.settling is None:
                running.let_go()
                self._running.pop(running.claim.number, None)
                await self._leave(running.claim)

    async def close(self) -> None:
        """Let go of the store."""
        self._closed = True
        if self._working is not None:
            self._working.cancel()
        store, thread = self._opened, self._thread
        if store is not None and thread is not None:
            await self._ask(store.close)
            thread.shutdown(wait=False)

    async def _leave(self, claim: Claim) -> None:
        if self._opened is None:
            return
        try:
            await self._ask(self._opened.put_off, claim, 0.0, counted=False, error="")
        except ParbakeError as error:
            # The lease ends by itself.
            log().warning("jobs.not_left", job=claim.id, error=error.message)

    # Work ------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
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
        store, options = self._found(), self._options
        if store is None or options is None:
            return _LOOK_S
        now = self._loop.time()
        if self._running and now - self._renewed >= options.lease_s / _RENEWALS:
            claims = [running.claim for running in self._running.values()]
            held = await self._ask(store.renew, claims, options.lease_s)
            self._renewed = now
            for claim in claims:
                if claim.id not in held and (lost := self._running.get(claim.number)) is not None:
                    # Somebody else has it now, or has answered it; what it comes to here would not be kept.
                    log().warning("job.lost", job=claim.id, deployment=claim.request.deployment)
                    if lost.settling is None:
                        lost.let_go()
                        del self._running[claim.number]
        room: dict[str, int] = {}
        busy = Counter(running.claim.request.deployment for running in self._running.values())
        alone = any(running.claim.lost for running in self._running.values())
        if self.answer is not None and not self._draining and not alone:
            able, only = self._able()
            room = share_out(able, busy, options, alone=only)
        tidies = now - self._tidied >= min(_TIDY_S, options.keep_s / 2, options.give_up_s / 2)
        looked = await self._ask(self._look, store, options, room, tuple(self._watched), tidies)
        if tidies and not looked.untidy:
            self._tidied = now
        for job_id, name in looked.dead:
            log().error("job.dead", deployment=name, job=job_id)
            self._count(name, "dead")
        self._tell(looked.finished)
        if not self._running:
            self._renewed = now
        for claim in looked.claims:
            self._begin(claim)
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
        running = self._running[claim.number] = _Running(claim)

        def done(reply: Reply) -> None:
            if running.settling is None and self._running.get(claim.number) is running:
                running.settling = self._loop.create_task(self._settle(running, reply))

        try:
            running.let_go = self.answer(claim.request, claim.owner, done)
        except Exception:
            # A bug of ours: one job ends with it, and not all that share its place.
            log().exception("job.failed", job=claim.id)
            done(_BUG)

    def _spawn_leave(self, claim: Claim) -> None:
        running = self._running[claim.number] = _Running(claim)

        async def leave() -> None:
            await self._leave(claim)
            self._running.pop(claim.number, None)

        running.settling = self._loop.create_task(leave())

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
            self._running.pop(claim.number, None)
            self._wake.set()

    async def _keep(self, claim: Claim, reply: Reply) -> None:
        options, store = self._there(claim.id)
        name = claim.request.deployment
        verdict = judge(
            reply,
            attempts=claim.attempts,
            refusals=claim.refusals,
            options=options,
            chance=random.random(),  # noqa: S311  it spreads retries, and hides nothing
        )
        if isinstance(verdict, Answered):
            kept = await self._ask(store.finish, claim, reply, failed=verdict.failed)
            state = "failed" if verdict.failed else "done"
        elif isinstance(verdict, Again):
            counted, error = verdict.counted, verdict.error
            await self._ask(store.put_off, claim, verdict.delay_s, counted=counted, error=error)
            return
        else:
            kept, state = await self._ask(store.give_up, claim, verdict.error), "dead"
            log().error("job.dead", deployment=name, job=claim.id, error=verdict.error)
        if kept:
            self._count(name, state)
            self._tell((claim.id,))

    # Parts -----------------------------------------------------------------------------------------

    async def _ask(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Have the store's thread do something."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "jobs")
        return await self._loop.run_in_executor(self._thread, lambda: function(*args, **kwargs))

    def _found(self) -> JobStore | None:
        """The store, where there is one."""
        if self._opened is None and (self._path is None or not self._path.exists()):
            return None
        return self._store()

    def _store(self) -> JobStore:
        if self._opened is None:
            if self._open is None or self._path is None:
                raise _not_found("")
            self._opened = self._open(self._path)
        return self._opened

    def _there(self, job_id: str = "") -> tuple[Options, JobStore]:
        """Options and store, for a job that there may be. Raises `JobNotFound`."""
        if self._options is None or (job_id and (len(job_id) != _ID_CHARACTERS or self._found() is None)):
            raise _not_found(job_id)
        return self._options, self._store()

    def _known(self, job: Job | None, job_id: str, owner: str) -> Job:
        if job is None or job.owner != owner:
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


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(
        f"no job {job_id[:60]!r}", hint="results are kept for a while only, and for the API key that asked"
    )
