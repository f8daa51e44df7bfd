"""Parquet and Arrow files are handed out completely, once, to however many workers ask."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parbake.batch.arrow import ArrowReader, ArrowSource
from parbake.batch.model import Piece
from parbake.batch.parquet import ParquetReader, ParquetSource, gaps
from parbake.batch.ports import Task
from parbake.batch.stream import DigestReader
from parbake.contract.model import Contract, TensorSpec
from parbake.errors import InputFileError

CONTRACT = Contract("c", (TensorSpec("a", "INT64", ()),), (TensorSpec("y", "FP32", ()),), (), "p", "o")


def _table(rows: int) -> pa.Table:
    return pa.table({"a": np.arange(rows), "z": np.zeros(rows)})


intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda t: (min(t), max(t))), max_size=5
)


@given(intervals, st.integers(0, 15), st.integers(15, 30))
def test_gaps_are_what_is_not_done(done: list[tuple[int, int]], start: int, stop: int) -> None:
    covered = {at for a, b in done for at in range(a, b)}
    left = gaps(start, stop, sorted(done))
    assert [at for a, b in left for at in range(a, b)] == [
        at for at in range(start, stop) if at not in covered
    ]


@settings(max_examples=20)
@given(
    st.integers(1, 2000),
    st.integers(1, 900),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.floats(100, 1e5)), max_size=40),
    intervals,
)
def test_every_row_of_a_parquet_file_goes_to_one_worker_once(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    group: int,
    workers: int,
    asks: list[tuple[int, float]],
    done: list[tuple[int, int]],
) -> None:
    # Given a file with row groups, of which an earlier run has done some rows
    path = tmp_path_factory.mktemp("p") / "in.parquet"
    pq.write_table(_table(rows), path, row_group_size=group)
    finished = [Piece(a, b) for a, b in done]
    source = ParquetSource(path, "f", CONTRACT, finished, workers)
    readers = [ParquetReader(source.layout) for _ in range(workers)]
    # When workers ask in any order, and the last one until nothing is left
    seen: list[int] = []
    for worker, speed in [(w % workers, s) for w, s in asks] + [(w, 1e6) for w in range(workers)] * (
        rows + 1
    ):
        if (task := source.next(worker, speed)) is not None:
            for part in readers[worker].rows(task):
                seen += part.batch.column("a").to_pylist()
                assert (part.numbers - 1).tolist() == part.batch.column("a").to_pylist()
        elif source.drained:
            break
    # Then each row was read once
    covered = {at for a, b in done for at in range(a, b)}
    assert sorted(seen) == [at for at in range(rows) if at not in covered]
    assert source.finish()[1] == path.stat().st_size
    source.close()


def test_a_worker_is_not_sent_where_it_would_come_too_late(tmp_path: Path) -> None:
    pq.write_table(_table(100_000), tmp_path / "f", row_group_size=100_000)
    source = ParquetSource(tmp_path / "f", "f", CONTRACT, [Piece(0, 99_990)], 2)
    assert source.next(0, 1e8) is not None
    assert source.drained
    slow = ParquetSource(tmp_path / "f", "f", CONTRACT, [], 2)
    assert slow.next(0, 100.0) is not None
    assert slow.next(1, 100.0) is not None
    source.close()
    slow.close()


def test_a_parquet_file_that_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    pq.write_table(_table(10), tmp_path / "f")
    source = ParquetSource(tmp_path / "f", "f", CONTRACT)
    pq.write_table(_table(11), tmp_path / "f")
    with pytest.raises(InputFileError, match="changed while it was read"):
        source.finish()
    source.close()


def test_a_torn_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    pq.write_table(_table(100_000), path)
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(InputFileError, match="cannot be read as Parquet"):
        ParquetSource(path, "f", CONTRACT)
    # Damaged in the middle, with a sound index
    path.write_bytes(sound[:2000] + b"\xff" * 5000 + sound[7000:])
    source = ParquetSource(path, "f", CONTRACT)
    reader = ParquetReader(source.layout)
    with pytest.raises(InputFileError):
        list(reader.rows(Task(Piece(0, 100_000))))
    source.close()


def _arrow(table: pa.Table, *, is_file: bool, rows: int, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue()


def _source(data: bytes, *, is_file: bool, done: set[Piece] | None = None) -> ArrowSource:
    return ArrowSource(
        DigestReader(io.BytesIO(data)),
        "f",
        CONTRACT,
        is_file=is_file,
        size=len(data),
        done=(done or set()).__contains__,
    )


@pytest.mark.parametrize("is_file", [True, False])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrow_files_and_streams_are_read_whole(is_file: bool, compression: str | None) -> None:
    data = _arrow(_table(50_000), is_file=is_file, rows=20_000, compression=compression)
    source = _source(data, is_file=is_file)
    tasks = []
    while (task := source.next(0, 0.0)) is not None:
        tasks.append(task)
    assert len(tasks) > 5
    assert source.layout.extra == ("z",)
    parts = [part for task in tasks for part in ArrowReader().rows(task)]
    assert [x for part in parts for x in part.batch.column("a").to_pylist()] == list(range(50_000))
    assert [n for part in parts for n in part.numbers.tolist()] == list(range(1, 50_001))
    assert source.finish()[1] == len(data)
    again = _source(data, is_file=is_file, done={task.piece for task in tasks[1:]})
    assert again.next(0, 0.0) == tasks[0]
    assert again.next(0, 0.0) is None


def test_a_torn_arrow_stream_is_refused() -> None:
    data = _arrow(_table(50_000), is_file=False, rows=20_000)
    source = _source(data[: len(data) // 2], is_file=False)
    with pytest.raises(InputFileError, match="cannot be read as Arrow IPC"):
        list(iter(lambda: source.next(0, 0.0), None))
    with pytest.raises(InputFileError, match="cannot be read as Arrow IPC"):
        _source(data[:20], is_file=False)


def test_text_columns_with_dictionaries_are_handed_over_plain() -> None:
    contract = Contract("c", (TensorSpec("t", "BYTES", ()),), CONTRACT.outputs, (), "p", "o")
    table = pa.table({"t": pa.array(["x", "y"] * 500).dictionary_encode()})
    data = _arrow(table, is_file=False, rows=100)
    source = ArrowSource(
        DigestReader(io.BytesIO(data)), "f", contract, is_file=False, size=None, done=lambda piece: False
    )
    task = source.next(0, 0.0)
    assert task is not None
    (part, *_) = ArrowReader().rows(task)
    assert part.batch.column("t").type == pa.string()
