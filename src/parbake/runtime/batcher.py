"""Collect waiting rows into one batch, as large as the deadline allows, and give each caller its own back.

Work-conserving: whoever waits when a runner gets free goes together, and nobody waits for a timer unless
a delay was asked for. Admission is by deadline: what cannot be answered in time is refused at once.

A batch that failed goes again in parts, until only the bad row fails. That holds for a batch whose process ended
over it, too: its rows wait for the process to come back, and a row that ends it again, alone, goes to `Quarantine`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final, Protocol

from parbake.contract.model import Contract
from parbake.contract.tensors import Shape, row_slices
from parbake.errors import DeadlineExceeded, ModelFailed, Overloaded, ParbakeError, RunnerDown
from parbake.logs import log
from parbake.runtime.costs import BatchCost
from parbake.runtime.quarantine import Quarantine
from parbake.runtime.waiting import NORMAL, Waiting

_LARGEST_BATCH: Final = 1024
_STALE_S: Final = 5.0
"""Age at which a learned cost no longer refuses anybody by itself."""
_SWEEP_S: Final = 0.1
"""How often those who wait behind a long batch are looked at for deadlines that have passed."""
_PATIENCE_S: Final = 2.0
"""How long those who were let in wait for a process that ended to come back."""
_MARGIN: Final = 1.1
"""Predictions are a little pessimistic: an answer that is late helps nobody."""
_HALVES: Final = 2
_PIECES: Final = 8
"""Parts that a batch goes again in when its process ended over it: each step may cost a restart, so few are wanted."""


class Caller(Protocol):
    """Whoever waits for an answer."""

    @property
    def closed(self) -> bool:
        """Whether nobody waits any more."""


class Job:
    """Rows of one caller on their way through the model.

    ``raws`` and ``shapes`` are per input (see `parbake.contract.tensors`). When it is done, ``error`` is set or
    ``out_raws`` and ``out_shapes`` per output are, and ``done(job)`` is called, exactly once.
    """

    # Defaults stand on the class: a job is made for every request, and most never set them.
    group: object | None = None
    """Jobs of a batch that failed go again only with those of the same group."""
    queued = 0.0
    error: ParbakeError | None = None
    out_raws: Sequence[bytes] = ()
    out_shapes: Sequence[Shape] = ()
    queue_s = 0.0
    model_s = 0.0
    together: Callable[[Sequence[Job], Outcome], None] | None = None
    """Takes a whole batch whose jobs are all of one row and have this very function, in place of ``done``."""
    key = b""
    """Key of the row, where others may wait for the same answer."""
    joined = False
    """Whether it was answered with the answer of another."""
    plain = True
    """Whether it is nobody's in particular, and as urgent as most."""
    priority = NORMAL
    client = ""
    ends = 0
    """How often a process ended over a batch that it was in."""

    def __init__(
        self,
        raws: Sequence[bytes],
        rows: int,
        shapes: tuple[Shape, ...],
        deadline: float,
        done: Callable[[Job], None],
        caller: Caller | None = None,
    ) -> None:
        self.raws = raws
        self.rows = rows
        self.shapes = shapes
        self.deadline = deadline
        self.done = done
        self.caller = caller

    def belongs(self, client: str, priority: int = NORMAL) -> None:
        """Say whose it is ("" for nobody's in particular), and how urgent (see `parbake.runtime.waiting`)."""
        self.client = client
        self.priority = priority
        self.plain = not client and priority == NORMAL


class Outcome:
    """What a backend says of one batch: outputs, or an error that concerns the batch as a whole."""

    __slots__ = ("error", "raws", "seconds", "shapes", "unread")

    def __init__(
        self,
        raws: Sequence[bytes] = (),
        shapes: Sequence[Shape] = (),
        seconds: float = 0.0,
        error: ParbakeError | None = None,
        unread: bool = False,
    ) -> None:
        self.raws = raws
        self.shapes = shapes
        self.seconds = seconds
        self.error = error
        self.unread = unread
        """Whether the model never saw the batch: nobody in it is to blame, and it goes again."""


class Backend(Protocol):
    """Something that runs one batch at a time."""

    @property
    def up(self) -> bool:
        """Whether it can be given a batch."""

    @property
    def answers(self) -> bool:
        """Whether it was there when it was asked last."""

    def run(
        self, raws: Sequence[bytes], rows: int, shapes: tuple[Shape, ...], done: Callable[[Outcome], None]
    ) -> None:
        """Start one batch; ``done`` is called once, at once or later."""


class Timer(Protocol):
    """A call that has not come yet."""

    def cancel(self) -> None:
        """Never call."""


class Scheduler(Protocol):
    """The part of an event loop that a batcher uses."""

    def call_soon(self, callback: Callable[[], None]) -> object:
        """Call at the end of this turn."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call after ``delay`` seconds."""


class Batcher:
    """One queue in front of the backends of one model version. Used from one event loop only.

    ``longest_s`` bounds the predicted time of a batch; ``batch_sizes`` counts batches by rows.
    """

    def __init__(
        self,
        contract: Contract,
        backends: Sequence[Backend],
        loop: Scheduler,
        *,
        longest_s: float,
        max_queue_rows: int = 8192,
        max_batch_rows: int = 0,
        delay_s: float = 0.0,
        cost: BatchCost | None = None,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._contract = contract
        self._free: deque[Backend] = deque(backends)
        self._backends = tuple(backends)
        self._loop = loop
        self._longest_s = longest_s
        self._max_queue_rows = max_queue_rows
        self._max_batch_rows = max_batch_rows
        self._delay_s = delay_s
        self._observe = observe
        self._waiting = Waiting()
        self.arriving: list[Job] = []
        """Plain jobs of one row that came in this turn and are queued at its end: see `expect`."""
        self._scheduled = False
        self._timer: Timer | None = None
        self._sweeping = False
        self._apart = False
        """Whether jobs are waiting that may not go with just any other."""
        self._patience: Timer | None = None
        self._closed = False
        self.quarantine = Quarantine(contract.name)
        self._accused = self.quarantine.found
        self._running_until: dict[int, float] = {}
        self._learned = 0.0
        self._last_rows = 0
        self.cost = cost or BatchCost()
        self.down = not self.up
        """Whether no backend can take a batch; kept by `backend_up` and `backend_down`."""
        self.running_rows = 0
        self.wake: Callable[[], None] | None = None
        """Has a model loaded that sleeps until it is wanted; None for those that never do. May raise `ParbakeError`."""

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._waiting.rows + len(self.arriving)

    @property
    def up(self) -> bool:
        """Whether any backend can take a batch."""
        return any(backend.up for backend in self._backends)

    @property
    def answers(self) -> bool:
        """Whether any backend is there and answers."""
        return any(backend.answers for backend in self._backends)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting.rows and not self.running_rows and not self.arriving

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `Overloaded`, `DeadlineExceeded` or `RunnerDown` at once, before any work."""
        now = job.queued = job.queued or perf_counter()
        rows = job.rows
        if self._accused and self.quarantine.suspects(job.raws, job.shapes):
            # Alone: whatever it does this time, it does to nobody else.
            job.group = object()
            self._apart = True
        if self.down:
            if self.wake is None:
                raise runner_down(self._contract.name)
            self.wake()
        waiting = self._waiting
        queued = waiting.rows
        if queued and queued + rows > self._max_queue_rows:
            self._make_room(job, now)
            queued = waiting.rows
        ahead = queued + self.running_rows
        # Every row a batch of its own is the worst that can happen: a closer look only when that is too long.
        # A single row with nobody ahead always goes: without it nothing would be learned any more.
        if ahead + rows > 1 and now + (ahead + rows) * (self.cost.fixed_s + self.cost.row_s) > job.deadline:
            before, limit = waiting.ahead(job), self._limit()
            alongside = before % limit
            # Whoever comes before its batch begins goes along: it will be about as large as the last one was.
            together = max(alongside + rows, 0 if self._free else min(self._last_rows, limit))
            wait_s = _MARGIN * (self._wait_s(now, before - alongside) + self.cost.waiting_s(1, together))
            # What was learned long ago is no ground for a refusal while nothing runs.
            if now + wait_s > job.deadline and (ahead or now - self._learned < _STALE_S):
                raise Overloaded(
                    f"the answer would take about {wait_s * 1e3:.0f} ms, the deadline is in "
                    f"{max(job.deadline - now, 0) * 1e3:.0f} ms",
                    hint="send less, add runners, or allow more time",
                    retry_after_s=max(wait_s, 0.05),
                )
        if job.plain:
            # As `Waiting.add` would, without the call.
            waiting.rows += rows
            waiting.plain.append(job)
        else:
            waiting.add(job)
        if self._scheduled:
            if self._timer is not None and waiting.rows >= self._limit():
                # As much company as there can be: nothing to wait for any more.
                self._timer.cancel()
                self._timer = None
                self._loop.call_soon(self._dispatch)
        elif self._free:
            self._scheduled = True
            # Not before the end of this turn: requests that arrived together go together.
            if self._delay_s:
                delay_s = min(self._delay_s, max(job.deadline - now, 0.0) / 2)
                self._timer = self._loop.call_later(delay_s, self._dispatch)
            else:
                self._loop.call_soon(self._dispatch)
        else:
            self._keep_sweeping()

    def check_alone(self, rows: int, limit_s: float) -> None:
        """Raise `Overloaded` where so many rows would take longer than that even with nobody ahead of them.

        As `submit` refuses them when that is all the time they have.
        """
        alone_s = _MARGIN * self.cost.waiting_s(1, rows)
        # As there: a single row always goes, and what was learned long ago is no ground.
        if rows > 1 and alone_s > limit_s and perf_counter() - self._learned < _STALE_S:
            raise Overloaded(
                f"the answer would take about {alone_s * 1e3:.0f} ms, the deadline is in {limit_s * 1e3:.0f} ms",
                hint="send less, add runners, or allow more time",
                retry_after_s=max(alone_s, 0.05),
            )

    def expect(self) -> None:
        """Queue, at the end of this turn, what is put into `arriving` until then; call it before the first is.

        For plain jobs of one row, `queued` set: together they cost far less than one by one. Each that is refused is
        told by ``done``.
        """
        self._loop.call_soon(self._admit)

    def _admit(self) -> None:
        """Queue what has arrived: as `submit` would, which sees to it where anything is out of the ordinary."""
        jobs, self.arriving = self.arriving, []
        if not jobs:
            return
        waiting = self._waiting
        rows = len(jobs)
        worst_s = (waiting.rows + self.running_rows + rows) * (self.cost.fixed_s + self.cost.row_s)
        if (
            self._delay_s
            or self._accused
            or self.down
            or waiting.rows + rows > self._max_queue_rows
            or perf_counter() + worst_s > min([job.deadline for job in jobs])  # a list is quicker
        ):
            for job in jobs:
                try:
                    self.submit(job)
                except ParbakeError as error:
                    job.error = error
                    _tell(job)
            return
        waiting.rows += rows
        waiting.plain += jobs
        if self._scheduled:
            return
        if self._free:
            # This is the end of the turn.
            self._dispatch()
        else:
            self._keep_sweeping()

    def backend_down(self) -> None:
        """A backend went: if it was the last, whoever waits does so for a while, and is told then."""
        # They came while it was there.
        self._admit()
        self.down = not self.up
        if self.wake is not None:
            if self.down and self._waiting.rows and not self._closed:
                self._keep_sweeping()
                try:
                    self.wake()
                except ParbakeError as error:
                    self.refuse(error)
            return
        if self.down and self._patience is None:
            self._patience = self._loop.call_later(_PATIENCE_S, self._give_up)
            self._keep_sweeping()

    def submit_at_once(self, job: Job) -> None:
        """As `submit`, for one row of somebody whom nobody can join: not at the end of the turn. Raises the same."""
        free = self._free
        now = perf_counter()
        if (
            self._scheduled
            or self._waiting.rows
            or self.running_rows
            or job.deadline < now
            or self._delay_s
            or self.arriving
            or self._accused
            or not free
            or not free[0].up
        ):
            self.submit(job)
            return
        # A single row with nobody ahead always goes.
        job.queued = job.queued or now
        job.queue_s = now - job.queued
        self._start(free.popleft(), [job], 1)

    def close(self) -> None:
        """No backend comes back: tell whoever still waits."""
        self._closed = True
        self._give_up()

    def _give_up(self) -> None:
        self._patience = None
        self.refuse(runner_down(self._contract.name))

    def refuse(self, error: ParbakeError) -> None:
        """Tell whoever waits that nothing will come of it."""
        for job in self._waiting.take_all():
            job.error = error
            _tell(job)

    def _sweep(self) -> None:
        """Answer those whose deadline has passed while every backend was busy: no batch will do it for a while."""
        self._sweeping = False
        now = perf_counter()
        late = self._waiting.keep_if(lambda job: job.deadline >= now)
        self._keep_sweeping()
        for job in late:
            job.error = self._too_late(job, now)
            _tell(job)

    def _keep_sweeping(self) -> None:
        if self._waiting.rows and not self._sweeping:
            self._sweeping = True
            self._loop.call_later(_SWEEP_S, self._sweep)

    def backend_up(self) -> None:
        """A backend came back: whoever waits may go."""
        self.down = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if self._waiting.rows and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _make_room(self, job: Job, now: float) -> None:
        """Find a place for a job where the queue is full. Raises `Overloaded` where it is the one too many."""
        while self._waiting.rows and self._waiting.rows + job.rows > self._max_queue_rows:
            error = Overloaded(
                f"{self.queued_rows} rows wait for model {self._contract.name!r}, the limit is {self._max_queue_rows}",
                hint="send less, add runners, or raise max_queue_rows",
                retry_after_s=max(self._wait_s(now, self.queued_rows), 0.05),
            )
            out = self._waiting.make_room(job)
            if out is None:
                raise error
            out.error = error
            _tell(out)

    def _wait_s(self, now: float, ahead: int) -> float:
        """Predicted time until what runs now, and ``ahead`` rows that wait, are done."""
        cost = self.cost
        if not cost.known:
            return 0.0
        # A backend that is free takes what comes next at once; else the first to get free does.
        busy = len(self._running_until)
        running = 0.0
        if busy and busy >= sum(backend.up for backend in self._backends):
            running = min(self._running_until.values()) - now
        batches = -(-ahead // self._limit())
        queued = cost.waiting_s(batches, ahead) / max(len(self._backends), 1)
        return max(running, 0.0) + queued

    def _limit(self) -> int:
        if self._max_batch_rows:
            return self._max_batch_rows
        return self.cost.rows_within(self._longest_s, _LARGEST_BATCH)

    def _dispatch(self) -> None:
        self._scheduled = False
        self._timer = None
        free = self._free
        # Each free backend once: one that is done at once must not hold the loop until the queue is empty.
        for _ in range(len(free)):
            if not self._waiting.rows:
                return
            backend = free.popleft()
            if not backend.up:
                free.append(backend)
                continue
            jobs, rows = self._take()
            if not jobs:
                free.append(backend)
                return
            self._start(backend, jobs, rows)
        self._keep_sweeping()

    def _take(self) -> tuple[list[Job], int]:
        """The next jobs that can go together: in order, of one shape, within the largest batch."""
        waiting = self._waiting
        queue = waiting.plain
        limit = self._limit()
        now = perf_counter()
        rows = waiting.rows
        # When the batch ends, as far as is known: whoever cannot wait so long is told now, and not when it is late.
        ends = now
        if rows > 1 and now - self._learned < _STALE_S:
            ends += _MARGIN * self.cost.seconds(min(rows, limit))
        if rows == len(queue) <= limit and not self._apart:
            # The usual case, one row each: all of them, if nothing is the matter with any.
            shapes = queue[0].shapes
            odd = [
                job
                for job in queue
                if job.deadline < ends
                or job.shapes is not shapes
                or (job.caller is not None and job.caller.closed)
            ]
            if not odd:
                jobs = list(queue)
                queue.clear()
                waiting.rows = 0
                for job in jobs:
                    job.queue_s = now - job.queued
                return jobs, rows
        jobs = []
        rows = 0
        while waiting.rows:
            job = waiting.peek()
            if job.deadline < ends:
                self._drop(self._too_late(job, now))
                continue
            if job.caller is not None and job.caller.closed:
                self._drop(DeadlineExceeded("the caller has gone"))
                continue
            if jobs:
                first = jobs[0]
                if rows + job.rows > limit or job.group is not first.group:
                    break
                if job.shapes is not first.shapes and job.shapes != first.shapes:
                    break
            waiting.pop()
            job.queue_s = now - job.queued
            jobs.append(job)
            rows += job.rows
        self._apart = self._apart and bool(waiting.rows)
        return jobs, rows

    def _drop(self, error: ParbakeError) -> None:
        """Answer the first in the queue with an error, before any work is spent on it."""
        job = self._waiting.pop()
        job.error = error
        _tell(job)

    def _too_late(self, job: Job, now: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"waited {(now - job.queued) * 1e3:.0f} ms for model {self._contract.name!r}, past the deadline",
            hint="send less, add runners, or allow more time",
        )

    def _start(self, backend: Backend, jobs: list[Job], rows: int) -> None:
        first = jobs[0]
        if len(jobs) == 1:
            raws: Sequence[bytes] = first.raws
        else:
            raws = [b"".join(parts) for parts in zip(*(job.raws for job in jobs), strict=True)]
        started = perf_counter()
        self._last_rows = rows
        self.running_rows += rows
        self._running_until[id(backend)] = started + self.cost.seconds(rows)

        def done(outcome: Outcome) -> None:
            self.running_rows -= rows
            self._running_until.pop(id(backend), None)
            self._free.append(backend)
            if outcome.error is None:
                # The whole round trip is what the next caller has to wait for.
                self._learned = perf_counter()
                self.cost.observe(rows, self._learned - started)
                self._observe(rows, outcome.seconds)
                if self._accused and first.group is not None:
                    for job in jobs:
                        self.quarantine.acquit(job.raws, job.shapes)
                try:
                    self._hand_out(jobs, rows, outcome)
                except Exception:
                    log().exception("batch.not_handed_out", deployment=self._contract.name, rows=rows)
                    failed = ModelFailed("what the model answered does not fit its contract")
                    for job in jobs:
                        job.error = failed
                        _tell(job)
            elif outcome.unread:
                self._again(jobs, 1)
                if self._closed:
                    self._give_up()
            elif isinstance(outcome.error, RunnerDown):
                self._lost(jobs, outcome.error)
            elif len(jobs) > 1 and not isinstance(outcome.error, DeadlineExceeded):
                # One of them is bad: they go again in halves, until only the bad one fails.
                self._again(jobs, _HALVES)
            else:
                if isinstance(outcome.error, DeadlineExceeded):
                    # It never came back, and who of them was to blame shows when they come again, alone.
                    for job in jobs:
                        self.quarantine.accuse(job.raws, job.shapes, alone=len(jobs) == 1)
                for job in jobs:
                    job.error = outcome.error
                    job.model_s = outcome.seconds
                    _tell(job)
            if self._waiting.rows and not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._dispatch)

        backend.run(raws, rows, first.shapes, done)

    def _again(self, jobs: list[Job], pieces: int) -> None:
        """Put the jobs of a batch before all others, to go again in so many parts."""
        self._apart = True
        size = -(-len(jobs) // pieces)
        for at in reversed(range(0, len(jobs), size)):
            group = object()
            for job in reversed(jobs[at : at + size]):
                job.group = group
                self._waiting.add_first(job)

    def _lost(self, jobs: list[Job], error: ParbakeError) -> None:
        """The process ended while it had a batch: one of the rows may have ended it, or something else did."""
        for job in jobs:
            job.ends += 1
        if len(jobs) == 1 and jobs[0].ends > 1:
            # Again, and this time nobody else was there.
            job = jobs[0]
            self.quarantine.take(job.raws, job.shapes)
            job.error = self.quarantine.verdict()
            _tell(job)
            return
        self._again(jobs, _PIECES)
        if self._closed:
            self._give_up()

    def _hand_out(self, jobs: list[Job], rows: int, outcome: Outcome) -> None:
        if len(jobs) == 1:
            job = jobs[0]
            job.out_raws, job.out_shapes, job.model_s = outcome.raws, outcome.shapes, outcome.seconds
            _tell(job)
            return
        together = jobs[0].together
        # A list, because a generator costs more than all the comparisons.
        same = together is not None and all([job.together is together for job in jobs])  # noqa: C419
        if together is not None and same and rows == len(jobs):
            together(jobs, outcome)
            return
        columns: list[list[bytes]] = []
        for spec, raw, shape in zip(self._contract.outputs, outcome.raws, outcome.shapes, strict=True):
            size = spec.row_bytes
            if size is None:
                slices = row_slices(raw, spec.datatype, rows, math.prod(shape))
                pieces: list[bytes] = []
                at = 0
                for job in jobs:
                    pieces.append(slices[at] if job.rows == 1 else b"".join(slices[at : at + job.rows]))
                    at += job.rows
            else:
                if rows == len(jobs):
                    columns.append([raw[at : at + size] for at in range(0, rows * size, size)])
                    continue
                pieces = []
                at = 0
                for job in jobs:
                    end = at + job.rows * size
                    pieces.append(raw[at:end])
                    at = end
            columns.append(pieces)
        if len(columns) == 1:
            for job, piece in zip(jobs, columns[0], strict=True):
                job.out_raws, job.out_shapes, job.model_s = (piece,), outcome.shapes, outcome.seconds
                _tell(job)
            return
        for job, *raws in zip(jobs, *columns, strict=True):
            job.out_raws, job.out_shapes, job.model_s = raws, outcome.shapes, outcome.seconds
            _tell(job)


def _tell(job: Job) -> None:
    """Call ``done``; what goes wrong there must not become the trouble of those who share the batch."""
    try:
        job.done(job)
    except Exception:
        log().exception("batch.answer_not_taken")


def runner_down(name: str) -> RunnerDown:
    """What callers are told while no process runs a model."""
    return RunnerDown(
        f"the process of model {name!r} ended and is being started again",
        hint="try again; keys in the prediction table are answered meanwhile",
        retry_after_s=1.0,
    )
