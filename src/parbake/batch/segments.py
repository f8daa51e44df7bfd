"""Scored rows on disk: sorted segments that survive a crash, merged in key order at the end.

A segment is written under another name and renamed, and synced soon after; a checksum tells apart one that
the disk did not keep. It says which pieces of the input it holds, so a later run knows what is left to do.

::

    magic, size of the header, header (JSON), then, one after another:
    bounds     4097 uint32: entries before each of the 4096 values of a key's first 12 bits
    keys       16 bytes each, ascending, no two equal
    numbers    uint64 each: the row's number in the file
    ends       uint64 each: where each record ends, only where they differ in size
    records
"""

from __future__ import annotations

import io
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from parbake.batch.model import Piece, Tally
from parbake.contract.key import KEY_BYTES
from parbake.errors import InputFileError

Bytes = npt.NDArray[np.uint8]
RowNumbers = npt.NDArray[np.int64]
Records = Bytes | list[bytes]
"""Records of several rows: shape (n, record bytes) where all have one size, else one object each."""

_MAGIC: Final = b"PBSEG001"
_PARTS: Final = 4096
_PART_SHIFT: Final = np.uint64(64 - 12)
_PARTITION_BYTES: Final = 8 << 20
_BOUNDS_BYTES: Final = 4 * (_PARTS + 1)
SUFFIX: Final = ".seg"


class SegmentHeader(Struct, frozen=True):
    """What a segment holds."""

    pieces: tuple[Piece, ...]
    tally: Tally
    entries: int
    record_bytes: int | None
    """None where records differ in size."""
    bytes: int
    """Of everything after the header."""
    crc32: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A finished segment."""

    path: Path
    header: SegmentHeader
    body: int
    """Where the bounds begin."""

    @property
    def size(self) -> int:
        """Bytes that a merge reads."""
        return self.header.bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Entries in key order."""

    keys: Bytes
    numbers: RowNumbers
    records: Records


@dataclass(slots=True)
class Merge:
    """All entries of some segments, each key once, in order. Iterate over `entries` once."""

    segments: Sequence[Segment]
    file: str
    """The input, as messages call it."""
    word: str
    """What a row's number counts: ``row`` or ``line``."""
    duplicates: int = 0
    """Equal keys in different segments; known when all entries were taken."""

    @property
    def most_bytes(self) -> int:
        """An upper limit for the bytes of all records."""
        return sum(segment.size for segment in self.segments)

    @property
    def most_keys(self) -> int:
        """An upper limit for the number of keys."""
        return sum(segment.header.entries for segment in self.segments)

    def entries(self) -> Iterator[tuple[Bytes, Records]]:
        """Keys and records, partition by partition: memory is bounded by a partition, not by the input.

        Raises `InputFileError` where two rows of one key have different records.
        """
        tables = [_bounds(segment) for segment in self.segments]
        wanted = max(1, self.most_bytes // _PARTITION_BYTES)
        step = _PARTS
        while _PARTS // step < wanted and step > 1:
            step //= 2
        for low in range(0, _PARTS, step):
            ranges = [
                (segment, int(bounds[low]), int(bounds[low + step]))
                for segment, bounds in zip(self.segments, tables, strict=True)
                if bounds[low] < bounds[low + step]
            ]
            if ranges:
                joined = _read(ranges)
                part, again = sort(joined.keys, joined.numbers, joined.records, self.file, self.word)
                self.duplicates += again
                yield part.keys, part.records


def sort(keys: Bytes, numbers: RowNumbers, records: Records, file: str, word: str) -> tuple[Part, int]:
    """Entries in the order of their keys, each key once, and how many were duplicates.

    Of equal keys the row that comes first in the file is kept. Raises `InputFileError` where two rows of
    one key have different records; ``file`` and ``word`` (what a number counts) name them.
    """
    part = Part(keys, numbers, records)
    high, low = _halves(keys)
    order = np.argsort(high)
    ranked = high[order]
    if not len(ranked) or not (ranked[1:] == ranked[:-1]).any():
        return _taken(part, order), 0
    # Where halves are equal, whole keys may be: of those the file's order decides.
    return _unique(_taken(part, np.lexsort((numbers, low, high))), file, word)


def write(folder: Path, name: str, part: Part, pieces: Sequence[Piece], tally: Tally) -> Segment:
    """Write a segment of sorted entries; the disk has it for certain after `sync`. Raises OSError."""
    bounds = np.zeros(_PARTS + 1, np.uint32)
    first = (_halves(part.keys)[0] >> _PART_SHIFT).astype(np.intp)
    bounds[1:] = np.cumsum(np.bincount(first, minlength=_PARTS))
    blocks: list[Any] = [bounds, np.ascontiguousarray(part.keys), part.numbers.astype(np.uint64)]
    record_bytes: int | None = None
    if isinstance(part.records, list):
        ends = np.cumsum([len(record) for record in part.records], dtype=np.uint64)
        blocks += [ends, b"".join(part.records)]
    else:
        record_bytes = part.records.shape[1]
        blocks.append(np.ascontiguousarray(part.records))
    views = [
        memoryview(block.data if isinstance(block, np.ndarray) else block).cast("B")
        for block in blocks
        if len(block)
    ]
    crc = 0
    for view in views:
        crc = zlib.crc32(view, crc)
    size = sum(len(view) for view in views)
    header = SegmentHeader(tuple(pieces), tally, len(part.keys), record_bytes, size, crc)
    text = msgspec.json.encode(header)
    staging = folder / f"{name}.new"
    try:
        with staging.open("wb") as handle:
            handle.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for view in views:
                handle.write(view)
    except OSError:
        staging.unlink(missing_ok=True)
        raise
    path = folder / f"{name}{SUFFIX}"
    staging.rename(path)
    return Segment(path, header, len(_MAGIC) + 8 + len(text))


def sync(folder: Path, paths: Sequence[Path]) -> None:
    """Wait until the disk has these segments of a folder. Raises OSError."""
    for path in (*paths, folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_all(folder: Path) -> list[Segment]:
    """The sound segments of a folder; anything else in it is removed."""
    found: list[Segment] = []
    for path in sorted(folder.iterdir()):
        segment = read_header(path) if path.suffix == SUFFIX else None
        if segment is None or not _sound(segment):
            path.unlink(missing_ok=True)
        else:
            found.append(segment)
    return found


def read_header(path: Path) -> Segment | None:
    """A segment without its entries; None where it is not one."""
    try:
        with path.open("rb") as handle:
            if handle.read(len(_MAGIC)) != _MAGIC:
                return None
            size = int.from_bytes(handle.read(8), "little")
            if size > path.stat().st_size:
                return None
            header = msgspec.json.decode(handle.read(size), type=SegmentHeader)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return Segment(path, header, len(_MAGIC) + 8 + size)


def _sound(segment: Segment) -> bool:
    crc = 0
    left = segment.header.bytes
    with segment.path.open("rb") as handle:
        handle.seek(segment.body)
        while chunk := handle.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
    return not left and crc == segment.header.crc32


def _bounds(segment: Segment) -> npt.NDArray[np.uint32]:
    with segment.path.open("rb") as handle:
        handle.seek(segment.body)
        return np.frombuffer(handle.read(_BOUNDS_BYTES), np.uint32)


def _read(ranges: Sequence[tuple[Segment, int, int]]) -> Part:
    """The entries of some segments, each from one number to another, one segment after the other."""
    total = sum(high - low for _, low, high in ranges)
    size = ranges[0][0].header.record_bytes
    keys = np.empty((total, KEY_BYTES), np.uint8)
    numbers = np.empty(total, np.int64)
    fixed = np.empty((total, size or 0), np.uint8)
    sized: list[bytes] = []
    at = 0
    for segment, low, high in ranges:
        entries = segment.header.entries
        keys_at = segment.body + _BOUNDS_BYTES
        numbers_at = keys_at + KEY_BYTES * entries
        rest_at = numbers_at + 8 * entries
        here = slice(at, at + high - low)
        with segment.path.open("rb", buffering=0) as file:
            _load(file, keys_at + KEY_BYTES * low, keys[here])
            _load(file, numbers_at + 8 * low, numbers[here])
            if size is not None:
                _load(file, rest_at + size * low, fixed[here])
            else:
                sized += _load_sized(file, rest_at, entries, low, high)
        at += high - low
    return Part(keys, numbers, fixed if size is not None else sized)


def _load(file: io.FileIO, at: int, out: npt.NDArray[Any]) -> None:
    """Fill an array from a place in a file."""
    if not out.nbytes:
        return
    file.seek(at)
    view = memoryview(out.data).cast("B")
    while len(view):
        read = file.readinto(view)
        if not read:
            raise OSError(f"{file.name!r} is cut short")
        view = view[read:]


def _load_sized(file: io.FileIO, at: int, entries: int, low: int, high: int) -> list[bytes]:
    before = max(low - 1, 0)
    ends = np.empty(high - before, np.int64)
    _load(file, at + 8 * before, ends)
    begin = int(ends[0]) if low else 0
    offsets = [begin, *ends[low - before :].tolist()]
    blob = np.empty(offsets[-1] - begin, np.uint8)
    _load(file, at + 8 * entries + begin, blob)
    raw = blob.tobytes()
    return [raw[a - begin : b - begin] for a, b in itertools.pairwise(offsets)]


def _unique(part: Part, file: str, word: str) -> tuple[Part, int]:
    high, low = _halves(part.keys)
    again = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))
    if not len(again):
        return part, 0
    records = part.records
    if isinstance(records, list):
        differing = [at for at in again.tolist() if records[at] != records[at + 1]]
    else:
        differing = again[(records[again] != records[again + 1]).any(axis=1)].tolist()
    if differing:
        one, other = sorted((int(part.numbers[differing[0]]), int(part.numbers[differing[0] + 1])))
        raise InputFileError(
            f"{word}s {one} and {other} have the same key and different predictions",
            path=file,
            hint="one row per entity; or is an input that matters not part of the key, or the model random?",
        )
    keep = np.ones(len(part.keys), bool)
    keep[again + 1] = False
    return _taken(part, np.flatnonzero(keep)), len(again)


def _taken(part: Part, order: npt.NDArray[np.intp]) -> Part:
    records = part.records
    taken: Records = (
        [records[at] for at in order.tolist()] if isinstance(records, list) else _rows(records, order)
    )
    return Part(_rows(part.keys, order), part.numbers[order], taken)


def _rows(matrix: Bytes, order: npt.NDArray[np.intp]) -> Bytes:
    """The rows in that order; as 64-bit words where that is possible, which is quicker."""
    if matrix.shape[1] and matrix.shape[1] % 8 == 0:
        words = np.ascontiguousarray(matrix).view(np.uint64)
        return np.take(words, order, axis=0).view(np.uint8)
    return np.take(matrix, order, axis=0)


def _halves(keys: Bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Keys as two numbers each, which compare as the bytes do."""
    words = np.ascontiguousarray(keys).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
