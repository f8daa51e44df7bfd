"""How the database of the state store is reached: addresses, connections, migrations, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, Connection, Engine, make_url

from parbake.errors import MissingExtra, ParbakeError, SettingsError, StateAway, StateTooNew, StateTorn
from parbake.release.schema import VERSION

BUSY_S: Final = 5.0
"""How long a verb waits for another one's lock."""

CONNECT_S: Final = 5

WRITE: Final = "parbake_write"
"""Execution option of a connection whose transaction is going to write."""

MIGRATION_LOCK: Final = 0x7061_7262_616B_6501
_VERSION_TABLE: Final = "schema_version"
_SQLITE_TORN: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_POSTGRES_TORN: Final = {"XX001", "XX002"}
_POSTGRES_BUSY: Final = "55P03"
_POSTGRES_FULL: Final = "53100"


def address_of(url: str) -> URL:
    """The address of a store, with the driver that is used. Raises `SettingsError`."""
    try:
        address = make_url(url)
        backend = address.get_backend_name()
    except exc.ArgumentError as error:
        raise SettingsError(f"the store {url!r} is no URL", hint=_URL_HINT) from error
    if backend == "sqlite":
        if not address.database or address.database == ":memory:" or address.host:
            raise SettingsError("the store has no path of a file", hint=_URL_HINT)
        if address.query:
            raise SettingsError("the path of a store cannot have a question mark", hint=_URL_HINT)
        return address.set(drivername="sqlite+pysqlite")
    if backend in ("postgresql", "postgres"):
        return address.set(drivername="postgresql+psycopg")
    raise SettingsError(f"a store cannot be {backend}", hint=_URL_HINT)


_URL_HINT: Final = "sqlite:////absolute/path, sqlite:///relative/path or postgresql://user@host/database"


def make_file(path: Path) -> None:
    """An empty file for its owner only, so that SQLite's own files get its mode. Raises `StateAway`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StateAway(f"the state at {path} cannot be opened: {error.strerror}") from error


def sqlite_engine(address: URL) -> Engine:
    """Connections to a file: in WAL mode, synced with every commit."""
    path = Path(address.database or "").absolute()

    def connect() -> sqlite3.Connection:
        # Only `make_file` makes one: a store that is gone must be missed, not begun anew.
        return sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_S, check_same_thread=False)

    # Connections are kept: whoever closes the last one writes the whole WAL back into the file.
    engine = sa.create_engine(address, creator=connect, pool_size=2, max_overflow=8, pool_timeout=BUSY_S)

    @sa.event.listens_for(engine, "checkout")
    def look(_: Any, record: Any, __: Any) -> None:
        # SQLite would go on writing to a file that has been removed, and all of it would be lost.
        if record.info.get("file") != _identity(path):
            raise exc.DisconnectionError

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: sqlite3.Connection, record: Any) -> None:
        record.info["file"] = _identity(path)
        # The driver's own transactions begin too late: with the first write.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # Else INSERT OR REPLACE would remove rows without the triggers.
        connection.execute("PRAGMA recursive_triggers = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        wanted = connection.get_execution_options().get(WRITE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if wanted else "BEGIN")

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file is at a path."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def postgres_engine(address: URL) -> Engine:
    """Connections to a server, checked before use. Raises `MissingExtra`."""
    try:
        engine = sa.create_engine(
            address,
            # The locks of a verb count on seeing what was committed before they were got.
            isolation_level="READ COMMITTED",
            pool_size=2,
            max_overflow=8,
            pool_timeout=BUSY_S,
            # A connection may have died with the server since its last use.
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": CONNECT_S,
                "application_name": "parbake",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 20_000,
            },
        )
    except ImportError as error:
        raise MissingExtra("psycopg", "postgres") from error

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {round(BUSY_S * 1000)}")
            cursor.execute(f"SET statement_timeout = {round(BUSY_S * 2000)}")
            # Somebody who stopped in the middle must not keep the others out.
            cursor.execute(f"SET idle_in_transaction_session_timeout = {round(BUSY_S * 2000)}")
            # What was answered must survive the server's end, whatever its administrator thinks of others' data.
            cursor.execute(
                "SELECT set_config('synchronous_commit', 'on', false) "
                "WHERE current_setting('synchronous_commit') = 'off'"
            )
        connection.commit()

    return engine


def revision_of(connection: Connection) -> str | None:
    """The migration that a database is at; None for an empty one."""
    if not sa.inspect(connection).has_table(_VERSION_TABLE):
        return None
    return connection.execute(sa.text(f"SELECT version_num FROM {_VERSION_TABLE}")).scalar_one_or_none()  # noqa: S608


def upgrade(connection: Connection, where: str) -> None:
    """Run the migrations that are missing, in the transaction of ``connection``. Raises `StateTooNew`."""
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "parbake.release:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["version_table"] = _VERSION_TABLE
    at = revision_of(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if at is not None and at not in known:
        raise StateTooNew(
            f"the state at {where} has schema {at}, and this parbake knows {VERSION} at most",
            hint="use the parbake that wrote it, or a newer one",
        )
    command.upgrade(config, VERSION)


def meant(error: Exception, where: str, *, writing: bool) -> ParbakeError:
    """What an error of the driver means to whoever asked."""
    cause = error.orig if isinstance(error, exc.DBAPIError) and error.orig is not None else error
    words = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    busy = StateAway(f"the state at {where} is busy: another process holds it for over {BUSY_S:g} s")
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code in _SQLITE_TORN:
            return torn(where, words)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return busy
        if code == sqlite3.SQLITE_CANTOPEN:
            return StateAway(f"the state at {where} cannot be opened: is the file there, and may it be read?")
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return StateAway(
                f"the state at {where} cannot be {'written' if writing else 'read'}: {words}",
                hint="look for free space on the disk; nothing of what was asked for is kept",
            )
    state = getattr(cause, "sqlstate", None) or ""
    if state in _POSTGRES_TORN:
        return torn(where, words)
    if state == _POSTGRES_BUSY:
        return busy
    if state == _POSTGRES_FULL:
        return StateAway(f"the state at {where} cannot be written: {words}", hint="look for free space there")
    hint = "parbake serves on without it; what was asked for may have been kept: parbake history tells"
    return StateAway(f"the state at {where} does not answer: {words}", hint=hint if writing else "")


def torn(where: str, words: str) -> StateTorn:
    """The error of a damaged store."""
    return StateTorn(
        f"the state at {where} is damaged: {words}",
        hint="put it aside and bring back a copy; what serves goes on serving",
    )
