"""The state of releases in a database: SQLite in a file, or PostgreSQL by its URL.

SQLite: one file in WAL mode, synced with every commit; a writer takes its lock before it reads. PostgreSQL: a verb
locks the lease that it writes by, then the deployment's row, so that two of the same deployment run one after the
other. In both, triggers refuse to change or remove what the history holds.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine

from parbake.errors import (
    Conflict,
    InvalidInput,
    LeaseLost,
    NotFound,
    ParbakeError,
    SettingsError,
    VersionNotFound,
)
from parbake.names import NAME_PATTERN
from parbake.release.connect import (
    MIGRATION_LOCK,
    WRITE,
    address_of,
    make_file,
    meant,
    postgres_engine,
    revision_of,
    sqlite_engine,
    torn,
    upgrade,
)
from parbake.release.model import (
    ENDINGS,
    OPEN,
    Deployment,
    Details,
    Elsewhere,
    Ending,
    Event,
    Facts,
    ImageRecord,
    Lease,
    Parameters,
    Proposal,
    Release,
    ReleaseState,
    Rewards,
    VerdictRecord,
    WaiverRecord,
)
from parbake.release.schema import (
    DEPLOYMENTS,
    HISTORY,
    IMAGES,
    LEASES,
    PARAMETERS,
    RELEASES,
    REWARDS,
    VERDICTS,
    VERSION,
    WAIVERS,
)

MAX_WORDS: Final = 10_000
MAX_JSON_BYTES: Final = 4 * 1024 * 1024
MAX_NUMBER: Final = 2**62


def open_database(url: str, *, create: bool = True, clock: Callable[[], float] = time.time) -> Database:
    """The store at ``sqlite:///PATH`` or ``postgresql://...``, brought to this version's schema.

    ``create`` false leaves a SQLite file that is not there alone: `NotFound`. ``clock`` is that of SQLite, which has
    none but this machine's. Raises `SettingsError`, `StateAway`, `StateTorn`, `StateTooNew`, `MissingExtra`.
    """
    address = address_of(url)
    lite = address.get_backend_name() == "sqlite"
    if lite:
        path = Path(address.database or "")
        if not create and _is_absent(path):
            raise NotFound(
                f"no state at {path}",
                hint="the first release makes it; --store or --state-dir says where it is",
            )
        make_file(path)
    database = Database(sqlite_engine(address) if lite else postgres_engine(address), clock if lite else None)
    try:
        database.migrate()
    except BaseException:
        database.close()
        raise
    return database


def _is_absent(path: Path) -> bool:
    """Whether there is no such file; whatever else stands in the way, `make_file` says better."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


class Database:
    """`parbake.release.state.State` in a database; `open_database` makes it."""

    def __init__(self, engine: Engine, clock: Callable[[], float] | None) -> None:
        self._engine = engine
        self._clock = clock
        self._where = engine.url.render_as_string(hide_password=True)

    def migrate(self) -> None:
        """Bring the schema to this version's; another process that does so at the same time is waited for.

        Raises `StateTooNew` where a newer parbake was here, `StateTorn` where the file is damaged.
        """
        with self._reading() as connection:
            if self._clock is not None:
                self._look_over(connection)
            if revision_of(connection) == VERSION:
                return
        with self._writing() as connection:
            if self._clock is None:
                encoding = connection.execute(sa.text("SHOW server_encoding")).scalar_one()
                if encoding != "UTF8":
                    raise SettingsError(
                        f"the database at {self._where} keeps text as {encoding}",
                        hint="CREATE DATABASE parbake ENCODING 'UTF8' TEMPLATE template0",
                    )
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            if revision_of(connection) == VERSION:
                return
            upgrade(connection, self._where)

    def begin_release(
        self, proposal: Proposal, *, by: str, why: str = "", fence: Lease | None = None
    ) -> Release:
        """See `State.begin_release`."""
        _check_proposal(proposal)
        _check_words(by=by, why=why)
        with self._writing(fence) as connection:
            now = self._now(connection)
            self._lock(connection, proposal.deployment, by, now)
            if (other := _under_way(connection, proposal.deployment)) is not None:
                raise _already(other)
            proposal = msgspec.structs.replace(proposal, image=_image_of(connection, proposal))
            number = _insert(
                connection,
                RELEASES,
                deployment=proposal.deployment,
                version=proposal.version,
                proposal=_json(proposal),
                state="pending",
                step=-1,
                revision=1,
                judge_state=b"",
                went_live=0,
                created=now,
                changed=now,
                by=by,
                why=why,
            )
            release = _release(connection, number)
            _note(connection, now, by, "release.begun", release, why, msgspec.to_builtins(proposal))
        return release

    def advance(
        self,
        release: Release,
        step: int,
        *,
        by: str,
        why: str = "",
        judge_state: bytes | None = None,
        fence: Lease | None = None,
    ) -> Release:
        """See `State.advance`."""
        _check_words(by=by, why=why)
        steps = release.proposal.steps
        if not 0 <= step < len(steps):
            raise InvalidInput(f"release {release.id} has steps 0 to {len(steps) - 1}, not {step}")
        with self._writing(fence) as connection:
            now = self._now(connection)
            stored = self._same(connection, release)
            if stored.state not in OPEN:
                raise _over(stored)
            after = _change(connection, stored, now, state="running", step=step, judge_state=judge_state)
            details = {"step": step, "share": steps[step], "before": stored.step}
            _note(connection, now, by, "release.advanced", after, why, details)
        return after

    def finish(
        self, release: Release, state: Ending, *, by: str, why: str = "", fence: Lease | None = None
    ) -> Release:
        """See `State.finish`."""
        _check_words(by=by, why=why)
        with self._writing(fence) as connection:
            now = self._now(connection)
            stored = self._same(connection, release)
            if stored.state not in OPEN:
                raise _over(stored)
            if state not in ENDINGS[stored.state]:
                raise Conflict(
                    f"release {stored.id} is {stored.state} and cannot end as {state}",
                    hint=f"it can end as {', '.join(ENDINGS[stored.state])}",
                )
            if state == "live":
                before = _live(connection, stored.proposal.deployment)
                if before is not None:
                    self._end(
                        connection, before, "superseded", now, by, f"by version {stored.proposal.version}"
                    )
            return self._end(connection, stored, state, now, by, why)

    def roll_back(
        self, deployment: str, *, to: str = "", by: str, why: str = "", fence: Lease | None = None
    ) -> Release:
        """See `State.roll_back`."""
        _check_name(deployment, "deployment")
        _check_words(by=by, why=why, to=to)
        with self._writing(fence) as connection:
            now = self._now(connection)
            self._lock(connection, deployment)
            under_way, live = _under_way(connection, deployment), _live(connection, deployment)
            target = _last_good(connection, deployment) if not to else _was_live(connection, deployment, to)
            if target is None:
                raise Conflict(
                    f"{deployment} has no version to go back to",
                    hint=f"parbake history {deployment} shows what was live",
                )
            if under_way is None and live is not None and live.id == target.id:
                raise Conflict(f"version {target.proposal.version} of {deployment} is live already")
            if under_way is not None:
                ending: Ending = "rolled_back" if under_way.state == "running" else "aborted"
                self._end(connection, under_way, ending, now, by, why)
            if live is not None and live.id == target.id:
                return live
            if live is not None:
                self._end(connection, live, "rolled_back", now, by, why)
            return self._end(connection, target, "live", now, by, why or "rolled back to")

    def remember(self, release: Release, judge_state: bytes, *, fence: Lease | None = None) -> Release:
        """See `State.remember`."""
        with self._writing(fence) as connection:
            stored = self._same(connection, release)
            if stored.state not in OPEN:
                raise _over(stored)
            return _change(connection, stored, self._now(connection), judge_state=judge_state)

    def share_rewards(self, release: Release, holder: str, rewards: Rewards) -> Rewards:
        """See `State.share_rewards`."""
        _check_words(holder=holder)
        with self._writing() as connection:
            # Behind an end that is just being written, whose rewards are gone.
            self._lock(connection, release.proposal.deployment)
            if _release(connection, release.id).state not in OPEN:
                return {}
            mine = (REWARDS.c.release == release.id) & (REWARDS.c.holder == holder)
            connection.execute(sa.delete(REWARDS).where(mine))
            if rewards:
                connection.execute(
                    sa.insert(REWARDS),
                    [
                        {"release": release.id, "holder": holder, "version": v, "earned": e, "missed": m}
                        for v, (e, m) in rewards.items()
                    ],
                )
            found = connection.execute(
                sa.select(REWARDS.c.version, sa.func.sum(REWARDS.c.earned), sa.func.sum(REWARDS.c.missed))
                .where(REWARDS.c.release == release.id, REWARDS.c.holder != holder)
                .group_by(REWARDS.c.version)
            )
            return {version: (float(earned), float(missed)) for version, earned, missed in found}

    def record_verdict(
        self, release: Release, verdict: VerdictRecord, *, by: str, fence: Lease | None = None
    ) -> VerdictRecord:
        """See `State.record_verdict`."""
        _check_words(by=by, reason=verdict.reason)
        evidence = _json(verdict.evidence)
        with self._writing(fence) as connection:
            now = self._now(connection)
            stored = self._same(connection, release)
            number = _insert(
                connection,
                VERDICTS,
                release=stored.id,
                at=now,
                action=verdict.action,
                reason=verdict.reason,
                evidence=evidence,
            )
            details = {"verdict": number, "step": stored.step}
            _note(connection, now, by, f"verdict.{verdict.action}", stored, verdict.reason, details)
        return msgspec.structs.replace(verdict, id=number, release=stored.id, at=now)

    def record_waiver(self, waiver: WaiverRecord) -> WaiverRecord:
        """See `State.record_waiver`."""
        _check_name(waiver.deployment, "deployment")
        _check_name(waiver.version, "version")
        _check_words(by=waiver.by, why=waiver.why, check=waiver.check)
        evidence = _json(waiver.evidence)
        with self._writing() as connection:
            now = self._now(connection)
            number = _insert(
                connection,
                WAIVERS,
                deployment=waiver.deployment,
                version=waiver.version,
                check=waiver.check,
                at=now,
                by=waiver.by,
                why=waiver.why,
                evidence=evidence,
            )
            details = {"waiver": number, "check": waiver.check}
            if digest := waiver.evidence.get("digest"):
                details["bundle_digest"] = digest
            _event(
                connection,
                now,
                waiver.by,
                "waiver",
                waiver.deployment,
                waiver.version,
                0,
                waiver.why,
                details,
            )
        return msgspec.structs.replace(waiver, id=number, at=now)

    def record_change(
        self, what: Elsewhere, deployment: str, *, version: str = "", by: str, why: str = "", details: Details
    ) -> None:
        """See `State.record_change`."""
        _check_name(deployment, "deployment")
        _check_words(version=version, by=by, why=why)
        with self._writing() as connection:
            _event(connection, self._now(connection), by, what, deployment, version, 0, why, details)

    def record_image(self, image: ImageRecord) -> None:
        """See `State.record_image`."""
        _check_words(tag=image.tag, image_id=image.image_id, bundle_digest=image.bundle_digest, by=image.by)
        _check_words(name=image.name, version=image.version)
        with self._writing() as connection:
            now = self._now(connection)
            kept = {
                "image_id": image.image_id,
                "bundle_digest": image.bundle_digest,
                "at": now,
                "by": image.by,
            }
            # In one statement each: two that build the same tag at once do not fail.
            if not _insert_unless_there(connection, IMAGES, tag=image.tag, **kept):
                connection.execute(sa.update(IMAGES).where(IMAGES.c.tag == image.tag).values(**kept))
            _event(
                connection, now, image.by, "image.built", image.name, image.version, 0, "", _details_of(image)
            )

    def forget_image(self, image: ImageRecord, *, by: str) -> None:
        """See `State.forget_image`."""
        _check_words(by=by)
        with self._writing() as connection:
            done = connection.execute(
                sa.delete(IMAGES).where(IMAGES.c.tag == image.tag, IMAGES.c.image_id == image.image_id)
            )
            if done.rowcount:
                now, details = self._now(connection), _details_of(image)
                _event(connection, now, by, "image.removed", image.name, image.version, 0, "", details)

    def images(self, bundle_digest: str = "") -> Sequence[ImageRecord]:
        """See `State.images`."""
        query = sa.select(IMAGES).order_by(IMAGES.c.at, IMAGES.c.tag)
        if bundle_digest:
            query = query.where(IMAGES.c.bundle_digest == bundle_digest)
        with self._reading() as connection:
            return [
                ImageRecord(row.tag, row.image_id, row.bundle_digest, by=row.by, at=row.at)
                for row in connection.execute(query)
            ]

    def configure(
        self, deployment: str, settings: Details, *, revision: int, by: str, why: str = ""
    ) -> Deployment:
        """See `State.configure`."""
        _check_name(deployment, "deployment")
        _check_words(by=by, why=why)
        text = _json(settings)
        with self._writing() as connection:
            now = self._now(connection)
            new = self._lock(connection, deployment, by, now)
            stored = 0 if new else _deployment(connection, deployment).revision
            if stored != revision:
                raise Conflict(
                    f"the settings of {deployment} are at revision {stored}, not {revision}: somebody else "
                    "changed them",
                    hint="read them again",
                )
            connection.execute(
                sa.update(DEPLOYMENTS)
                .where(DEPLOYMENTS.c.name == deployment)
                .values(settings=text, revision=revision + 1)
            )
            details = {"revision": revision + 1, "settings": settings}
            _event(connection, now, by, "settings", deployment, "", 0, why, details)
            return _deployment(connection, deployment)

    def set_parameters(
        self, deployment: str, values: Details, *, after: int, by: str, why: str = ""
    ) -> Parameters:
        """See `State.set_parameters`."""
        _check_name(deployment, "deployment")
        _check_words(by=by, why=why)
        text = _json(values)
        with self._writing() as connection:
            now = self._now(connection)
            self._lock(connection, deployment, by, now)
            newest = _newest_parameters(connection, deployment)
            if newest.version != after:
                raise Conflict(
                    f"the parameters of {deployment} are at version {newest.version}, not {after}: "
                    f"{newest.by or 'nobody'} changed them",
                    hint="read them again",
                )
            connection.execute(
                sa.insert(PARAMETERS).values(
                    deployment=deployment, version=after + 1, values=text, at=now, by=by, why=why
                )
            )
            details = {"version": after + 1, "values": values, "before": newest.values}
            _event(connection, now, by, "parameters", deployment, "", 0, why, details)
            return _newest_parameters(connection, deployment)

    def parameters(self, deployment: str, version: int | None = None) -> Parameters:
        """See `State.parameters`."""
        with self._reading() as connection:
            if version is None:
                return _newest_parameters(connection, deployment)
            row = connection.execute(
                sa.select(PARAMETERS).where(
                    PARAMETERS.c.deployment == deployment, PARAMETERS.c.version == version
                )
            ).one_or_none()
        if row is None:
            raise NotFound(f"the parameters of {deployment} have no version {version}")
        return _parameters_of(row)

    def lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        """See `State.lease`."""
        _check_words(name=name, holder=holder)
        if not 0 < seconds < 86_400:
            raise InvalidInput(f"a lease lasts between 0 seconds and a day, not {seconds:g} s")
        with self._writing() as connection:
            _insert_unless_there(connection, LEASES, name=name, holder="", token=0, since=0.0, until=0.0)
            row = connection.execute(sa.select(LEASES).where(LEASES.c.name == name).with_for_update()).one()
            # After the lock: whoever waited must not judge by the time before.
            now = self._now(connection)
            valid = row.since <= now < row.until
            if valid and row.holder != holder:
                return None
            token = row.token if valid else row.token + 1
            connection.execute(
                sa.update(LEASES)
                .where(LEASES.c.name == name)
                .values(holder=holder, token=token, since=now, until=now + seconds)
            )
            if not valid:
                details = {"lease": name, "token": token, "before": row.holder}
                _event(connection, now, holder, "lease.taken", "", "", 0, "", details)
        return Lease(name, holder, token, now + seconds)

    def give_up(self, lease: Lease) -> None:
        """See `State.give_up`."""
        with self._writing() as connection:
            done = connection.execute(
                sa.update(LEASES)
                .where(LEASES.c.name == lease.name, LEASES.c.token == lease.token)
                .where(LEASES.c.holder == lease.holder, LEASES.c.until > 0)
                .values(until=0.0)
            )
            if done.rowcount:
                details = {"lease": lease.name, "token": lease.token}
                now = self._now(connection)
                _event(connection, now, lease.holder, "lease.given_up", "", "", 0, "", details)

    def release(self, number: int) -> Release:
        """See `State.release`."""
        with self._reading() as connection:
            return _release(connection, number)

    def releases(self, deployment: str = "", *, under_way: bool = False) -> Sequence[Release]:
        """See `State.releases`."""
        query = sa.select(RELEASES).order_by(RELEASES.c.id)
        if deployment:
            query = query.where(RELEASES.c.deployment == deployment)
        if under_way:
            query = query.where(RELEASES.c.state.in_(OPEN))
        with self._reading() as connection:
            return [_release_of(row) for row in connection.execute(query)]

    def live(self, deployment: str) -> Release | None:
        """See `State.live`."""
        with self._reading() as connection:
            return _live(connection, deployment)

    def last_good(self, deployment: str) -> Release | None:
        """See `State.last_good`."""
        with self._reading() as connection:
            return _last_good(connection, deployment)

    def verdicts(self, release: Release) -> Sequence[VerdictRecord]:
        """See `State.verdicts`."""
        query = sa.select(VERDICTS).where(VERDICTS.c.release == release.id).order_by(VERDICTS.c.id)
        with self._reading() as connection:
            return [
                VerdictRecord(
                    row.action,
                    row.reason,
                    tuple(msgspec.json.decode(row.evidence)),
                    row.id,
                    row.release,
                    row.at,
                )
                for row in connection.execute(query)
            ]

    def waivers(self, deployment: str, version: str = "") -> Sequence[WaiverRecord]:
        """See `State.waivers`."""
        with self._reading() as connection:
            return _waivers(connection, deployment, version)

    def deployments(self) -> Sequence[Deployment]:
        """See `State.deployments`."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(DEPLOYMENTS).order_by(DEPLOYMENTS.c.name))
            # By code points, whatever the database's collation.
            return sorted(map(_deployment_of, rows), key=lambda deployment: deployment.name)

    def history(self, deployment: str = "", *, since: float = 0.0, limit: int = 1000) -> Sequence[Event]:
        """See `State.history`."""
        query = (
            sa.select(HISTORY, RELEASES.c.proposal)
            .join(RELEASES, RELEASES.c.id == HISTORY.c.release, isouter=True)
            .where(HISTORY.c.at >= since)
            .order_by(HISTORY.c.id.desc())
            .limit(max(limit, 0))
        )
        if deployment:
            query = query.where(HISTORY.c.deployment == deployment)
        with self._reading() as connection:
            newest = [_event_of(row) for row in connection.execute(query)]
        return newest[::-1]

    def facts(self, deployment: str, version: str) -> Facts | None:
        """See `State.facts`."""
        with self._reading() as connection:
            row = connection.execute(
                sa.select(RELEASES)
                .where(RELEASES.c.deployment == deployment, RELEASES.c.version == version)
                .order_by(RELEASES.c.id.desc())
                .limit(1)
            ).one_or_none()
            if row is None:
                return None
            release = _release_of(row)
            waivers = tuple(_waivers(connection, deployment, version))
            image = _image_of(connection, release.proposal)
        proposal = release.proposal
        return Facts(
            deployment, version, release.state, proposal.bundle_digest, proposal.source, image,
            proposal.table, release.by, release.created, release.why, waivers,
        )  # fmt: skip

    def close(self) -> None:
        """See `State.close`."""
        self._engine.dispose()

    def _end(
        self, connection: Connection, release: Release, state: Ending, now: float, by: str, why: str
    ) -> Release:
        """Give a release the state that it ends in, with its event."""
        details: Details = {"before": release.state}
        if state == "live":
            # What answers from here on, after a rollback too.
            details |= {
                "bundle_digest": release.proposal.bundle_digest,
                "image": _image_of(connection, release.proposal),
                "table": release.proposal.table,
            }
        connection.execute(sa.delete(REWARDS).where(REWARDS.c.release == release.id))
        number = _note(connection, now, by, f"release.{state}", release, why, details)
        return _change(connection, release, now, state=state, went_live=number if state == "live" else None)

    def _same(self, connection: Connection, release: Release) -> Release:
        """The stored release, locked, if nobody has changed it since. Raises `Conflict`."""
        self._lock(connection, release.proposal.deployment)
        stored = _release(connection, release.id)
        if stored.revision != release.revision:
            raise Conflict(
                f"release {release.id} of {release.proposal.deployment} was changed by somebody else: it is at "
                f"revision {stored.revision}, not {release.revision}, and {stored.state}",
                hint=f"parbake history {release.proposal.deployment} shows who did what",
            )
        return stored

    def _lock(self, connection: Connection, deployment: str, by: str = "", now: float | None = None) -> bool:
        """Hold a deployment's row until the end of the transaction; with a time, make it. Whether it was made."""
        new = now is not None and _insert_unless_there(
            connection, DEPLOYMENTS, name=deployment, settings="{}", revision=0, created=now, by=by
        )
        connection.execute(
            sa.select(DEPLOYMENTS.c.name).where(DEPLOYMENTS.c.name == deployment).with_for_update()
        ).all()
        return new

    def _now(self, connection: Connection) -> float:
        """The time by the clock of the store."""
        if self._clock is not None:
            return self._clock()
        now: float = connection.execute(
            sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")
        ).scalar_one()
        return now

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._told(writing=False), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _writing(self, fence: Lease | None = None) -> Iterator[Connection]:
        """A transaction that can write, while the lease is still its holder's. Raises `LeaseLost`."""
        with (
            self._told(writing=True),
            self._engine.connect().execution_options(**{WRITE: True}) as connection,
            connection.begin(),
        ):
            if fence is not None:
                self._hold(connection, fence)
            yield connection

    def _hold(self, connection: Connection, fence: Lease) -> None:
        row = connection.execute(
            sa.select(LEASES).where(LEASES.c.name == fence.name).with_for_update(read=True)
        ).one_or_none()
        now = self._now(connection)
        if (
            row is None
            or (row.token, row.holder) != (fence.token, fence.holder)
            or not row.since <= now < row.until
        ):
            other = f"{row.holder} has it" if row is not None and row.token != fence.token else "it is over"
            raise LeaseLost(
                f"{fence.holder} has lost the lease {fence.name}: {other}",
                hint="take the lease again and read the state anew",
            )

    @contextmanager
    def _told(self, *, writing: bool) -> Iterator[None]:
        """Errors of the database as errors of parbake."""
        try:
            yield
        except ParbakeError:
            raise
        except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error) as error:
            raise meant(error, self._where, writing=writing) from error

    def _look_over(self, connection: Connection) -> None:
        """Read a whole SQLite file once: a page that is torn shows now, not in the middle of a release."""
        found = connection.execute(sa.text("PRAGMA quick_check(1)")).scalar_one()
        if found != "ok":
            raise torn(self._where, str(found).splitlines()[-1])


def _release(connection: Connection, number: int) -> Release:
    row = None
    if 0 <= number < MAX_NUMBER:
        row = connection.execute(sa.select(RELEASES).where(RELEASES.c.id == number)).one_or_none()
    if row is None:
        raise NotFound(f"no release {number}")
    return _release_of(row)


def _release_of(row: Any) -> Release:
    return Release(
        id=row.id,
        revision=row.revision,
        proposal=msgspec.json.decode(row.proposal, type=Proposal),
        state=row.state,
        step=row.step,
        judge_state=bytes(row.judge_state),
        created=row.created,
        changed=row.changed,
        by=row.by,
        why=row.why,
    )


def _change(
    connection: Connection,
    release: Release,
    now: float,
    *,
    state: ReleaseState | None = None,
    step: int | None = None,
    judge_state: bytes | None = None,
    went_live: int | None = None,
) -> Release:
    """Write what is given, and a new revision."""
    values = {"state": state, "step": step, "judge_state": judge_state, "went_live": went_live}
    connection.execute(
        sa.update(RELEASES)
        .where(RELEASES.c.id == release.id)
        .values(
            revision=release.revision + 1,
            changed=now,
            **{name: value for name, value in values.items() if value is not None},
        )
    )
    return _release(connection, release.id)


def _one(connection: Connection, query: sa.Select[Any]) -> Release | None:
    row = connection.execute(query.limit(1)).one_or_none()
    return None if row is None else _release_of(row)


def _under_way(connection: Connection, deployment: str) -> Release | None:
    return _one(
        connection,
        sa.select(RELEASES).where(RELEASES.c.deployment == deployment, RELEASES.c.state.in_(OPEN)),
    )


def _live(connection: Connection, deployment: str) -> Release | None:
    return _one(
        connection, sa.select(RELEASES).where(RELEASES.c.deployment == deployment, RELEASES.c.state == "live")
    )


def _last_good(connection: Connection, deployment: str) -> Release | None:
    if _under_way(connection, deployment) is not None and (live := _live(connection, deployment)) is not None:
        return live
    return _one(
        connection,
        sa.select(RELEASES)
        .where(
            RELEASES.c.deployment == deployment, RELEASES.c.state == "superseded", RELEASES.c.went_live > 0
        )
        .order_by(RELEASES.c.went_live.desc()),
    )


def _was_live(connection: Connection, deployment: str, version: str) -> Release:
    """The release by which a version was live last. Raises `VersionNotFound`."""
    release = _one(
        connection,
        sa.select(RELEASES)
        .where(RELEASES.c.deployment == deployment, RELEASES.c.version == version, RELEASES.c.went_live > 0)
        .order_by(RELEASES.c.went_live.desc()),
    )
    if release is None:
        raise VersionNotFound(
            f"version {version} of {deployment} was never live",
            hint=f"parbake history {deployment} shows what was",
        )
    return release


def _deployment(connection: Connection, name: str) -> Deployment:
    return _deployment_of(connection.execute(sa.select(DEPLOYMENTS).where(DEPLOYMENTS.c.name == name)).one())


def _deployment_of(row: Any) -> Deployment:
    return Deployment(row.name, msgspec.json.decode(row.settings), row.revision, row.created, row.by)


def _newest_parameters(connection: Connection, deployment: str) -> Parameters:
    row = connection.execute(
        sa.select(PARAMETERS)
        .where(PARAMETERS.c.deployment == deployment)
        .order_by(PARAMETERS.c.version.desc())
        .limit(1)
    ).one_or_none()
    return Parameters(deployment, 0, {}) if row is None else _parameters_of(row)


def _parameters_of(row: Any) -> Parameters:
    # `values` is also a method of rows.
    values = row._mapping["values"]
    return Parameters(row.deployment, row.version, msgspec.json.decode(values), row.at, row.by, row.why)


def _image_of(connection: Connection, proposal: Proposal) -> str:
    """The image that a proposal names, else the newest with its bundle; "" where none is known."""
    if proposal.image:
        return proposal.image
    row = connection.execute(
        sa.select(IMAGES)
        .where(IMAGES.c.bundle_digest == proposal.bundle_digest)
        .order_by(IMAGES.c.at.desc(), IMAGES.c.tag)
        .limit(1)
    ).one_or_none()
    return "" if row is None else ImageRecord(row.tag, row.image_id, row.bundle_digest).reference


def _details_of(image: ImageRecord) -> Details:
    return {"tag": image.tag, "id": image.image_id, "bundle_digest": image.bundle_digest}


def _waivers(connection: Connection, deployment: str, version: str) -> list[WaiverRecord]:
    query = sa.select(WAIVERS).where(WAIVERS.c.deployment == deployment).order_by(WAIVERS.c.id)
    if version:
        query = query.where(WAIVERS.c.version == version)
    return [
        WaiverRecord(
            row.deployment,
            row.version,
            row.check,
            row.by,
            row.why,
            msgspec.json.decode(row.evidence),
            row.id,
            row.at,
        )
        for row in connection.execute(query)
    ]


def _insert_unless_there(connection: Connection, table: sa.Table, **values: Any) -> bool:
    from sqlalchemy.dialects import postgresql, sqlite

    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return connection.execute(insert(table).values(**values).on_conflict_do_nothing()).rowcount > 0


def _note(
    connection: Connection, now: float, by: str, what: str, release: Release, why: str, details: Details
) -> int:
    proposal = release.proposal
    return _event(connection, now, by, what, proposal.deployment, proposal.version, release.id, why, details)


def _event(
    connection: Connection,
    now: float,
    by: str,
    what: str,
    deployment: str,
    version: str,
    release: int,
    why: str,
    details: Details,
) -> int:
    """Write a line of the history and give its number."""
    return _insert(
        connection,
        HISTORY,
        at=now,
        by=by,
        what=what,
        deployment=deployment,
        version=version,
        release=release,
        why=why,
        details=_json(details),
    )


def _event_of(row: Any) -> Event:
    details = msgspec.json.decode(row.details)
    digest = details.get("bundle_digest", "")
    if not digest and row.proposal is not None:
        digest = msgspec.json.decode(row.proposal, type=Proposal).bundle_digest
    return Event(
        row.id, row.at, row.by, row.what, row.deployment, row.version, row.release, row.why, details, digest
    )


def _insert(connection: Connection, table: sa.Table, **values: Any) -> int:
    """A row more; gives its number, where the database numbers them."""
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    assert key is not None
    number: int = key[0]
    return number


def _json(value: object) -> str:
    """Raises `InvalidInput`."""
    try:
        raw = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"this cannot be kept as JSON: {error}") from error
    if len(raw) > MAX_JSON_BYTES:
        raise InvalidInput(f"{len(raw)} bytes of JSON are more than the {MAX_JSON_BYTES} that are kept")
    return raw.decode()


def _check_name(name: str, path: str) -> None:
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidInput(
            f"{name!r} cannot be a name", hint="letters, digits, dots and dashes can", path=path
        )


def _check_words(**texts: str) -> None:
    """Refuse what not every database can keep."""
    for field, text in texts.items():
        if len(text) > MAX_WORDS:
            raise InvalidInput(f"{len(text)} characters are more than {MAX_WORDS}", path=field)
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidInput(f"{text!r} has characters that are no text", path=field)


def _check_proposal(proposal: Proposal) -> None:
    _check_name(proposal.deployment, "deployment")
    _check_name(proposal.version, "version")
    _check_words(
        bundle_digest=proposal.bundle_digest,
        source=proposal.source,
        image=proposal.image,
        table=proposal.table,
    )
    if not proposal.steps:
        raise InvalidInput("a release has one step at least", path="steps")
    for index, share in enumerate(proposal.steps):
        if not 0 <= share <= 1:
            raise InvalidInput(
                f"{share:g} is no share of the traffic", hint="0.05 is 5 %", path=f"steps[{index}]"
            )
    if not 0 <= proposal.every_s < float("inf"):
        raise InvalidInput(f"{proposal.every_s} is no time", path="every_s")


def _already(other: Release) -> Conflict:
    proposal = other.proposal
    where = f", step {other.step + 1} of {len(proposal.steps)}" if other.step >= 0 else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(other.created))
    return Conflict(
        f"{proposal.deployment} is being released already: version {proposal.version} ({proposal.kind}{where}), "
        f"by {other.by} since {since}",
        hint=f"parbake rollback {proposal.deployment} ends it, parbake history {proposal.deployment} shows it",
    )


def _over(release: Release) -> Conflict:
    return Conflict(f"release {release.id} of {release.proposal.deployment} has ended: it is {release.state}")
