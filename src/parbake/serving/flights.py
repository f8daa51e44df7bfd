"""Identical rows that are on their way through the model at the same time are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from parbake.errors import DeadlineExceeded, ParbakeError
from parbake.logs import log
from parbake.runtime.batcher import Job

_NOBODY: Final[tuple[Job, ...]] = ()


class Flights:
    """Jobs of one row under way, by the key of their row. ``submit`` gives a job to the model.

    The first job of a key goes to the model; those that come while it is under way wait for its answer. Whoever
    completes the first job calls `landed` or `failed`, and answers who is given back.
    """

    def __init__(self, submit: Callable[[Job], None]) -> None:
        self._submit = submit
        self._flights: dict[bytes, list[Job]] = {}
        self.joined = 0
        """Rows that were answered with another's answer."""

    def board(self, key: bytes, job: Job) -> None:
        """Have a row computed, by the model or together with another. Raises what submitting raises."""
        flight = self._flights.get(key)
        if flight is None:
            self._flights[key] = [job]
            job.key = key
            try:
                self._submit(job)
            except BaseException:
                del self._flights[key]
                raise
        elif job.deadline < flight[0].deadline or job.priority < flight[0].priority:
            # The other one may come too late for it, or waits behind those that this one need not wait for.
            self._submit(job)
        else:
            flight.append(job)

    def landed(self, job: Job) -> Sequence[Job]:
        """The model has answered this job: who waits for the same answer."""
        flight = self._take(job)
        if len(flight) < 2:
            return _NOBODY
        self.joined += len(flight) - 1
        return flight[1:]

    def failed(self, job: Job, error: ParbakeError) -> None:
        """This job failed: tell those who waited with it, or have them computed where the error is its own."""
        others = self._take(job)[1:]
        for other in others:
            if isinstance(error, DeadlineExceeded):
                # The first one came too late or has gone; the others still have time.
                try:
                    self.board(job.key, other)
                    continue
                except ParbakeError as refused:
                    other.error = refused
            else:
                other.error = error
            try:
                other.done(other)
            except Exception:
                log().exception("flight.answer_not_taken")

    def _take(self, job: Job) -> list[Job]:
        flight = self._flights.get(job.key)
        if flight is None or flight[0] is not job:
            return []
        del self._flights[job.key]
        return flight
