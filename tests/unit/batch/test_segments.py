"""Segments give back what was written, in key order and each key once, and tell when they are torn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.batch import segments
from parbake.batch.model import Piece, Tally
from parbake.batch.segments import Merge, Records, Segment, read_all, sort, write
from parbake.errors import InputFileError

PIECE = Piece(0, 10)


def _matrix(keys: list[bytes]) -> segments.Bytes:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 16)


def _segment(
    folder: Path, name: str, keys: list[bytes], records: Records, first: int = 1
) -> tuple[Segment, int]:
    numbers = np.arange(first, first + len(keys))
    part, duplicates = sort(_matrix(keys), numbers, records, "f", "row")
    return write(folder, name, part, [PIECE], Tally(len(keys), 0, duplicates)), duplicates


keys = st.integers(0, 40).map(lambda n: bytes([n % 3, n % 2]) * 7 + bytes([n, 0]))


@given(st.lists(st.lists(keys, max_size=30), min_size=1, max_size=4), st.booleans(), st.integers(1, 4096))
def test_a_merge_has_every_key_once_in_order(parts: list[list[bytes]], fixed: bool, partition: int) -> None:
    record = {key: key[14:15] * (8 if fixed else key[14] % 5) for part in parts for key in part}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "_PARTITION_BYTES", partition)
        found = []
        duplicates = 0
        for at, part in enumerate(parts):
            records: Records = [record[key] for key in part]
            if fixed:
                records = np.frombuffer(b"".join([record[key] for key in part]), np.uint8).reshape(
                    len(part), 8
                )
            segment, again = _segment(Path(name), str(at), part, records, 100 * at)
            found.append(segment)
            duplicates += again
        merge = Merge(found, "f", "row")
        merged: list[tuple[bytes, bytes]] = []
        for some, theirs in merge.entries():
            values = theirs if isinstance(theirs, list) else [row.tobytes() for row in theirs]
            merged += zip([key.tobytes() for key in some], values, strict=True)
    assert merged == sorted(record.items())
    assert len(merged) + duplicates + merge.duplicates == sum(map(len, parts))
    assert merge.most_keys >= len(merged)
    assert merge.most_bytes >= sum(len(value) for _, value in merged)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_two_rows_of_one_key_with_different_records_are_named(
    fixed: bool, together: bool, tmp_path: Path
) -> None:
    one, other = b"k" * 16, b"l" * 16
    left: Records = [b"a", b"b"]
    right: Records = [b"b", b"c"]
    if fixed:
        left, right = (np.frombuffer(b"".join(records), np.uint8).reshape(2, 1) for records in (left, right))
    message = "rows 2 and 7 have the same key and different predictions"
    if together:
        numbers = np.array([7, 2])
        with pytest.raises(InputFileError, match=message):
            sort(_matrix([one, one]), numbers, right, "f", "row")
        return
    first, _ = _segment(tmp_path, "a", [other, one], left, 1)
    second, _ = _segment(tmp_path, "b", [b"z" * 16, one], right, 6)
    with pytest.raises(InputFileError, match=message) as caught:
        list(Merge([first, second], "f", "row").entries())
    assert caught.value.path == "f"


def test_of_equal_keys_the_first_row_of_the_file_stays() -> None:
    part, duplicates = sort(_matrix([b"k" * 16] * 3), np.array([9, 4, 6]), [b"a"] * 3, "f", "row")
    assert (part.numbers.tolist(), duplicates) == ([4], 2)


def test_segments_are_found_again_with_what_they_hold(tmp_path: Path) -> None:
    segment, _ = _segment(tmp_path, "a", [bytes([i]) * 16 for i in range(50)], [b"x"] * 50)
    (again,) = read_all(tmp_path)
    assert again == segment
    assert again.header.pieces == (PIECE,)
    assert again.header.tally == Tally(50)


def test_torn_and_foreign_files_are_no_segments(tmp_path: Path) -> None:
    sound, _ = _segment(tmp_path, "a", [bytes([i]) * 16 for i in range(50)], [b"x" * 9] * 50)
    raw = sound.path.read_bytes()
    (tmp_path / "short.seg").write_bytes(raw[:-1])
    (tmp_path / "stump.seg").write_bytes(raw[:40])
    (tmp_path / "altered.seg").write_bytes(raw[:-9] + b"y" + raw[-8:])
    (tmp_path / "other.seg").write_bytes(b"something else")
    (tmp_path / "begun.new").write_bytes(raw)
    assert [segment.path for segment in read_all(tmp_path)] == [sound.path]
    assert [path.name for path in tmp_path.iterdir()] == ["a.seg"]


def test_an_empty_segment_counts_as_done(tmp_path: Path) -> None:
    segment, _ = _segment(tmp_path, "a", [], np.empty((0, 4), np.uint8))
    assert read_all(tmp_path) == [segment]
    assert list(Merge([segment], "f", "row").entries()) == []
