"""Score a whole input: pieces to worker processes and to this one, until all of them are in segments."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from parbake.batch import wire
from parbake.batch.crew import Crew, Helper
from parbake.batch.model import Piece, Progress, Scored, Tally
from parbake.batch.ports import Source
from parbake.batch.scorer import Scorer, ScoringJob
from parbake.batch.segments import Segment, read_header
from parbake.errors import ModelFailed

_LOCAL: Final = 0
_BACKLOG: Final = 2
_ALONE_S: Final = 1.0
_PROGRESS_S: Final = 0.1
_END_TIMEOUT_S: Final = 5.0


class _Worker:
    """One worker process, as the bake sees it."""

    def __init__(self, helper: Helper) -> None:
        self.index = helper.index
        self.ready = False
        self.used = False
        self.ended = False
        self.waiting: list[Piece] = []
        self.rate = 0.0
        self.connection = wire.Connection(helper.socket)
        self._process = helper.process

    def gone(self) -> ModelFailed:
        """What to say when the process ended by itself."""
        try:
            status = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ModelFailed(
            f"a worker process of the bake {how}",
            hint="the same command goes on where this one ended; --workers 1 takes the least memory",
        )


class _Run:
    """The state of one scoring run."""

    def __init__(self, source: Source, resumed: Sequence[Segment], progress: Progress | None) -> None:
        self.source = source
        self.workers: list[_Worker] = []
        self.segments = list(resumed)
        self.tally = Tally()
        for segment in resumed:
            self.tally = self.tally.plus(segment.header.tally)
        self.resumed = self.tally.scored + self.tally.skipped
        self.progress = progress
        self.shown = 0.0

    def hire(self, crew: Crew, job: ScoringJob) -> None:
        """Have the crew started, and tell it what to score."""
        crew.start()
        self.workers = [_Worker(helper) for helper in crew.helpers]
        for worker in self.workers:
            with contextlib.suppress(OSError):
                # A process that died meanwhile is noticed when its reply is awaited.
                worker.connection.send(wire.Begin(replace(job, name=f"{job.name}-{worker.index:03d}")))

    def note(self, tally: Tally) -> None:
        self.tally = self.tally.plus(tally)
        if self.progress is not None and time.monotonic() - self.shown > _PROGRESS_S:
            self.shown = time.monotonic()
            self.progress(self.tally.scored + self.tally.skipped, self.source.total)

    def finished(self, segment: Segment) -> None:
        """A segment knows the duplicates within it, which no piece does."""
        self.segments.append(segment)
        self.tally = self.tally.plus(Tally(duplicates=segment.header.tally.duplicates))

    def feed(self) -> None:
        """Give every worker that is ready something to do next."""
        for worker in self.workers:
            while worker.ready and len(worker.waiting) < _BACKLOG:
                task = self.source.next(worker.index, worker.rate)
                if task is None:
                    break
                worker.used = True
                worker.waiting.append(task.piece)
                self.send(worker, wire.Score(task.piece), task.payload)

    def send(self, worker: _Worker, order: wire.Order, payload: bytes = b"") -> None:
        """Send an order. Raises what the worker said last, if it is gone."""
        try:
            worker.connection.send(order, payload)
        except OSError:
            self.pump(0)
            raise worker.gone() from None

    def pump(self, timeout: float) -> None:
        """Take what the workers say; waits at most ``timeout`` seconds for the first word."""
        alive = {worker.connection.fileno(): worker for worker in self.workers if not worker.ended}
        poll = select.poll()
        for descriptor in alive:
            poll.register(descriptor, select.POLLIN)
        while alive:
            heard = poll.poll(timeout * 1000)
            if not heard:
                return
            timeout = 0
            for descriptor, _ in heard:
                worker = alive[descriptor]
                try:
                    reply = worker.connection.reply()
                except (EOFError, OSError):
                    raise worker.gone() from None
                self._hear(worker, reply)
                if worker.ended:
                    poll.unregister(descriptor)
                    del alive[descriptor]

    def _hear(self, worker: _Worker, reply: wire.Reply) -> None:
        if isinstance(reply, wire.Ready):
            worker.ready = True
        elif isinstance(reply, wire.Done):
            worker.waiting.pop(0)
            rows = reply.tally.scored + reply.tally.skipped
            worker.rate = rows / max(reply.seconds, 1e-6)
            self.note(reply.tally)
        elif isinstance(reply, wire.Written):
            segment = read_header(Path(reply.path))
            if segment is None:
                raise ModelFailed(f"{reply.path} is not what the worker wrote", hint="is the disk sound?")
            self.finished(segment)
        elif isinstance(reply, wire.Failed):
            worker.ended = True
            if reply.code == "os":
                raise OSError(int(reply.message), reply.hint, reply.path or None)
            raise wire.raised(reply)
        else:
            worker.ended = True


def score(
    source: Source,
    job: ScoringJob,
    crew: Crew,
    *,
    resumed: Sequence[Segment] = (),
    progress: Progress | None = None,
) -> tuple[Scored, list[Segment]]:
    """Score all that the source hands out; gives what became of it and all segments, those ``resumed`` included.

    This process scores too, and the crew is started as soon as it is worth it. Raises `InputFileError`,
    `ModelFailed`, `BundleError`, or OSError where the disk is full; finished segments stay.
    """
    run = _Run(source, resumed, progress)
    if crew.helpers or not source.small:
        run.hire(crew, job)
    local = _local(job)
    began = time.monotonic()
    rate = 0.0
    while True:
        run.pump(0)
        run.feed()
        task = source.next(_LOCAL, rate)
        if task is None:
            if source.drained:
                break
            # What is left is for those who are in the midst of it.
            run.pump(1.0)
            continue
        started = time.perf_counter()
        with _prints_to_stderr():
            tally = local.score(task)
        rate = (tally.scored + tally.skipped) / max(time.perf_counter() - started, 1e-6)
        run.note(tally)
        if local.due():
            for segment in local.flush():
                run.finished(segment)
        if not run.workers and time.monotonic() - began > _ALONE_S:
            # Few rows, but a slow model.
            run.hire(crew, job)
    used = [worker for worker in run.workers if worker.used]
    while any(worker.waiting for worker in used):
        run.pump(1.0)
    for worker in used:
        run.send(worker, wire.End())
    for segment in local.flush(last=True):
        run.finished(segment)
    while not all(worker.ended for worker in used):
        run.pump(1.0)
    if progress is not None:
        progress(run.tally.scored + run.tally.skipped, source.total)
    return Scored(run.tally, run.resumed, 1 + len(used)), run.segments


def _local(job: ScoringJob) -> Scorer:
    with _prints_to_stderr():
        return Scorer(replace(job, name=f"{job.name}-000"))


@contextlib.contextmanager
def _prints_to_stderr() -> Iterator[None]:
    """What a model prints is not the output of the bake."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
