"""Jobs in one SQLite file: in WAL mode, synced with every commit, shared by all fronts of a server.

Whoever writes takes the lock before reading, so that two never decide on the same state. A claim has a token that is
another one whenever the job changes hands, and an answer is only kept under the token in force: the first answer that
is kept is the answer. The times of leases, pauses and retention are those of `parbake.queue.clock`.

The file is made with the first job, in a folder that has nothing else: SQLite keeps a log beside it, and only
the folder takes both along when it is renamed. Numbers and tokens begin anew in a new file, so a claim goes by
the job's id too.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from parbake.errors import Conflict, Overloaded, ParbakeError, QueueAway, QueueTorn
from parbake.queue.clock import Clock, machine_clock
from parbake.queue.model import (
    Claim,
    Depth,
    Job,
    Letter,
    NewJob,
    Options,
    Reply,
    Request,
    Revival,
    Tally,
)

BUSY_S: Final = 5.0
"""How long one waits for another one's lock."""

_VERSION: Final = 1
_APPLICATION: Final = 0x5042_4B51
_WAL_BYTES: Final = 16 * 1024 * 1024
"""Size that the log is cut down to."""
_STEP: Final = 100
"""Jobs that are removed in one transaction."""
_VACUUM_PAGES: Final = 2000
"""Pages that are given back to the disk at a time."""
_RETRY_S: Final = 1.0
_MOST_LOOKED_AT: Final = 10_000
"""Requests that are gone through to make room for one."""
_ROW_BYTES: Final = 4096
"""That a request takes beside its body, at most."""
_LOOKED_THROUGH_BYTES: Final = 64 * 1024 * 1024
"""A larger file is not read as a whole when it is opened."""

_SCHEMA: Final = (
    """CREATE TABLE clock (
        one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL, ahead REAL NOT NULL
    ) STRICT""",
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        deployment TEXT NOT NULL,
        version TEXT NOT NULL,
        owner TEXT NOT NULL,
        key TEXT NOT NULL,
        digest BLOB NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled', 'dead')),
        attempts INTEGER NOT NULL DEFAULT 0,
        refusals INTEGER NOT NULL DEFAULT 0,
        lost INTEGER NOT NULL DEFAULT 0,
        token INTEGER NOT NULL DEFAULT 0,
        until REAL NOT NULL DEFAULT 0,
        taken REAL NOT NULL,
        created REAL NOT NULL,
        finished REAL,
        status INTEGER NOT NULL DEFAULT 0,
        error TEXT NOT NULL DEFAULT ''
    ) STRICT""",
    # Apart from the jobs: what is large must not be written anew with every change of state.
    """CREATE TABLE requests (
        number INTEGER PRIMARY KEY, form TEXT NOT NULL, query BLOB NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL
    ) STRICT""",
    """CREATE TABLE replies (
        number INTEGER PRIMARY KEY, status INTEGER NOT NULL, headers BLOB NOT NULL, body BLOB NOT NULL
    ) STRICT""",
    "CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, key) WHERE key != ''",
    "CREATE INDEX jobs_open ON jobs (number) WHERE state IN ('queued', 'running')",
    "CREATE INDEX jobs_open_by_deployment ON jobs (deployment, number) WHERE state IN ('queued', 'running')",
    "CREATE INDEX jobs_finished ON jobs (finished) WHERE finished IS NOT NULL",
)
_OPEN: Final = "state IN ('queued', 'running')"
_HELD: Final = "number = ? AND id = ? AND token = ? AND state = 'running'"
"""What `_holder` of a claim has to be for it to be in force."""
_TORN: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_PASSING: Final = {*_BUSY, sqlite3.SQLITE_FULL}
"""Errors after which a connection is as good as before."""

_Pairs = list[tuple[bytes, bytes]]


class SqliteJobs:
    """The store at a path. See `parbake.queue.ports.JobStore`. To be used by one thread at a time."""

    def __init__(self, path: Path, *, clock: Clock | None = None) -> None:
        self._path = path
        self._clock = clock or machine_clock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._ahead = 0.0
        """What the time of the jobs is ahead of the clock's ticks."""

    def exists(self) -> bool:
        """See `JobStore`."""
        return self._connection is not None or self._path.exists()

    def close(self) -> None:
        """See `JobStore`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # Callers ---------------------------------------------------------------------------------------

    def take(self, new: NewJob, options: Options) -> tuple[Job, bool]:
        """See `JobStore`."""
        request, digest = new.request, new.digest if new.digest is not None else new.request.digest()
        with self._writing(create=True) as (db, now):
            if new.key:
                row = db.execute(
                    "SELECT id, digest FROM jobs WHERE owner = ? AND key = ?", (new.owner, new.key)
                ).fetchone()
                if row is not None and row[1] != digest:
                    raise Conflict(
                        f"idempotency key {new.key[:60]!r} belongs to another request",
                        path="idempotency-key",
                        hint="use a new key for a new request",
                    )
                if row is not None:
                    return self._job(db, row[0], now), False
            self._check_room(db, new, options)
            number = db.execute(
                "INSERT INTO jobs (id, deployment, version, owner, key, digest, state, taken, created) "
                "VALUES (?, ?, ?, ?, ?, ?, 'queued', ?, ?)",
                (
                    new.id, request.deployment, request.version, new.owner, new.key, digest, now,
                    self._clock.wall(),
                ),
            ).lastrowid  # fmt: skip
            db.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?)",
                (number, request.form, request.query, msgspec.msgpack.encode(request.headers), request.body),
            )
            return self._job(db, new.id, now), True

    def same(self, owner: str, key: str, digest: bytes) -> Job | None:
        """See `JobStore`."""
        if not key or not self.exists():
            return None
        with self._reading() as (db, now):
            row = db.execute(
                "SELECT id FROM jobs WHERE owner = ? AND key = ? AND key != '' AND digest = ?",
                (owner, key, digest),
            ).fetchone()
            return None if row is None else self._job(db, row[0], now)

    def find(self, job_id: str) -> Job | None:
        """See `JobStore`."""
        if not self.exists():
            return None
        with self._reading() as (db, now):
            return self._look_up(db, job_id, now)

    def reply(self, job_id: str) -> Reply | None:
        """See `JobStore`."""
        if not self.exists():
            return None
        with self._reading() as (db, _):
            row = db.execute(
                "SELECT r.status, r.headers, r.body FROM jobs j JOIN replies r USING (number) WHERE j.id = ?",
                (job_id,),
            ).fetchone()
        if row is None:
            return None
        try:
            return Reply(row[0], _pairs(row[1]), row[2])
        except msgspec.MsgspecError as error:
            raise self._torn(f"the answer to job {job_id} cannot be read") from error

    def cancel(self, job_id: str) -> bool:
        """See `JobStore`."""
        if not self.exists():
            return False
        with self._writing() as (db, now):
            changed = db.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ?, token = token + 1, key = '' "
                "WHERE id = ? AND (state = 'queued' OR (state = 'running' AND until <= ?))",
                (now, job_id, now),
            ).rowcount
            if changed:
                db.execute(
                    "DELETE FROM requests WHERE number = (SELECT number FROM jobs WHERE id = ?)", (job_id,)
                )
            return bool(changed)

    def forget(self, job_id: str) -> bool:
        """See `JobStore`."""
        if not self.exists():
            return False
        with self._writing() as (db, _):
            row = db.execute(
                f"DELETE FROM jobs WHERE id = ? AND NOT {_OPEN} RETURNING number",  # noqa: S608
                (job_id,),
            ).fetchone()
            if row is not None:
                for table in ("replies", "requests"):
                    db.execute(f"DELETE FROM {table} WHERE number = ?", row)  # noqa: S608
        return row is not None

    def forget_dead(self, deployment: str, most: int) -> int:
        """See `JobStore`."""
        if not self.exists():
            return 0
        with self._writing() as (db, _):
            numbers = db.execute(
                "SELECT number FROM jobs WHERE finished IS NOT NULL AND state = 'dead' AND ? IN ('', deployment) "
                "ORDER BY finished LIMIT ?",
                (deployment, most),
            ).fetchall()
            for table in ("requests", "jobs"):
                db.executemany(f"DELETE FROM {table} WHERE number = ?", numbers)  # noqa: S608
        return len(numbers)

    # Whoever looks after them ----------------------------------------------------------------------

    def tally(self) -> list[Tally]:
        """See `JobStore`."""
        if not self.exists():
            return []
        with self._reading() as (db, now):
            rows = db.execute(
                "SELECT deployment, state, count(*), min(taken) FROM jobs GROUP BY deployment, state ORDER BY 1, 2"
            ).fetchall()
        return [Tally(name, state, count, max(now - taken, 0.0)) for name, state, count, taken in rows]

    def letters(self, most: int) -> list[Letter]:
        """See `JobStore`."""
        if not self.exists():
            return []
        with self._reading() as (db, now):
            rows = db.execute(
                "SELECT j.id, j.finished, r.number IS NOT NULL FROM jobs j LEFT JOIN requests r USING (number) "
                "WHERE j.finished IS NOT NULL AND j.state = 'dead' ORDER BY j.finished DESC, j.number DESC LIMIT ?",
                (most,),
            ).fetchall()
            return [
                Letter(self._job(db, job_id, now), max(now - finished, 0.0), bool(kept))
                for job_id, finished, kept in rows
            ]

    def dead(self, deployment: str, most: int) -> list[str]:
        """See `JobStore`."""
        if not self.exists():
            return []
        with self._reading() as (db, _):
            rows = db.execute(
                "SELECT id FROM jobs JOIN requests USING (number) "
                "WHERE finished IS NOT NULL AND state = 'dead' AND ? IN ('', deployment) ORDER BY number LIMIT ?",
                (deployment, most),
            ).fetchall()
        return [row[0] for row in rows]

    def revive(self, job_ids: Sequence[str], options: Options) -> dict[str, Revival]:
        """See `JobStore`."""
        if not self.exists():
            return dict.fromkeys(job_ids, "missing")
        with self._writing() as (db, now):
            return {job_id: self._revived(db, job_id, options, now) for job_id in job_ids}

    # Fronts ----------------------------------------------------------------------------------------

    def claim(self, room: Mapping[str, int], most: int, options: Options, *, idle: bool) -> list[Claim]:
        """See `JobStore`."""
        if not room or most <= 0 or not self.exists():
            return []
        with self._reading() as (db, now):
            # Not to write is much cheaper.
            if not self._chosen(db, room, most, options, now, idle=idle):
                return []
        with self._writing() as (db, now):
            chosen = self._chosen(db, room, most, options, now, idle=idle)
            claims = [self._claimed(db, number, now, options.lease_s) for number in chosen]
        return [claim for claim in claims if claim is not None]

    def renew(self, claims: Sequence[Claim], lease_s: float) -> frozenset[str]:
        """See `JobStore`."""
        with self._writing() as (db, now):
            return frozenset(
                claim.id
                for claim in claims
                if db.execute(
                    f"UPDATE jobs SET until = ? WHERE {_HELD}",  # noqa: S608
                    (now + lease_s, *_holder(claim)),
                ).rowcount
            )

    def finish(self, claim: Claim, reply: Reply, *, failed: bool) -> bool:
        """See `JobStore`."""
        with self._writing() as (db, now):
            if not self._end(db, claim, "failed" if failed else "done", now, status=reply.status):
                return False
            db.execute(
                "INSERT INTO replies VALUES (?, ?, ?, ?)",
                (claim.number, reply.status, msgspec.msgpack.encode(reply.headers), reply.body),
            )
            return True

    def put_off(self, claim: Claim, delay_s: float, *, counted: bool, error: str) -> bool:
        """See `JobStore`."""
        with self._writing() as (db, now):
            return bool(
                db.execute(
                    "UPDATE jobs SET state = 'queued', token = token + 1, until = ?, attempts = attempts - ?, "  # noqa: S608
                    f"refusals = refusals + ?, error = ? WHERE {_HELD}",
                    (now + delay_s, not counted, bool(error), error, *_holder(claim)),
                ).rowcount
            )

    def give_up(self, claim: Claim, error: str) -> bool:
        """See `JobStore`."""
        with self._writing() as (db, now):
            return self._end(db, claim, "dead", now, error=error)

    def tidy(self, options: Options) -> tuple[list[tuple[str, str]], bool]:
        """See `JobStore`."""
        if not self.exists():
            return [], False
        with self._reading() as (db, now):
            if not self._over(db, options, now) and not self._old(db, options, now):
                return [], False
        gone: list[tuple[str, str]] = []
        with self._writing() as (db, now):
            for number, job_id, deployment, state, attempts in self._over(db, options, now):
                if attempts < options.attempts:
                    why = f"not answered within {options.give_up_s:g} s"
                elif state == "running":
                    why = f"whoever had it was not heard of again, {attempts} times"
                else:
                    # It was to be begun more often when it was put off.
                    why = f"attempt {attempts} of {options.attempts} failed"
                self._kill(db, number, now, why)
                gone.append((job_id, deployment))
            old = self._old(db, options, now)
            for table in ("replies", "requests", "jobs"):
                db.executemany(f"DELETE FROM {table} WHERE number = ?", [(number,) for number in old])  # noqa: S608
        if old:
            with self._told(writing=True) as db:
                db.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
        return gone, _STEP in (len(gone), len(old))

    def finished(self, job_ids: Collection[str]) -> list[str]:
        """See `JobStore`."""
        if not self.exists():
            return list(job_ids)
        with self._reading() as (db, _):
            query = f"SELECT 1 FROM jobs WHERE id = ? AND {_OPEN}"  # noqa: S608
            return [job_id for job_id in job_ids if db.execute(query, (job_id,)).fetchone() is None]

    def depths(self) -> tuple[list[Depth], int]:
        """See `JobStore`."""
        if not self.exists():
            return [], 0
        with self._reading() as (db, now):
            rows = db.execute(
                "SELECT deployment, sum(state = 'queued'), sum(state = 'running'), min(taken) FROM jobs "  # noqa: S608
                f"WHERE {_OPEN} GROUP BY deployment"
            ).fetchall()
            return [Depth(row[0], row[1], row[2], max(now - row[3], 0.0)) for row in rows], self._bytes(db)

    def due_in_s(self) -> float | None:
        """See `JobStore`."""
        if not self.exists():
            return None
        with self._reading() as (db, now):
            (until,) = db.execute(f"SELECT min(until) FROM jobs WHERE {_OPEN}").fetchone()  # noqa: S608
        return None if until is None else max(until - now, 0.0)

    # Parts -----------------------------------------------------------------------------------------

    def _check_room(self, db: sqlite3.Connection, new: NewJob, options: Options) -> None:
        """Raise `Overloaded` where a job is one too many."""
        name = new.request.deployment
        waiting = self._waiting(db, name)
        if waiting >= options.waiting:
            raise Overloaded(
                f"{waiting} jobs of {name!r} are not answered yet, and that is the limit",
                hint="send it again later, or raise jobs_waiting",
                retry_after_s=_RETRY_S,
            )
        taken = self._bytes(db)
        beyond = taken + len(new.request.body) - options.bytes
        if beyond > 0 and not self._make_room(db, beyond):
            raise Overloaded(
                f"jobs and results take {taken} bytes, and {options.bytes} is the limit",
                hint="send it again later, or raise jobs_bytes; results are removed after job_keep_s",
                retry_after_s=_RETRY_S,
            )

    def _make_room(self, db: sqlite3.Connection, wanted: int) -> bool:
        """Drop requests of dead jobs, those taken first, until so many bytes are free; gives whether they are."""
        # Requests are there of jobs that are open or dead only. The lengths are read without the bodies.
        found = db.execute(
            "SELECT r.number, r.bytes FROM (SELECT number, length(query) + length(headers) + length(body) AS bytes "
            "FROM requests ORDER BY number LIMIT ?) r CROSS JOIN jobs j USING (number) WHERE j.state = 'dead'",
            (_MOST_LOOKED_AT,),
        ).fetchall()
        if sum(size + _ROW_BYTES for _, size in found) < wanted:
            return False
        end = self._bytes(db) - wanted
        freed = 0
        for number, size in found:
            db.execute("DELETE FROM requests WHERE number = ?", (number,))
            freed += size + _ROW_BYTES
            if freed >= wanted and self._bytes(db) <= end:
                return True
        return False

    def _waiting(self, db: sqlite3.Connection, deployment: str) -> int:
        """The unanswered jobs of a deployment."""
        (count,) = db.execute(
            f"SELECT count(*) FROM jobs WHERE deployment = ? AND {_OPEN}",  # noqa: S608
            (deployment,),
        ).fetchone()
        return int(count)

    def _chosen(
        self,
        db: sqlite3.Connection,
        room: Mapping[str, int],
        most: int,
        options: Options,
        now: float,
        *,
        idle: bool,
    ) -> list[int]:
        # By deployment: one without room may have any number of jobs, and they must not be gone through each time.
        due = (
            "SELECT number, lost + (state = 'running') AS missed FROM jobs "  # noqa: S608
            f"WHERE deployment = ? AND {_OPEN} AND until <= ? AND attempts < ?"
        )
        chosen: list[int] = []
        oldest: list[tuple[int, int]] = []
        for name, places in room.items():
            values = (name, now, options.attempts)
            oldest += db.execute(f"{due} ORDER BY number LIMIT 1", values)
            rows = db.execute(f"{due} AND missed = 0 ORDER BY number LIMIT ?", (*values, min(places, most)))
            chosen += [number for number, _ in rows]
        number, missed = min(oldest, default=(0, 0))
        if missed:
            # The next one, and only where nobody else is hurt if it ends this process too.
            return [number] if idle else []
        return sorted(chosen)[:most]

    def _claimed(self, db: sqlite3.Connection, number: int, now: float, lease_s: float) -> Claim | None:
        """A job, taken; None where what was asked cannot be read any more, and it is dead."""
        db.execute(
            "UPDATE jobs SET lost = lost + (state = 'running'), state = 'running', token = token + 1, "
            "attempts = attempts + 1, until = ? WHERE number = ?",
            (now + lease_s, number),
        )
        row = db.execute(
            "SELECT j.token, j.id, j.owner, j.attempts, j.refusals, j.lost, j.deployment, j.version, r.form, r.query, "
            "r.headers, r.body FROM jobs j JOIN requests r USING (number) WHERE number = ?",
            (number,),
        ).fetchone()
        if row is None:
            self._kill(db, number, now, "its request is not in the queue any more")
            return None
        token, job_id, owner, attempts, refusals, lost, deployment, version, form, query, headers, body = row
        try:
            request = Request(deployment, version, form, query, _pairs(headers), body)
        except msgspec.MsgspecError:
            self._kill(db, number, now, "its request cannot be read")
            db.execute("DELETE FROM requests WHERE number = ?", (number,))
            return None
        return Claim(number, token, job_id, owner, attempts, refusals, lost, request)

    def _end(
        self,
        db: sqlite3.Connection,
        claim: Claim,
        state: str,
        now: float,
        *,
        status: int = 0,
        error: str = "",
    ) -> bool:
        # Whoever sends a request again that was given up gets a new job.
        changed = db.execute(
            "UPDATE jobs SET state = ?, finished = ?, status = ?, error = ?, "  # noqa: S608
            f"key = iif(?, '', key) WHERE {_HELD}",
            (state, now, status, error, state == "dead", *_holder(claim)),
        ).rowcount
        # One that is dead may be begun again.
        if changed and state != "dead":
            db.execute("DELETE FROM requests WHERE number = ?", (claim.number,))
        return bool(changed)

    def _kill(self, db: sqlite3.Connection, number: int, now: float, why: str) -> None:
        """Let a job be dead that nobody is at work on. Its request stays."""
        db.execute(
            "UPDATE jobs SET state = 'dead', finished = ?, token = token + 1, key = '', "
            "error = ? || CASE error WHEN '' THEN '' ELSE '; before that ' || error END WHERE number = ?",
            (now, why, number),
        )

    def _revived(self, db: sqlite3.Connection, job_id: str, options: Options, now: float) -> Revival:
        row = db.execute(
            "SELECT j.number, j.deployment, j.state, r.number IS NOT NULL FROM jobs j "
            "LEFT JOIN requests r USING (number) WHERE j.id = ?",
            (job_id,),
        ).fetchone()
        if row is None:
            return "missing"
        number, deployment, state, kept = row
        if state != "dead":
            return "not dead"
        if not kept:
            return "not kept"
        if self._waiting(db, deployment) >= options.waiting:
            return "no room"
        # What was lost goes alone this time too. Of an age at which it would be given up it is no longer, and why it
        # was given up is not what is wrong with it now.
        db.execute(
            "UPDATE jobs SET state = 'queued', finished = NULL, token = token + 1, attempts = 0, refusals = 0, "
            "until = 0, error = '', taken = ? WHERE number = ?",
            (now, number),
        )
        return "queued"

    def _over(
        self, db: sqlite3.Connection, options: Options, now: float
    ) -> list[tuple[int, str, str, str, int]]:
        """Jobs that nobody is at work on and that are to be given up: number, id, deployment, state, attempts."""
        return db.execute(
            f"SELECT number, id, deployment, state, attempts FROM jobs WHERE {_OPEN} "  # noqa: S608
            "AND (state = 'queued' OR until <= ?) AND (taken <= ? OR attempts >= ?) LIMIT ?",
            (now, now - options.give_up_s, options.attempts, _STEP),
        ).fetchall()

    def _old(self, db: sqlite3.Connection, options: Options, now: float) -> list[int]:
        rows = db.execute(
            "SELECT number FROM jobs WHERE finished <= ? LIMIT ?", (now - options.keep_s, _STEP)
        ).fetchall()
        return [row[0] for row in rows]

    def _job(self, db: sqlite3.Connection, job_id: str, now: float) -> Job:
        job = self._look_up(db, job_id, now)
        if job is None:
            raise QueueTorn(f"the queue at {self._path} is damaged: job {job_id} is not where it was put")
        return job

    def _look_up(self, db: sqlite3.Connection, job_id: str, now: float) -> Job | None:
        row = db.execute(
            "SELECT number, deployment, version, owner, state, attempts, created, taken, status, error FROM jobs "
            "WHERE id = ?",
            (job_id,),
        ).fetchone()
        if row is None:
            return None
        number, deployment, version, owner, state, attempts, created, taken, status, error = row
        ahead = 0
        if state in ("queued", "running"):
            (ahead,) = db.execute(
                f"SELECT count(*) FROM jobs WHERE deployment = ? AND number < ? AND {_OPEN}",  # noqa: S608
                (deployment, number),
            ).fetchone()
        age_s = max(now - taken, 0.0)
        return Job(
            job_id, deployment, version, owner, state, attempts, created, age_s, ahead, status, error
        )  # fmt: skip

    def _bytes(self, db: sqlite3.Connection) -> int:
        (pages,), (free,), (size,) = (
            db.execute(f"PRAGMA {what}").fetchone() for what in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    # Connection ------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self) -> Iterator[tuple[sqlite3.Connection, float]]:
        with self._told(writing=False) as db, _transaction(db, "BEGIN"):
            yield db, self._now()

    @contextmanager
    def _writing(self, *, create: bool = False) -> Iterator[tuple[sqlite3.Connection, float]]:
        with self._told(writing=True, create=create) as db, _transaction(db, "BEGIN IMMEDIATE"):
            yield db, self._now()

    def _now(self) -> float:
        return self._clock.ticks() + self._ahead

    @contextmanager
    def _told(self, *, writing: bool, create: bool = False) -> Iterator[sqlite3.Connection]:
        """The connection; errors of the database as errors of parbake."""
        try:
            yield self._connected(create=create)
        except ParbakeError:
            raise
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _PASSING:
                # Whatever state it is in: the next one begins anew.
                with suppress(sqlite3.Error):
                    self.close()
            raise self._meant(error, writing=writing) from error

    def _connected(self, *, create: bool) -> sqlite3.Connection:
        if self._connection is not None and self._identity() != self._file:
            # SQLite would go on writing to a file that has been removed, and all of it would be lost.
            self.close()
        if self._connection is None:
            if create:
                self._make_file()
            self._connection = self._open()
        return self._connection

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _make_file(self) -> None:
        """An empty file for its owner only, so that SQLite's own files get its mode."""
        if self._path.exists():
            return
        for ending in ("-wal", "-shm"):
            if self._path.with_name(self._path.name + ending).exists():
                # SQLite would remove it, and with it jobs that were acknowledged.
                raise self._torn(f"{self._path.name} is gone, and {self._path.name}{ending} is left of it")
        self._path.parent.mkdir(0o700, parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        # The file must be there after a power cut, too.
        for folder in (*self._path.parents,)[:3]:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _open(self) -> sqlite3.Connection:
        # Only `_make_file` makes one.
        db = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._file = self._identity()
            # In this order: another one may be making the tables at this moment.
            (things,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (application,) = db.execute("PRAGMA application_id").fetchone()
            if application != _APPLICATION and (application or version or things):
                raise QueueTorn(f"{self._path} is no queue of jobs", hint=_ASIDE)
            if version > _VERSION:
                raise QueueAway(
                    f"the queue at {self._path} was written by a newer parbake",
                    hint=f"use that one, or {_RENAME}",
                )
            db.execute("PRAGMA synchronous = FULL")
            if not version:
                # Two that would change to WAL together do not wait for each other: one of them fails.
                with self._alone():
                    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    db.execute("PRAGMA journal_mode = WAL")
                    with _transaction(db, "BEGIN IMMEDIATE"):
                        self._make_tables(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
            if version and self._path.stat().st_size <= _LOOKED_THROUGH_BYTES:
                (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise self._torn(str(found).splitlines()[-1])
            self._ahead = self._synchronised(db)
            if self._identity() != self._file:
                raise QueueAway(f"the queue at {self._path} was put aside at this moment")
        except BaseException:
            db.close()
            raise
        return db

    def _make_tables(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version:
            # Another one was faster.
            return
        for statement in _SCHEMA:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {_VERSION}")

    def _synchronised(self, db: sqlite3.Connection) -> float:
        """What the jobs' time is ahead of the ticks; after a restart of the machine it goes on where it was."""
        row = db.execute("SELECT boot, ahead FROM clock").fetchone()
        if row is not None and row[0] == self._clock.boot:
            return float(row[1])
        with _transaction(db, "BEGIN IMMEDIATE"):
            row = db.execute("SELECT boot, ahead FROM clock").fetchone()
            if row is not None and row[0] == self._clock.boot:
                return float(row[1])
            (seen,) = db.execute("SELECT max(max(taken), coalesce(max(finished), 0)) FROM jobs").fetchone()
            ahead = max(self._clock.wall(), seen or 0.0) - self._clock.ticks()
            db.execute("INSERT OR REPLACE INTO clock VALUES (1, ?, ?)", (self._clock.boot, ahead))
            # Whoever had a job is gone with the machine.
            db.execute(f"UPDATE jobs SET until = 0 WHERE {_OPEN}")  # noqa: S608
            return ahead

    def _meant(self, error: Exception, *, writing: bool) -> ParbakeError:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError):
            return QueueAway(
                f"the queue at {self._path} cannot be made: {error.strerror or words}", hint=_WRITABLE
            )
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _TORN:
            return self._torn(words)
        if code in _BUSY:
            return QueueAway(
                f"the queue at {self._path} is busy: another process holds it for over {BUSY_S:g} s"
            )
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return QueueAway(f"the queue at {self._path} cannot be opened: {words}", hint=_WRITABLE)
        what = "written" if writing else "read"
        return QueueAway(
            f"the queue at {self._path} cannot be {what}: {words}",
            hint="look for free space on the disk; what was acknowledged before is kept",
        )

    def _torn(self, words: str) -> QueueTorn:
        return QueueTorn(f"the queue at {self._path} is damaged: {words}", hint=_ASIDE, retry_after_s=60.0)


_WRITABLE: Final = "state_dir is a folder that the server may write to"
_RENAME: Final = "rename its folder as a whole: a new one is begun with the next job"
_ASIDE: Final = f"{_RENAME}. What waits for an answer is answered meanwhile"


@contextmanager
def _transaction(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _holder(claim: Claim) -> tuple[int, str, int]:
    return claim.number, claim.id, claim.token


def _pairs(packed: bytes) -> tuple[tuple[bytes, bytes], ...]:
    pairs: Any = msgspec.msgpack.decode(packed, type=_Pairs)
    return tuple(pairs)
