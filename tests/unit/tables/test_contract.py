"""What every prediction table does, whatever keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest

from parbake.serving.ports import PredictionTable
from parbake.tables.lmdb import LmdbTable, LmdbWriter
from parbake.tables.memory import MemoryTable, MemoryWriter
from parbake.tables.pages import PageWriter
from parbake.tables.ports import Bytes, Records, Writer

Make = Callable[[Bytes, Records], PredictionTable]


def _keys(count: int) -> Bytes:
    digests = sorted(
        hashlib.blake2b(bytes([i % 256, i // 256]), digest_size=16).digest() for i in range(count)
    )
    return np.frombuffer(b"".join(digests), np.uint8).reshape(count, 16)


def _fill(writer: Writer, keys: Bytes, records: Records) -> int:
    third = len(keys) // 3
    writer.append(keys[:third], records[:third])
    writer.append(keys[third:], records[third:])
    count = writer.finish()
    writer.abandon()
    return count


@pytest.fixture(params=["memory", "lmdb, page by page", "lmdb, key by key"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes a table of some entries."""

    def build(keys: Bytes, records: Records) -> PredictionTable:
        if request.param == "memory":
            collector = MemoryWriter()
            assert _fill(collector, keys, records) == len(keys)
            return MemoryTable("sha256:abc", collector.entries)
        writer: Writer
        if request.param == "lmdb, page by page":
            writer = PageWriter(tmp_path / "data.mdb", len(records[0]))
        else:
            writer = LmdbWriter(tmp_path, 1 << 24)
        assert _fill(writer, keys, records) == len(keys)
        return LmdbTable(tmp_path, bundle_digest="sha256:abc", rows=len(keys))

    return build


def test_a_key_gives_its_record_and_an_unknown_one_none(make: Make) -> None:
    keys = _keys(500)
    records = [bytes([i % 256]) * 12 for i in range(500)]
    table = make(keys, records)
    assert [table.get(key.tobytes()) for key in keys] == records
    assert table.get(bytes(16)) is None
    assert table.get(b"\xff" * 16) is None
    table.close()


def test_records_may_come_as_a_matrix(make: Make) -> None:
    keys = _keys(7)
    records = np.arange(7 * 5, dtype=np.uint8).reshape(7, 5)
    table = make(keys, records)
    assert table.get(keys[6].tobytes()) == records[6].tobytes()
    table.close()


def test_a_table_knows_its_bundle_and_its_size_and_closes_twice(make: Make) -> None:
    table = make(_keys(3), [b"a", b"b", b"c"])
    assert (table.bundle_digest, table.rows) == ("sha256:abc", 3)
    table.close()
    table.close()


@pytest.mark.parametrize("kind", ["pages", "library"])
def test_entries_out_of_order_are_refused(kind: str, tmp_path: Path) -> None:
    keys = _keys(9)
    writer: Writer = (
        PageWriter(tmp_path / "data.mdb", 1) if kind == "pages" else LmdbWriter(tmp_path, 1 << 20)
    )
    writer.append(keys[3:6], [b"x"] * 3)
    for wrong in (keys[5:6], keys[:2], keys[[7, 6]]):
        with pytest.raises(ValueError, match="not in order"):
            writer.append(wrong, [b"x"] * len(wrong))
    writer.abandon()


def test_one_file_can_be_open_twice_in_a_process(tmp_path: Path) -> None:
    keys = _keys(2)
    _fill(PageWriter(tmp_path / "data.mdb", 1), keys, [b"x", b"y"])
    one = LmdbTable(tmp_path, bundle_digest="d", rows=2)
    other = LmdbTable(tmp_path, bundle_digest="d", rows=2)
    one.close()
    assert other.get(keys[1].tobytes()) == b"y"
    with pytest.raises(lmdb.Error):
        one.get(keys[1].tobytes())
    other.close()
