"""Files laid out page by page are what LMDB itself would read, copy and walk through."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.digest import digest_of_file
from parbake.tables.lmdb import LmdbWriter
from parbake.tables.pages import PageWriter, fits
from parbake.tables.ports import Bytes, as_list

LEAF = 97  # entries of a leaf with records of 16 bytes: (4096 - 16) / (8 + 16 + 16 + 2)
BRANCH = 156  # children of a branch


def _entries(count: int, size: int, seed: int) -> tuple[Bytes, Bytes]:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    keys = keys[np.lexsort(keys.T[::-1])]
    return keys, rng.integers(0, 256, (count, size), dtype=np.uint8)


def _walk(folder: Path) -> tuple[list[tuple[bytes, bytes]], int]:
    environment = lmdb.open(str(folder), readonly=True, lock=False)
    try:
        with environment.begin() as transaction:
            forwards = list(transaction.cursor())
            cursor = transaction.cursor()
            backwards = list(cursor.iterprev()) if cursor.last() else []
        assert backwards == forwards[::-1]
        return forwards, environment.stat()["leaf_pages"]
    finally:
        environment.close()


def _check(count: int, size: int, seed: int) -> None:
    keys, records = _entries(count, size, seed)
    expected = list(zip(as_list(keys), as_list(records), strict=True))
    with tempfile.TemporaryDirectory() as name:
        for kind in ("pages", "library", "copy"):
            (Path(name) / kind).mkdir()
        pages = PageWriter(Path(name) / "pages" / "data.mdb", size, likely=count)
        library = LmdbWriter(Path(name) / "library", 1 << 26)
        for writer in (pages, library):
            for start in range(0, count, 5000):
                writer.append(keys[start : start + 5000], records[start : start + 5000])
            assert writer.finish() == count
        with (Path(name) / "pages" / "data.mdb").open("rb") as file:
            assert pages.digest == digest_of_file(file)
        found, leaves = _walk(Path(name) / "pages")
        assert found == expected
        # Appending in order, LMDB fills its pages just as full.
        assert leaves == _walk(Path(name) / "library")[1]
        environment = lmdb.open(str(Path(name) / "pages"), readonly=True, lock=False)
        environment.copy(str(Path(name) / "copy"), compact=True)
        environment.close()
        assert _walk(Path(name) / "copy")[0] == expected


@given(st.integers(0, 400), st.integers(0, 2012), st.integers(0, 9))
def test_any_number_of_records_of_any_size_is_read_back(count: int, size: int, seed: int) -> None:
    _check(count, size, seed)


@pytest.mark.parametrize("count", [LEAF, LEAF + 1, LEAF * BRANCH, LEAF * BRANCH + 1, LEAF * (BRANCH + 1) + 1])
def test_pages_and_branches_that_are_just_full_are_read_back(count: int) -> None:
    _check(count, 16, 0)


def test_records_that_need_pages_of_their_own_are_left_to_the_library() -> None:
    assert fits(2014)
    assert not fits(2015)
    assert not fits(None)


def test_records_of_another_size_are_refused(tmp_path: Path) -> None:
    keys, records = _entries(2, 4, 0)
    writer = PageWriter(tmp_path / "data.mdb", 5)
    with pytest.raises(ValueError, match="shape"):
        writer.append(keys, records)
    writer.abandon()


def test_a_wrong_guess_of_the_number_of_entries_gives_no_digest(tmp_path: Path) -> None:
    keys, records = _entries(500, 5, seed=1)
    writer = PageWriter(tmp_path / "data.mdb", 5, likely=501)
    writer.append(keys, records)
    assert writer.finish() == 500
    assert writer.digest == ""
