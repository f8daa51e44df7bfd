"""Write an LMDB file of sorted keys and equally long records in one pass, page by page.

An LMDB file is a B+ tree of pages of 4096 bytes. When all keys are known in order, and keys and records
have one size each, every page can be laid out by array arithmetic instead of one library call per key.
The layout is that of LMDB 0.9 (data version 1; ``struct MDB_page``, ``MDB_node``, ``MDB_meta`` and
``MDB_db`` in its mdb.c) on a little-endian machine of 64 bits; the result is read with LMDB itself.

::

    page 0, 1    meta pages; the one with the greater transaction number counts
    page 2...    leaves in key order, then the branches, level by level; the last page is the root

A page is a header of 16 bytes (page number, flags, where free space begins and ends), the offsets of its
nodes, free space, and the nodes from the end backwards. A node is 8 bytes (size of the data, flags, size
of the key), the key, the data, padded to an even size.
"""

from __future__ import annotations

import struct
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from parbake.contract.digest import named, new_hash
from parbake.contract.key import KEY_BYTES
from parbake.tables.ports import Bytes, Records

PAGE_BYTES: Final = 4096
_HEADER: Final = 16
_NODE: Final = 8
_BRANCH, _LEAF, _META = 0x01, 0x02, 0x08
_INTEGER_KEY: Final = 0x08
_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_NO_PAGE: Final = (1 << 64) - 1
# A greater node would be moved to overflow pages: (page - header) / 2 keys, less the node's offset.
_NODE_MAX: Final = ((PAGE_BYTES - _HEADER) // 2 & -2) - 2
_WRITE_PAGES: Final = 512
_CHILDREN: Final = (PAGE_BYTES - _HEADER) // (_NODE + KEY_BYTES + 2)
_HASHED_LATER: Final = 4


def fits(record_bytes: int | None) -> bool:
    """Whether records of this size (None: of different sizes) on this machine can be written here."""
    small = record_bytes is not None and _node_bytes(record_bytes) <= _NODE_MAX
    return small and sys.byteorder == "little" and sys.maxsize > 1 << 32


class PageWriter:
    """Writes the file at ``path``, which must not exist, for records of ``record_bytes`` bytes.

    ``likely`` is the number of entries that there will be, as far as one knows: where it turns out right,
    `digest` of the whole file is known as soon as that is written.
    """

    def __init__(self, path: Path, record_bytes: int, likely: int | None = None) -> None:
        self._size = record_bytes
        self._node = _node_bytes(record_bytes)
        self._per_page = (PAGE_BYTES - _HEADER) // (self._node + 2)
        self._file = path.open("xb", buffering=0)
        self._file.write(bytes(2 * PAGE_BYTES))
        self._likely = likely
        # The meta pages come first and are written last: their number of entries has to be guessed.
        self._hash = _Hash(self._metas(likely)) if likely is not None else None
        self.digest = ""
        """Of the whole file (`parbake.contract.digest`); "" before it is finished, or where ``likely`` was wrong."""
        self._next = 2
        self._entries = 0
        self._keys: list[Bytes] = []
        self._records: list[Bytes] = []
        self._waiting = 0
        self._firsts: list[Bytes] = []
        self._last = b""

    def append(self, keys: Bytes, records: Records) -> None:
        """Add entries in key order. Raises ValueError where the order or the sizes are not as promised."""
        if isinstance(records, list):
            records = np.frombuffer(b"".join(records), np.uint8).reshape(len(keys), self._size)
        if not len(keys):
            return
        if records.shape != (len(keys), self._size) or keys.shape[1] != KEY_BYTES:
            raise ValueError(f"records of shape {records.shape} for keys of shape {keys.shape}")
        if keys[0].tobytes() <= self._last or not _ascending(keys):
            raise ValueError("keys are not in order")
        self._last = keys[-1].tobytes()
        self._entries += len(keys)
        self._keys.append(keys)
        self._records.append(records)
        self._waiting += len(keys)
        if self._waiting >= self._per_page * _WRITE_PAGES:
            self._leaves(last=False)

    def finish(self) -> int:
        """Write what is left, the branches and the meta pages. Gives the number of entries."""
        self._leaves(last=True)
        leaves = self._next - 2
        firsts = np.concatenate(self._firsts) if self._firsts else np.empty((0, KEY_BYTES), np.uint8)
        numbers = np.arange(2, 2 + leaves, dtype=np.uint64)
        while len(numbers) > 1:
            firsts, numbers = self._branches(firsts, numbers)
        if self._hash is not None:
            digest, self._hash = self._hash.finish(), None
            self.digest = digest if self._entries == self._likely else ""
        self._file.seek(0)
        self._write(self._metas(self._entries))
        self._file.close()
        return self._entries

    def abandon(self) -> None:
        """Close the file as it is."""
        if self._hash is not None:
            self._hash.finish()
            self._hash = None
        self._file.close()

    def _leaves(self, *, last: bool) -> None:
        """Write whole leaves of what waits; the rest stays, unless it is the ``last`` call."""
        if not self._waiting:
            return
        keys = np.concatenate(self._keys)
        records = np.concatenate(self._records)
        whole = len(keys) // self._per_page * self._per_page
        for start in range(0, whole, self._per_page * _WRITE_PAGES):
            stop = min(start + self._per_page * _WRITE_PAGES, whole)
            self._leaf_pages(keys[start:stop], records[start:stop], self._per_page)
        if last and whole < len(keys):
            self._leaf_pages(keys[whole:], records[whole:], len(keys) - whole)
            whole = len(keys)
        self._keys, self._records = [keys[whole:]], [records[whole:]]
        self._waiting = len(keys) - whole

    def _leaf_pages(self, keys: Bytes, records: Bytes, per_page: int) -> None:
        head = np.frombuffer(struct.pack("<HHHH", self._size, 0, 0, KEY_BYTES), np.uint8)
        self._firsts.append(keys[::per_page].copy())
        self._pages(np.broadcast_to(head, (len(keys), _NODE)), keys, records, per_page, _LEAF)

    def _branches(
        self, firsts: Bytes, children: npt.NDArray[np.uint64]
    ) -> tuple[Bytes, npt.NDArray[np.uint64]]:
        """Write the level above ``children``; gives that level's first keys and page numbers."""
        # A branch keeps the page number where a leaf keeps the size of the data and the flags.
        heads = children.astype("<u8").view(np.uint8).reshape(-1, 8).copy()
        heads[:, 6:] = np.frombuffer(struct.pack("<H", KEY_BYTES), np.uint8)
        start = self._next
        starts: list[int] = []
        for first, stop, per_page in _fair(len(children), _CHILDREN):
            starts += range(first, stop, per_page)
            nothing = np.empty((stop - first, 0), np.uint8)
            self._pages(heads[first:stop], firsts[first:stop], nothing, per_page, _BRANCH)
        return firsts[starts], np.arange(start, self._next, dtype=np.uint64)

    def _pages(self, heads: Bytes, keys: Bytes, records: Bytes, per_page: int, flags: int) -> None:
        """Write pages of ``per_page`` nodes each."""
        count = len(keys) // per_page
        if not count:
            return
        size = _node_bytes(records.shape[1]) if flags == _LEAF else _NODE + KEY_BYTES
        upper = PAGE_BYTES - per_page * size
        lower = _HEADER + 2 * per_page
        pages = np.zeros((count, PAGE_BYTES), np.uint8)
        header = np.zeros(count, np.dtype("<u8, <u2, <u2, <u2, <u2"))
        header["f0"] = np.arange(self._next, self._next + count)
        header["f2"], header["f3"], header["f4"] = flags, lower, upper
        pages[:, :_HEADER] = header.view(np.uint8).reshape(count, _HEADER)
        offsets = (PAGE_BYTES - size * np.arange(1, per_page + 1)).astype("<u2")
        pages[:, _HEADER:lower] = offsets.view(np.uint8)
        at = upper
        for part in (heads, keys, records):
            width = part.shape[1]
            if width:
                # One item per node, so that each is copied as a whole; the first node stands last.
                place: npt.NDArray[Any] = np.ndarray(
                    (count, per_page), f"V{width}", pages.data, at, (PAGE_BYTES, size)
                )
                place[:, ::-1] = np.ascontiguousarray(part).view(f"V{width}").reshape(count, per_page)
            at += width
        self._write(pages)
        self._next += count

    def _metas(self, entries: int) -> bytes:
        """Both meta pages of a file with that many entries: an empty one, and the one that counts."""
        leaves = -(-entries // self._per_page)
        depth = 1 if leaves else 0
        branches, level = 0, leaves
        while level > 1:
            level = sum((stop - first) // per_page for first, stop, per_page in _fair(level, _CHILDREN))
            branches += level
            depth += 1
        pages = 2 + leaves + branches
        return self._meta(
            0, depth=0, branches=0, leaves=0, entries=0, root=_NO_PAGE, last=1, pages=pages
        ) + self._meta(
            1, depth, branches, leaves, entries, pages - 1 if leaves else _NO_PAGE, pages - 1, pages
        )

    def _meta(
        self,
        number: int,
        depth: int,
        branches: int,
        leaves: int,
        entries: int,
        root: int,
        last: int,
        pages: int,
    ) -> bytes:
        page = struct.pack("<QHHHH", number, 0, _META, 0, 0)
        page += struct.pack("<IIQQ", _MAGIC, _VERSION, 0, pages * PAGE_BYTES)
        page += struct.pack("<IHHQQQQQ", PAGE_BYTES, _INTEGER_KEY, 0, 0, 0, 0, 0, _NO_PAGE)
        page += struct.pack("<IHHQQQQQ", 0, 0, depth, branches, leaves, 0, entries, root)
        page += struct.pack("<QQ", last, number)
        return page.ljust(PAGE_BYTES, b"\0")

    def _write(self, data: bytes | Bytes) -> None:
        if self._hash is not None:
            self._hash.update(data)
        # A raw file may take less than it is given, when the disk is nearly full.
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        while len(view):
            view = view[self._file.write(view) :]


class _Hash:
    """A digest in a thread of its own, over what is given in order; what is given must not be changed."""

    def __init__(self, start: bytes) -> None:
        self._taken = new_hash(start)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checksum")
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: bytes | Bytes) -> None:
        """Take some bytes in; waits where too much waits already."""
        if len(self._waiting) >= _HASHED_LATER:
            self._waiting.popleft().result()
        self._waiting.append(
            self._pool.submit(self._taken.update, data if isinstance(data, bytes) else data.data)
        )

    def finish(self) -> str:
        """The digest of all; nothing can be added any more."""
        self._pool.shutdown()
        for late in self._waiting:
            late.result()
        return named(self._taken)


def _fair(count: int, most: int) -> list[tuple[int, int, int]]:
    """Cut ``count`` children into pages of at most ``most``: first, end, and how many to a page.

    LMDB does not accept a branch with a single child.
    """
    whole = count // most * most
    if count - whole != 1:
        return [cut for cut in ((0, whole, most), (whole, count, count - whole)) if cut[0] < cut[1]]
    cuts = ((0, whole - most, most), (whole - most, count - 2, most - 1), (count - 2, count, 2))
    return [cut for cut in cuts if cut[0] < cut[1]]


def _node_bytes(record_bytes: int) -> int:
    return _NODE + KEY_BYTES + record_bytes + (record_bytes & 1)


def _ascending(keys: Bytes) -> bool:
    """Whether each key is greater than the one before it."""
    halves = np.ascontiguousarray(keys).view(">u8")
    high, low = halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)
    greater = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
    return bool(greater.all())
