"""Prediction tables in LMDB: one file, mapped into memory and shared by all processes that read it.

::

    eta.table/
        lineage.json     where it came from, and what data.mdb must be
        data.mdb         key -> record
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from parbake.contract.digest import digest_of_file
from parbake.errors import TableError, TableForeign, TableMissing, TableTooNew, TableTorn
from parbake.tables.model import DATA, FORMAT, LINEAGE, Lineage, is_sealed
from parbake.tables.ports import Bytes, Records, as_list

_BATCH: Final = 100_000
_READAHEAD_MOST: Final = 1 << 30
_MAX_LINEAGE_BYTES: Final = 1 << 20
_OPEN_TRIES: Final = 5
_NEARLY_FULL: Final = 16 << 20

# LMDB refuses to map one file twice in a process, and two deployments may share a table.
_environments: dict[tuple[int, int], _Mapped] = {}
_lock: Final = threading.Lock()


class _Mapped:
    """One mapped file and the number of tables that read it."""

    __slots__ = ("environment", "identity", "users")

    def __init__(self, environment: Any, identity: tuple[int, int]) -> None:
        self.environment = environment
        self.identity = identity
        self.users = 0


class LmdbTable:
    """Entries in a published LMDB file at ``folder``/data.mdb, which never changes.

    The caller has checked the file: LMDB trusts its pages, and a damaged one may end the process.
    Raises `TableTorn` where LMDB cannot open it or it does not hold ``rows`` entries.
    """

    __slots__ = ("_mapped", "_transaction", "bundle_digest", "get", "rows")

    get: Callable[[bytes], bytes | None]
    """The record baked for a key, or None."""

    def __init__(self, folder: Path, *, bundle_digest: str, rows: int) -> None:
        self.bundle_digest = bundle_digest
        self.rows = rows
        self._mapped: _Mapped | None = None
        self._mapped = _map(folder)
        try:
            # One transaction for good: nobody writes to a published file, so it never gets stale.
            self._transaction = self._mapped.environment.begin(buffers=False)
            found = self._transaction.stat(self._mapped.environment.open_db(None, self._transaction))[
                "entries"
            ]
            if found != rows:
                self._transaction.abort()
                raise TableTorn(f"{folder / DATA} holds {found} keys, the lineage says {rows}")
        except BaseException:
            _unmap(self._mapped)
            self._mapped = None
            raise
        self.get = self._transaction.get

    def close(self) -> None:
        """Release the mapping; the last table that reads the file unmaps it."""
        if self._mapped is None:
            return
        self._transaction.abort()
        _unmap(self._mapped)
        self._mapped = None


class LmdbWriter:
    """Writes ``folder``/data.mdb through LMDB itself, for records of any size; the file may get ``capacity`` bytes.

    What is not yet on the disk when `finish` returns is for the caller to sync.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder = folder
        self._environment = lmdb.open(
            str(folder), map_size=capacity, lock=False, sync=False, metasync=False, max_dbs=0, meminit=False
        )
        self._entries = 0

    def append(self, keys: Bytes, records: Records) -> None:
        """Add entries in key order. Raises OSError where the disk is full, ValueError where keys are not in order."""
        names, values = as_list(keys), as_list(records)
        for start in range(0, len(names), _BATCH):
            pairs = list(zip(names[start : start + _BATCH], values[start : start + _BATCH], strict=True))
            try:
                with self._environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                    consumed, added = cursor.putmulti(pairs, append=True, overwrite=False)
            except lmdb.Error as error:
                raise self._os_error(error) from error
            if added != len(pairs) or consumed != len(pairs):
                raise ValueError("keys are not in order")
            self._entries += added

    def finish(self) -> int:
        """The number of entries."""
        self._environment.close()
        return self._entries

    def abandon(self) -> None:
        """Close the file as it is."""
        self._environment.close()

    def _os_error(self, error: lmdb.Error) -> OSError:
        """What LMDB said, as the error of the system that it passes on: a full disk, most of all."""
        for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            if os.strerror(number) in str(error):
                return OSError(number, os.strerror(number))
        # A write that was cut short is an I/O error to LMDB, whatever cut it.
        stat = os.statvfs(self._folder)
        if os.strerror(errno.EIO) in str(error) and stat.f_bavail * stat.f_frsize < _NEARLY_FULL:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return OSError(str(error))


def is_table(path: Path) -> bool:
    """Whether the folder looks like a table, sound or not."""
    return (path / LINEAGE).is_file()


def read_lineage(path: str | Path) -> Lineage:
    """The lineage of a table. Raises `TableTorn` or `TableTooNew`."""
    return _decode(Path(path), _lineage_bytes(Path(path)))


def open_table(path: str | Path, *, bundle_digest: str | None = None, verify: bool = True) -> LmdbTable:
    """Open a published table for reading.

    ``bundle_digest`` is that of the bundle which is served. The size of the data file is always checked;
    ``verify`` recomputes its checksum too, which reads all of it: once per machine is enough. Both come
    before LMDB sees the file, because LMDB maps it and a damaged one would end the process.

    Raises `TableTorn`, `TableTooNew` or `TableForeign`.
    """
    folder = Path(path)
    raw = _lineage_bytes(folder)
    for _ in range(_OPEN_TRIES):
        try:
            table = _open(folder, _decode(folder, raw), bundle_digest, verify)
        except TableError:
            again = _lineage_bytes(folder)
            if again == raw:
                raise
        else:
            again = _lineage_bytes(folder)
            if again == raw:
                return table
            table.close()
        # Another table was published here between reading the one file and the other.
        raw = again
    raise TableTorn(f"{folder} is replaced all the time", hint="is a bake running in a loop?")


def _open(folder: Path, lineage: Lineage, bundle_digest: str | None, verify: bool) -> LmdbTable:
    if bundle_digest is not None and lineage.bundle_digest != bundle_digest:
        raise TableForeign(
            f"{folder} was baked by bundle {_short(lineage.bundle_digest)} ({lineage.contract}), "
            f"served is {_short(bundle_digest)}",
            hint="parbake bake BUNDLE --input ... with the bundle that is served",
        )
    data = folder / DATA
    try:
        size = data.stat().st_size
        if size != lineage.data_bytes:
            raise TableTorn(
                f"{data} has {size} bytes, the lineage says {lineage.data_bytes}",
                hint="copy the table again, or bake it again",
            )
        if verify:
            with data.open("rb") as handle:
                actual = digest_of_file(handle)
            if actual != lineage.data_digest:
                raise TableTorn(
                    f"{data} has digest {_short(actual)}, the lineage says {_short(lineage.data_digest)}",
                    hint="the file was changed after baking: copy the table again, or bake it again",
                )
    except OSError as error:
        raise TableTorn(f"{data} cannot be read: {error.strerror}", hint="bake the table again") from error
    return LmdbTable(folder, bundle_digest=lineage.bundle_digest, rows=lineage.keys)


def _lineage_bytes(folder: Path) -> bytes:
    target = folder / LINEAGE
    try:
        size = target.stat().st_size
        if size > _MAX_LINEAGE_BYTES:
            raise TableTorn(f"{target} has {size} bytes, more than the limit of {_MAX_LINEAGE_BYTES}")
        return target.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TableMissing(
            f"no prediction table at {folder}", hint="parbake bake BUNDLE --input FILE --out TABLE writes one"
        ) from error
    except OSError as error:
        raise TableTorn(f"{target} cannot be read: {error.strerror}") from error


def _decode(folder: Path, raw: bytes) -> Lineage:
    target = folder / LINEAGE
    try:
        number = json.loads(raw).get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise TableTorn(f"{target} is not valid JSON: {error}", hint="bake the table again") from error
    if isinstance(number, int) and number > FORMAT:
        raise TableTooNew(
            f"{folder} has table format {number}, this parbake reads up to {FORMAT}", hint="upgrade parbake"
        )
    try:
        lineage = msgspec.json.decode(raw, type=Lineage)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TableTorn(f"{target}: {error}", hint="bake the table again") from error
    if not is_sealed(lineage):
        raise TableTorn(f"{target} was changed after baking", hint="bake the table again")
    return lineage


def _map(folder: Path) -> _Mapped:
    with _lock:
        try:
            stat = (folder / DATA).stat()
            identity = (stat.st_dev, stat.st_ino)
            mapped = _environments.get(identity)
            if mapped is None:
                environment = lmdb.open(
                    str(folder),
                    map_size=max(stat.st_size, 1 << 20),
                    readonly=True,
                    create=False,
                    lock=False,
                    max_dbs=0,
                    readahead=stat.st_size <= _READAHEAD_MOST,
                )
                mapped = _environments[identity] = _Mapped(environment, identity)
        except (OSError, lmdb.Error) as error:
            raise TableTorn(
                f"LMDB cannot open {folder / DATA}: {error}", hint="bake the table again"
            ) from error
        mapped.users += 1
        return mapped


def _unmap(mapped: _Mapped) -> None:
    with _lock:
        mapped.users -= 1
        if not mapped.users:
            _environments.pop(mapped.identity, None)
            mapped.environment.close()


def _short(digest: str) -> str:
    return digest[:19] + "..." if len(digest) > 22 else digest
