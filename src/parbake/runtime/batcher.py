"""Collect waiting rows into one batch, as large as the deadline allows, and give each caller its own back.

Work-conserving: whoever waits when a runner gets free goes together, and nobody waits for a timer unless
a delay was asked for. Admission is by deadline: what cannot be answered in time is refused at once.
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

_LARGEST_BATCH: Final = 1024
_STALE_S: Final = 5.0
"""Age at which a learned cost no longer refuses anybody by itself."""
_SWEEP_S: Final = 0.1
"""How often those who wait behind a long batch are looked at for deadlines that have passed."""


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


class Outcome:
    """What a backend says of one batch: outputs, or an error that concerns the batch as a whole."""

    __slots__ = ("error", "raws", "seconds", "shapes")

    def __init__(
        self,
        raws: Sequence[bytes] = (),
        shapes: Sequence[Shape] = (),
        seconds: float = 0.0,
        error: ParbakeError | None = None,
    ) -> None:
        self.raws = raws
        self.shapes = shapes
        self.seconds = seconds
        self.error = error


class Backend(Protocol):
    """Something that runs one batch at a time."""

    @property
    def up(self) -> bool:
        """Whether it can be given a batch."""

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
        self._queue: deque[Job] = deque()
        self._scheduled = False
        self._timer: Timer | None = None
        self._sweeping = False
        self._halved = False
        """Whether jobs of a batch that failed are waiting."""
        self._running_until: dict[int, float] = {}
        self._learned = 0.0
        self.cost = cost or BatchCost()
        self.down = not self.up
        """Whether no backend can take a batch; kept by `backend_up` and `backend_down`."""
        self.queued_rows = 0
        self.running_rows = 0

    @property
    def up(self) -> bool:
        """Whether any backend can take a batch."""
        return any(backend.up for backend in self._backends)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._queue and not self.running_rows

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `Overloaded`, `DeadlineExceeded` or `RunnerDown` at once, before any work."""
        now = job.queued = job.queued or perf_counter()
        rows = job.rows
        if self.down:
            raise runner_down(self._contract.name)
        if self.queued_rows and self.queued_rows + rows > self._max_queue_rows:
            raise Overloaded(
                f"{self.queued_rows} rows wait for model {self._contract.name!r}, the limit is {self._max_queue_rows}",
                hint="send less, add runners, or raise max_queue_rows",
                retry_after_s=max(self._wait_s(now), 0.05),
            )
        ahead = self.queued_rows + self.running_rows
        # Every row a batch of its own is the worst that can happen: a closer look only when that is too long.
        # A single row with nobody ahead always goes: without it nothing would be learned any more.
        if ahead + rows > 1 and now + (ahead + rows) * (self.cost.fixed_s + self.cost.row_s) > job.deadline:
            wait_s = self._wait_s(now) + self.cost.waiting_s(1, rows)
            # What was learned long ago is no ground for a refusal while nothing runs.
            if now + wait_s > job.deadline and (ahead or now - self._learned < _STALE_S):
                raise Overloaded(
                    f"the answer would take about {wait_s * 1e3:.0f} ms, the deadline is in "
                    f"{max(job.deadline - now, 0) * 1e3:.0f} ms",
                    hint="send less, add runners, or allow more time",
                    retry_after_s=max(wait_s, 0.05),
                )
        self._queue.append(job)
        self.queued_rows += rows
        if self._scheduled:
            if self._timer is not None and self.queued_rows >= self._limit():
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
        elif not self._sweeping:
            self._sweeping = True
            self._loop.call_later(_SWEEP_S, self._sweep)

    def backend_down(self) -> None:
        """A backend went: if it was the last, whoever waits is told."""
        self.down = not self.up
        if self.down:
            self._fail_waiting(runner_down(self._contract.name))

    def _fail_waiting(self, error: ParbakeError) -> None:
        waiting, self._queue, self.queued_rows = self._queue, deque(), 0
        for job in waiting:
            job.error = error
            _tell(job)

    def _sweep(self) -> None:
        """Answer those whose deadline has passed while every backend was busy: no batch will do it for a while."""
        self._sweeping = False
        now = perf_counter()
        late = [job for job in self._queue if job.deadline < now]
        if late:
            self._queue = deque(job for job in self._queue if job.deadline >= now)
            self.queued_rows -= sum(job.rows for job in late)
        if self._queue:
            self._sweeping = True
            self._loop.call_later(_SWEEP_S, self._sweep)
        for job in late:
            job.error = self._too_late(job, now)
            _tell(job)

    def backend_up(self) -> None:
        """A backend came back: whoever waits may go."""
        self.down = False
        if self._queue and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _wait_s(self, now: float) -> float:
        """Predicted time until what waits and runs now is done."""
        cost = self.cost
        if not cost.known:
            return 0.0
        # A backend that is free takes what comes next at once; else the first to get free does.
        busy = len(self._running_until)
        running = 0.0
        if busy and busy >= sum(backend.up for backend in self._backends):
            running = min(self._running_until.values()) - now
        batches = -(-self.queued_rows // self._limit())
        queued = cost.waiting_s(batches, self.queued_rows) / max(len(self._backends), 1)
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
            if not self._queue:
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
        if self._queue and not self.up:
            self._fail_waiting(runner_down(self._contract.name))
        elif self._queue and not self._sweeping:
            self._sweeping = True
            self._loop.call_later(_SWEEP_S, self._sweep)

    def _take(self) -> tuple[list[Job], int]:
        """The next jobs that can go together: in order, of one shape, within the largest batch."""
        queue = self._queue
        limit = self._limit()
        now = perf_counter()
        rows = self.queued_rows
        if rows == len(queue) <= limit and not self._halved:
            # The usual case, one row each: all of them, if nothing is the matter with any.
            shapes = queue[0].shapes
            odd = [
                job
                for job in queue
                if job.deadline < now
                or job.shapes is not shapes
                or (job.caller is not None and job.caller.closed)
            ]
            if not odd:
                jobs = list(queue)
                queue.clear()
                self.queued_rows = 0
                for job in jobs:
                    job.queue_s = now - job.queued
                return jobs, rows
        jobs = []
        rows = 0
        taken = 0
        while queue:
            job = queue[0]
            if job.deadline < now:
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
            queue.popleft()
            taken += job.rows
            job.queue_s = now - job.queued
            jobs.append(job)
            rows += job.rows
        self.queued_rows -= taken
        self._halved = self._halved and bool(queue)
        return jobs, rows

    def _drop(self, error: ParbakeError) -> None:
        """Answer the first in the queue with an error, before any work is spent on it."""
        job = self._queue.popleft()
        self.queued_rows -= job.rows
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
                try:
                    self._hand_out(jobs, rows, outcome)
                except Exception:
                    log().exception("batch.not_handed_out", deployment=self._contract.name, rows=rows)
                    failed = ModelFailed("what the model answered does not fit its contract")
                    for job in jobs:
                        job.error = failed
                        _tell(job)
            elif len(jobs) > 1 and not isinstance(outcome.error, RunnerDown | DeadlineExceeded):
                # One of them is bad: they go again in halves, until only the bad one fails.
                self._halved = True
                middle = len(jobs) // 2
                for half in (jobs[middle:], jobs[:middle]):
                    group = object()
                    for job in reversed(half):
                        job.group = group
                        self._queue.appendleft(job)
                        self.queued_rows += job.rows
            else:
                for job in jobs:
                    job.error = outcome.error
                    job.model_s = outcome.seconds
                    _tell(job)
            if self._queue and not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._dispatch)

        backend.run(raws, rows, first.shapes, done)

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
