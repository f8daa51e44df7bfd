"""What the queue needs from outside: a place where jobs survive, whatever is killed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from parbake.queue.model import Claim, Depth, Job, Letter, NewJob, Options, Reply, Revival, Tally


class JobStore(Protocol):
    """Jobs that survive. Several processes may have the same store; each method is one transaction.

    What a method has returned from is on disk. All raise `QueueAway` or `QueueTorn`, and then nothing has changed
    that anybody was told of.
    """

    def exists(self) -> bool:
        """Whether any job was ever taken here. Costs next to nothing."""

    def take(self, new: NewJob, options: Options) -> tuple[Job, bool]:
        """Keep a job; gives it, and whether it is new or was there under its idempotency key.

        Where the bytes do not suffice, the requests of dead jobs go that were taken first: they stay dead.

        Raises `Conflict` where another request has that key, `Overloaded` where there is no room.
        """

    def same(self, owner: str, key: str, digest: bytes) -> Job | None:
        """The job that the request of this digest was taken as, under this idempotency key."""

    def find(self, job_id: str) -> Job | None:
        """A job."""

    def reply(self, job_id: str) -> Reply | None:
        """The answer to a job; None while, or where, there is none."""

    def cancel(self, job_id: str) -> bool:
        """Take a job back, if nobody is at work on it; gives whether it was. Its idempotency key is free then."""

    def forget(self, job_id: str) -> bool:
        """Remove a job that will not change any more, and its answer; gives whether it was. There is room then."""

    def forget_dead(self, deployment: str, most: int) -> int:
        """Remove jobs that were given up, of all deployments for ""; gives how many were."""

    def tally(self) -> list[Tally]:
        """All jobs that there are, counted, by deployment and state."""

    def letters(self, most: int) -> list[Letter]:
        """The jobs that were given up, the last one first."""

    def dead(self, deployment: str, most: int) -> list[str]:
        """The ids of jobs that were given up and whose request is there, oldest first; of all deployments for ""."""

    def revive(self, job_ids: Sequence[str], options: Options) -> dict[str, Revival]:
        """Have dead jobs begun again as if they had just been taken, where there is room; gives what came of it."""

    def claim(self, room: Mapping[str, int], most: int, options: Options, *, idle: bool) -> list[Claim]:
        """Take the oldest jobs that are due, at most ``most``, and of each deployment as many as there is room for.

        A job that was lost before is taken alone, by somebody ``idle`` only: it may be what ended the process. One
        that cannot be read is given up, and does not keep the others.
        """

    def renew(self, claims: Sequence[Claim], lease_s: float) -> frozenset[str]:
        """Have the claims hold on; gives the ids of the jobs whose claims did."""

    def finish(self, claim: Claim, reply: Reply, *, failed: bool) -> bool:
        """Keep the answer to a job; False, and nothing is kept, where the claim is no longer in force."""

    def put_off(self, claim: Claim, delay_s: float, *, counted: bool, error: str) -> bool:
        """Have a job begun again, not before ``delay_s``; ``counted`` is whether this was an attempt."""

    def give_up(self, claim: Claim, error: str) -> bool:
        """Let a job be dead. Its idempotency key is free then."""

    def tidy(self, options: Options) -> tuple[list[tuple[str, str]], bool]:
        """Remove results that have been kept long enough, and give up what is due, some of it at a time.

        Gives the jobs that were given up, as id and deployment, and whether there is more to do.
        """

    def finished(self, job_ids: Collection[str]) -> list[str]:
        """Those of the jobs that will not change any more, or are not there."""

    def depths(self) -> tuple[list[Depth], int]:
        """The unanswered jobs by deployment, and the bytes that the store takes."""

    def due_in_s(self) -> float | None:
        """Seconds until the next job may be claimed; None where none is unanswered."""

    def close(self) -> None:
        """Let go of it."""
