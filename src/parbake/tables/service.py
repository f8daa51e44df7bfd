"""Build a prediction table beside its place, prove it, and put it there in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from parbake.contract.digest import digest_of_file
from parbake.errors import TableError
from parbake.tables.lmdb import LmdbWriter, is_table, open_table
from parbake.tables.model import DATA, LINEAGE, Lineage, RecordLayout, sealed
from parbake.tables.pages import PageWriter, fits
from parbake.tables.ports import Bytes, Records, Writer


@dataclass(frozen=True, slots=True)
class Built:
    """A data file that is complete and on the disk."""

    keys: int
    data_bytes: int
    data_digest: str


def build(
    folder: Path,
    layout: RecordLayout,
    entries: Iterable[tuple[Bytes, Records]],
    *,
    most_keys: int,
    most_bytes: int,
) -> Built:
    """Write ``folder``/data.mdb (new) from entries in key order.

    ``most_keys`` and ``most_bytes`` are upper limits for the number of entries and for the bytes of all
    records. Raises OSError where the disk is full; the folder is then worthless.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writer: Writer
    if layout.bytes is not None and fits(layout.bytes):
        # Hardly ever do two segments share a key.
        writer = PageWriter(folder / DATA, layout.bytes, likely=most_keys)
    else:
        # Twice the bytes, for pages split in the middle; a page more where a record needs pages of its own.
        large = most_bytes > 1000 * max(most_keys, 1) or layout.bytes is None
        writer = LmdbWriter(folder, (1 << 20) + 2 * (most_bytes + 64 * most_keys) + large * 4096 * most_keys)
    try:
        for keys, records in _ahead(entries):
            writer.append(keys, records)
        count = writer.finish()
    except BaseException:
        # What was written takes space, and a full disk may be what is wrong.
        writer.abandon()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    digest = writer.digest if isinstance(writer, PageWriter) else ""
    # The checksum needs the processor, the sync the disk.
    with ThreadPoolExecutor(1) as pool, (folder / DATA).open("rb") as handle:
        synced = pool.submit(os.fsync, handle.fileno())
        digest = digest or digest_of_file(handle)
        synced.result()
        return Built(count, os.fstat(handle.fileno()).st_size, digest)


def _ahead(entries: Iterable[tuple[Bytes, Records]]) -> Iterator[tuple[Bytes, Records]]:
    """The same, each made in another thread while the one before it is written: sorting needs no interpreter."""
    left = iter(entries)
    with ThreadPoolExecutor(1, thread_name_prefix="merge") as pool:
        coming = pool.submit(next, left, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, left, None)
            yield item


def publish(folder: Path, out: Path, lineage: Lineage, *, replace: bool) -> None:
    """Complete a built ``folder`` with its lineage, prove it, and give it the name ``out`` in one step.

    Whoever has the table open that was there goes on reading it; ``folder`` holds that table afterwards, for
    the caller to remove, or is gone. Raises `TableError` where ``out`` exists
    and may not be replaced, `TableTorn` where what was built is not what the lineage says.
    """
    check_place(out, replace=replace)
    raw = msgspec.json.format(msgspec.json.encode(sealed(lineage)))
    with (folder / LINEAGE).open("wb") as handle:
        handle.write(raw)
        handle.flush()
        os.fsync(handle.fileno())
    # The checksum was computed a moment ago.
    open_table(folder, bundle_digest=lineage.bundle_digest, verify=False).close()
    folder.chmod(0o755)
    _sync_folder(folder)
    if out.exists() and any(out.iterdir()):
        _exchange(folder, out)
        _sync_folder(out.parent)
    else:
        folder.rename(out)
        _sync_folder(out.parent)


def check_place(out: Path, *, replace: bool) -> None:
    """Raises `TableError` where ``out`` exists and is not a table, or is one and ``replace`` is false."""
    if is_table(out):
        if not replace:
            raise exists(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TableError(f"{out} exists and is not a prediction table", hint="name another --out")


def exists(out: Path) -> TableError:
    """What to say where a table stands in the way."""
    return TableError(f"{out} exists", hint="--replace bakes a new table and puts it in its place")


def _exchange(left: Path, right: Path) -> None:
    """Swap two folders' names: in one step where the system can, else in two with a moment without either."""
    if sys.platform == "linux":
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            if not libc.renameat2(here, os.fsencode(left), here, os.fsencode(right), exchange):
                return
            number = ctypes.get_errno()
            if number not in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP):
                raise OSError(number, os.strerror(number), str(right))
    aside = right.with_name(f".{right.name}.old-{os.getpid()}")
    right.rename(aside)
    try:
        left.rename(right)
    except OSError:
        aside.rename(right)
        raise
    aside.rename(left)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
