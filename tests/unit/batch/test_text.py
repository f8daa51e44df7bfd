"""CSV and JSON lines are cut where records end, whatever is in them, and every record keeps its line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.batch import text
from parbake.batch.model import Piece
from parbake.batch.ports import Reader, Rows
from parbake.batch.stream import DigestReader
from parbake.batch.text import CsvReader, JsonReader, TextSource, record_ends, record_lines
from parbake.contract.model import Contract, TensorSpec
from parbake.errors import InputFileError

CONTRACT = Contract(
    "c",
    (TensorSpec("a", "BYTES", ()), TensorSpec("b", "BYTES", ())),
    (TensorSpec("y", "FP32", ()),),
    (),
    "p",
    "o",
)
MATRIX = Contract(
    "m",
    (TensorSpec("x", "FP32", (2,)), TensorSpec("n", "INT64", ())),
    (TensorSpec("y", "FP32", ()),),
    (),
    "p",
    "o",
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few records, so that short files have many of them."""
    monkeypatch.setattr(text, "_LEAST_BLOCK_BYTES", 40)
    monkeypatch.setattr(text, "_RECORD_MOST", 4000)


def _source(data: bytes, kind: Literal["csv", "jsonl"], contract: Contract = CONTRACT) -> TextSource:
    return TextSource(
        DigestReader(io.BytesIO(data)), "f", contract, kind=kind, size=len(data), done=lambda piece: False
    )


def _rows(source: TextSource, contract: Contract = CONTRACT) -> list[Rows]:
    reader: Reader = (
        CsvReader(source.layout) if source.layout.format == "csv" else JsonReader(source.layout, contract)
    )
    found: list[Rows] = []
    while (task := source.next(0, 0.0)) is not None:
        found += reader.rows(task)
    assert source.drained
    return found


def _cells(rows: list[Rows]) -> list[tuple[str, str]]:
    return [(r["a"], r["b"]) for part in rows for r in part.batch.to_pylist()]


cells = st.text(st.sampled_from(list('ab ,;"\n\r\t|é6')), max_size=12)


@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=30),
    st.sampled_from([",", ";", "\t"]),
    st.booleans(),
)
def test_whatever_a_csv_writer_writes_is_read_back_with_its_lines(
    records: list[tuple[str, str]], delimiter: str, end: bool
) -> None:
    # A lone carriage return would be a line end to some readers and not to others.
    records = [(a.replace("\r", "") or "x", b.replace("\r", "")) for a, b in records]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["a", "b"])
    lines = []
    for record in records:
        lines.append(out.getvalue().count("\n") + 1)
        writer.writerow(record)
    data = out.getvalue() if end else out.getvalue().rstrip("\n")
    if not end and records[-1][1].endswith("\n"):
        data = out.getvalue()
    rows = _rows(_source(data.encode(), "csv"))
    assert _cells(rows) == records
    assert [n for part in rows for n in part.numbers.tolist()] == lines


def test_quotes_inside_a_value_are_inches() -> None:
    lines = [f'pipe {i}",{i}" x {i}" board' for i in range(30)]
    rows = _rows(_source(("a,b\n" + "\n".join(lines)).encode(), "csv"))
    assert _cells(rows) == [(f'pipe {i}"', f'{i}" x {i}" board') for i in range(30)]
    assert [n for part in rows for n in part.numbers.tolist()] == list(range(2, 32))


def test_blank_lines_and_carriage_returns_and_a_byte_order_mark_do_not_count() -> None:
    data = b"\xef\xbb\xbfa,b\r\n1,2\r\n\r\n3,4\r\n\n5,6"
    rows = _rows(_source(data, "csv"))
    assert _cells(rows) == [("1", "2"), ("3", "4"), ("5", "6")]
    assert [n for part in rows for n in part.numbers.tolist()] == [2, 4, 6]


def test_a_line_with_too_many_cells_is_one_bad_row() -> None:
    rows = _rows(_source(b"a,b\n1,2\n\n1,2,3\n4,5\n6\n", "csv"))
    assert _cells(rows) == [("1", "2"), ("4", "5")]
    bad = [(b.number, b.where, b.reason) for part in rows for b in part.bad]
    assert bad == [
        (4, "f, line 4", "3 columns, the header has 2"),
        (6, "f, line 6", "1 columns, the header has 2"),
    ]


def test_columns_are_found_by_name_in_any_order_and_others_are_left() -> None:
    source = _source(b"z,b,a\n1,2,3\n", "csv")
    assert source.layout.extra == ("z",)
    assert _cells(_rows(source)) == [("3", "2")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a,c\n1,2\n", "column 'b' is missing, which input 'b' needs"),
        (b"a,b,a\n1,2,3\n", "column 'a' is there twice"),
        (b"\n\n", "has no header"),
        (b"a,b\n1,\xff\n", "is not UTF-8: byte 0xff at f, line 2"),
        (b'a,b\n1,"never closed\n' + b"more, more\n" * 1000, "the record has more than"),
    ],
    ids=["column missing", "column twice", "no header", "not UTF-8", "quote never closed"],
)
def test_a_csv_file_that_cannot_be_read_is_refused_with_the_place(data: bytes, words: str) -> None:
    with pytest.raises(InputFileError) as caught:
        _rows(_source(data, "csv"))
    assert words in str(caught.value)


@given(st.binary(max_size=200).map(lambda raw: bytes(b'a,"\n'[x % 4] for x in raw)), st.integers(0, 200))
def test_record_ends_do_not_depend_on_where_a_block_was_cut(data: bytes, cut: int) -> None:
    # Given the ends of records as far as they can be told from a part of the data
    part = data[:cut]
    early = [end for end in record_ends(part, ",", final=False).tolist() if end < len(part)]
    # Then more data does not change them
    assert set(early) <= set(record_ends(data, ",", final=True).tolist())


def test_lines_of_records_count_line_ends_within_values() -> None:
    data = b'1,"x\ny"\n\n2,z\n"a\n\nb",3'
    assert record_lines(data, 10, ",").tolist() == [10, 13, 14]


def test_the_same_blocks_are_cut_each_time_and_done_ones_left_out() -> None:
    data = b"a,b\n" + b"".join(b"%d,%d\n" % (i, i) for i in range(200))
    first: list[Piece] = []
    source = _source(data, "csv")
    while (task := source.next(0, 0.0)) is not None:
        first.append(task.piece)
    assert len(first) > 5
    assert all(one.stop == other.start for one, other in pairwise(first))
    done = set(first[::2])
    again = TextSource(
        DigestReader(io.BytesIO(data)), "f", CONTRACT, kind="csv", size=len(data), done=done.__contains__
    )
    left = []
    while (task := again.next(0, 0.0)) is not None:
        left.append(task.piece)
    assert left == first[1::2]
    assert again.finish()[1] == len(data)


json_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)
)


@given(st.lists(st.tuples(json_values, st.lists(json_values, max_size=3)), min_size=1, max_size=10))
def test_any_json_values_are_read_or_named(values: list[tuple[Any, list[Any]]]) -> None:
    # Given objects with all kinds of values, and one that fits
    records = [{"x": [1, 2.5], "n": 3}, *({"x": x, "n": n} for n, x in values)]
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    rows = _rows(_source(data, "jsonl", MATRIX), MATRIX)
    # Then every line is a row or a bad row
    numbers = [n for part in rows for n in part.numbers.tolist()]
    bad = [b.number for part in rows for b in part.bad]
    assert sorted(numbers + bad) == list(range(1, len(records) + 1))
    for part in rows:
        for number, row in zip(part.numbers.tolist(), part.batch.to_pylist(), strict=True):
            given_row = records[number - 1]
            assert row["n"] == given_row["n"] or row["n"] is given_row["n"]
            assert row["x"] == given_row["x"]


def test_a_json_line_that_is_not_an_object_or_lacks_a_column_is_one_bad_row() -> None:
    lines = [
        '{"a": "1", "b": "2", "z": 0}',
        "[1]",
        "{",
        '{"a": "1"}',
        '{"a": 1, "b": "2"}',
        "",
        '{"a": "3", "b": "4"}',
    ]
    rows = _rows(_source("\n".join(lines).encode(), "jsonl"))
    assert _cells(rows) == [("1", "2"), ("3", "4")]
    reasons = {b.number: f"{b.where}: {b.reason}" for part in rows for b in part.bad}
    assert sorted(reasons) == [2, 3, 4, 5]
    assert reasons[4] == "f, line 4: column 'b' is missing"
    assert reasons[5] == "f, line 5, column 'a': 1 is no BYTES"


def test_json_lists_may_be_flat_or_nested_as_the_shape_is() -> None:
    contract = Contract("t", (TensorSpec("x", "FP32", (2, 2)),), CONTRACT.outputs, (), "p", "o")
    lines = [
        '{"x": [[1, 2], [3, 4]]}',
        '{"x": [1, 2, 3, 4]}',
        '{"x": [[1, 2, 3, 4]]}',
        '{"x": [1, 2, 3]}',
        '{"x": 1}',
    ]
    source = _source("\n".join(lines).encode(), "jsonl", contract)
    rows = _rows(source, contract)
    assert [r["x"] for part in rows for r in part.batch.to_pylist()] == [[1, 2, 3, 4]] * 2
    assert [b.number for part in rows for b in part.bad] == [3, 4, 5]


def test_a_file_without_json_objects_is_refused() -> None:
    with pytest.raises(InputFileError, match="holds no JSON objects"):
        _source(b"1\n2\n", "jsonl")


def test_a_digest_reader_gives_what_it_reads_and_the_digest_of_all(tmp_path: Path) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(np.arange(100_000, dtype=np.uint8).tobytes())
        file.seek(0)
        head = file.read(10)
        reader = DigestReader(file, head)
        assert reader.read(4) == head[:4]
        assert len(reader.read(50_000)) == 50_000
        digest, size = reader.finish()
    whole = np.arange(100_000, dtype=np.uint8).tobytes()
    assert digest == "blake2b:" + hashlib.blake2b(whole, digest_size=32).hexdigest()
    assert size == 100_000
