"""The jobs that wait in front of a model, in the order in which they go.

First those that go again after a failed batch, then by priority, and within a priority so that all clients who wait
get as many rows: start-time fair queueing (P. Goyal, H. M. Vin and H. Cheng, "Start-time Fair Queuing", SIGCOMM 1996).
Who asks for much waits for his own, not others for him.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush, heapreplace
from itertools import chain, count
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from parbake.runtime.batcher import Job

HIGH: Final = 1
NORMAL: Final = 2
LOW: Final = 3

_MOST_DEBTS: Final = 1024


class Waiting:
    """Jobs that wait. ``rows`` is how many rows they have; ``plain`` are those of nobody in particular.

    Without clients and priorities all jobs are plain, and that is kept as cheap as a deque.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.plain: deque[Job] = deque()
        self.others = 0
        """Jobs that are not among the plain ones."""
        self._again: deque[Job] = deque()
        self._levels = {level: _Level() for level in (HIGH, NORMAL, LOW)}

    def __len__(self) -> int:
        return len(self.plain) + self.others

    def __iter__(self) -> Iterator[Job]:
        return chain(self._again, *self._queues())

    def add(self, job: Job) -> None:
        """Put a job behind those of its kind."""
        self.rows += job.rows
        if job.plain:
            self.plain.append(job)
            return
        self.others += 1
        self._levels[job.priority].add(job)

    def add_first(self, job: Job) -> None:
        """Put a job before all others."""
        self.rows += job.rows
        self.others += 1
        self._again.appendleft(job)

    def peek(self) -> Job:
        """Whose turn it is. Raises IndexError where nobody waits."""
        if self._again:
            return self._again[0]
        if not self.others:
            return self.plain[0]
        queue = self._next().queue()
        return queue[0]

    def pop(self) -> Job:
        """Take the one whose turn it is."""
        if self._again:
            job = self._again.popleft()
            self.others -= 1
        elif not self.others:
            job = self.plain.popleft()
        else:
            level = self._next()
            queue = level.queue()
            job = queue.popleft()
            level.spent(job.rows)
            if queue is not self.plain:
                self.others -= 1
        self.rows -= job.rows
        return job

    def take_all(self) -> list[Job]:
        """Take everybody, in no particular order."""
        jobs = list(self)
        self.keep_if(lambda job: False)
        return jobs

    def keep_if(self, keep: Callable[[Job], bool]) -> list[Job]:
        """Take out whoever is not to be kept."""
        gone: list[Job] = []
        for queue in (self._again, *self._queues()):
            if all(map(keep, queue)):
                continue
            kept: list[Job] = []
            for job in queue:
                (kept if keep(job) else gone).append(job)
            queue.clear()
            queue.extend(kept)
        self.rows -= sum(job.rows for job in gone)
        self.others = len(self._again) + sum(len(q) for q in self._queues() if q is not self.plain)
        return gone

    def ahead(self, job: Job) -> int:
        """Rows that would go before a job if it were added now."""
        if job.plain and not self.others:
            return self.rows
        rows = _rows(self._again)
        for number, level in self._levels.items():
            queues = level.clients
            if number == NORMAL:
                queues = {**queues, "": self.plain}
            if number < job.priority:
                rows += sum(map(_rows, queues.values()))
            elif number == job.priority:
                own = _rows(queues.get(job.client, ()))
                rows += own
                # Until its turn comes each of the others has had as many, or all that it has.
                rows += sum(min(_rows(q), own + job.rows) for name, q in queues.items() if name != job.client)
        return rows

    def make_room(self, job: Job) -> Job | None:
        """Take out the last of whoever has most waiting, among those that come after ``job``, if he has more than it.

        None where nobody has: then ``job`` itself is the one too many.
        """
        for number in (LOW, NORMAL):
            if number < job.priority:
                break
            queues = dict(self._levels[number].clients)
            if number == NORMAL:
                queues[""] = self.plain
            name = max(queues, key=lambda name: _rows(queues[name]), default="")
            queue = queues.get(name)
            if not queue:
                continue
            own = _rows(queues.get(job.client, ())) if number == job.priority else 0
            if number == job.priority and (
                name == job.client or _rows(queue) - queue[-1].rows < own + job.rows
            ):
                continue
            last = queue.pop()
            self.rows -= last.rows
            if queue is not self.plain:
                self.others -= 1
            return last
        return None

    def _next(self) -> _Level:
        """The level whose turn it is, with a client in front."""
        for number, level in self._levels.items():
            if number == NORMAL and self.plain:
                level.clients[""] = self.plain
                level.join("")
            if level.settle():
                return level
        raise IndexError("nobody waits")

    def _queues(self) -> list[deque[Job]]:
        """All queues but that of those who go again, each once."""
        queues = [q for level in self._levels.values() for q in level.clients.values() if q is not self.plain]
        return [self.plain, *queues]


class _Level:
    """The jobs of one priority, by client."""

    def __init__(self) -> None:
        self.clients: dict[str, deque[Job]] = {}
        self._turns: list[tuple[int, int, str]] = []
        """A heap of the clients who wait: the rows at which the next of each begins, and when he got in line."""
        self._inside: set[str] = set()
        self._numbers = count()
        self._now = 0
        """Rows at which the last job began: where those begin who were away."""
        self._debts: dict[str, int] = {}
        """Of clients with nothing waiting, where their last job ends: nobody gets ahead by going away."""

    def add(self, job: Job) -> None:
        """Put a job behind those of its client."""
        queue = self.clients.get(job.client)
        if queue is None:
            queue = self.clients[job.client] = deque()
        queue.append(job)
        self.join(job.client)

    def join(self, client: str) -> None:
        """Put a client in line, unless he is."""
        if client not in self._inside:
            self._inside.add(client)
            begins = max(self._debts.pop(client, 0), self._now)
            heappush(self._turns, (begins, next(self._numbers), client))

    def settle(self) -> bool:
        """Bring a client to the front who has a job; whether there is one."""
        while self._turns:
            begins, _, name = self._turns[0]
            if self.clients.get(name):
                return True
            heappop(self._turns)
            self._inside.remove(name)
            self.clients.pop(name, None)
            if begins > self._now:
                self._debts[name] = begins
                if len(self._debts) > _MOST_DEBTS:
                    self._debts = {name: rows for name, rows in self._debts.items() if rows > self._now}
        return False

    def queue(self) -> deque[Job]:
        """The jobs of the client in front."""
        return self.clients[self._turns[0][2]]

    def spent(self, rows: int) -> None:
        """The client in front has sent so many rows."""
        self._now, _, name = self._turns[0]
        heapreplace(self._turns, (self._now + rows, next(self._numbers), name))


def _rows(jobs: Iterable[Job]) -> int:
    return sum([job.rows for job in jobs])
