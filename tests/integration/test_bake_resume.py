"""A bake that is killed, starved or disturbed loses little and publishes nothing that is not whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from parbake.app.bake import BakeReport, bake
from parbake.batch.segments import read_header
from parbake.contract.bundle import StoredBundle
from parbake.contract.model import TensorSpec
from parbake.errors import ModelFailed, TableError
from parbake.tables.lmdb import read_lineage
from tests.unit.batch.bundles import linear_bundle, linear_rows, mixed_bundle, python_bundle

ROWS = 1500
SCRIPT = (
    "import sys; from parbake.app.bake import bake\n"
    "bake(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), segment_s=0.2, replace=True)"
)
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def slow(tmp_path: Path) -> StoredBundle:
    """Takes 2 ms for a row, and notes every row; the goldens are negative numbers."""
    source = (
        "import time\ndef predict(x):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as log:\n"
        "        log.write(''.join(f'{int(a)}\\n' for a in x[:, 0]))\n"
        "    time.sleep(0.002 * len(x))\n    return x.sum(axis=1)\n"
    )
    inputs = (TensorSpec("x", "FP32", (2,), columns=("a", "b")),)
    golden = {"x": np.array([[-1, 2], [-3, 4]], np.float32)}
    return python_bundle(tmp_path / "slow", source, inputs, (TensorSpec("y", "FP32", ()),), golden)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a bake in a process of its own, which ends with the test."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(
        bundle: StoredBundle, rows: Path, out: Path, *, standard: bool = False
    ) -> subprocess.Popen[bytes]:
        with rows.open("rb") as file:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SCRIPT,
                    str(bundle.path),
                    "-" if standard else str(rows),
                    str(out),
                    "2",
                ],
                stdin=file if standard else subprocess.DEVNULL,
            )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


def _rows(seed: int = 0) -> pa.Table:
    other = np.random.default_rng(seed).normal(size=ROWS).astype(np.float32)
    # The text makes a CSV file large enough to have many blocks.
    return pa.table({"a": np.arange(ROWS, dtype=np.float32), "b": other, "note": ["x" * 100] * ROWS})


def _until(what: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert process.poll() is None, "the bake ended before it could be disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _finished(out: Path) -> list[Path]:
    return sorted(out.with_name(f".{out.name}.baking").glob("segments/*.seg"))


def _logged(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().splitlines() if not line.startswith("-")]


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv on standard input"])
def test_a_killed_bake_goes_on_where_it_was(
    kind: str, slow: StoredBundle, start: Start, tmp_path: Path
) -> None:
    # Given a bake that was killed when it had finished some segments
    source, out = tmp_path / "in", tmp_path / "t"
    (pq.write_table if kind == "parquet" else pyarrow.csv.write_csv)(_rows(), source)
    standard = kind.endswith("input")
    process = start(slow, source, out, standard=standard)
    _until(lambda: len(_finished(out)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.1)
    assert not out.exists()
    before = [header for path in _finished(out) if (header := read_header(path))]
    kept = sum(segment.header.tally.scored for segment in before)
    assert 0 < kept < ROWS
    first = _logged(tmp_path)
    (tmp_path / "log").unlink()
    # When the same command is given again
    if standard:
        assert start(slow, source, out, standard=True).wait(60) == 0
    else:
        report = bake(slow.path, source, out, workers=2)
        assert report.resumed_rows == kept
        assert (report.rows, report.keys) == (ROWS, ROWS)
    # Then no row of a finished segment is computed again, and every other one is, once
    second = _logged(tmp_path)
    assert len(second) == len(set(second)) == ROWS - kept
    assert set(second) | set(first) == set(range(ROWS))
    # And the table is that of a bake that was not disturbed, byte for byte
    undisturbed = _undisturbed(slow, source, tmp_path / "whole")
    assert read_lineage(out).input_digest == undisturbed.input_digest
    assert (out / "data.mdb").read_bytes() == (tmp_path / "whole" / "data.mdb").read_bytes()
    assert not out.with_name(".t.baking").exists()


def _undisturbed(bundle: StoredBundle, source: Path, out: Path) -> BakeReport:
    """The same bake without the waiting."""
    quick = (bundle.path / "source" / "model.py").read_text().replace("0.002", "0")
    again = python_bundle(
        out.with_name("quick"),
        quick,
        bundle.contract.inputs,
        bundle.contract.outputs,
        dict(bundle.goldens().inputs),
    )
    return bake(again.path, source, out)


def test_other_rows_on_the_standard_input_start_afresh(
    slow: StoredBundle, start: Start, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "t"
    pyarrow.csv.write_csv(_rows(), source)
    process = start(slow, source, out, standard=True)
    _until(lambda: len(_finished(out)) >= 2, process)
    process.kill()
    process.wait()
    pyarrow.csv.write_csv(_rows(seed=1).slice(0, 300), source)
    (tmp_path / "log").unlink()
    assert start(slow, source, out, standard=True).wait(60) == 0
    assert sorted(_logged(tmp_path)) == list(range(300))
    assert read_lineage(out).rows == 300


def test_the_second_of_two_bakes_to_one_table_is_refused(
    slow: StoredBundle, start: Start, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "t"
    pq.write_table(_rows(), source)
    process = start(slow, source, out)
    _until(lambda: _finished(out), process)
    with pytest.raises(TableError, match=f"another bake is writing {out}"):
        bake(slow.path, source, out)
    assert process.wait(60) == 0
    assert read_lineage(out).keys == ROWS


def test_a_killed_worker_ends_the_bake_with_what_happened(tmp_path: Path) -> None:
    # Given a model that takes its time until a worker has met its end
    source = (
        "import os, sys, time\ndef predict(x):\n"
        f"    flag = {str(tmp_path / 'flag')!r}\n"
        "    if sys.argv[0].endswith('worker.py') and len(x) > 2 and not os.path.exists(flag):\n"
        "        open(flag, 'w').close()\n        os.kill(os.getpid(), 9)\n"
        "    time.sleep(0 if os.path.exists(flag) else 0.02 * len(x))\n    return x.sum(axis=1)\n"
    )
    inputs = (TensorSpec("x", "FP32", (2,), columns=("a", "b")),)
    golden = {"x": np.array([[-1, 2]], np.float32)}
    bundle = python_bundle(tmp_path / "m", source, inputs, (TensorSpec("y", "FP32", ()),), golden)
    pq.write_table(_rows(), tmp_path / "in")
    with pytest.raises(ModelFailed, match="a worker process of the bake was killed by signal 9") as caught:
        bake(bundle.path, tmp_path / "in", tmp_path / "t", workers=2, segment_s=0.2)
    assert "goes on where this one ended" in caught.value.hint
    assert not (tmp_path / "t").exists()
    report = bake(bundle.path, tmp_path / "in", tmp_path / "t", workers=2)
    assert report.rows == ROWS
    assert report.resumed_rows > 0


@pytest.mark.parametrize("sized", [False, True], ids=["page by page", "through LMDB"])
def test_a_full_disk_is_said_and_the_bake_goes_on_when_there_is_room(
    sized: bool, small_disk: Path, tmp_path: Path
) -> None:
    bundle, rows = _large(tmp_path, sized)
    pq.write_table(rows, tmp_path / "in")
    with pytest.raises(TableError, match="the disk is full") as caught:
        bake(bundle.path, tmp_path / "in", small_disk / "t", workers=1, segment_s=0)
    assert "free some space" in caught.value.hint
    assert [path.name for path in small_disk.iterdir()] == [".t.baking"]
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    report = bake(bundle.path, tmp_path / "in", small_disk / "t", workers=1)
    assert report.keys == rows.num_rows
    assert report.resumed_rows > 0


def test_a_limit_of_file_sizes_is_a_full_disk(tmp_path: Path) -> None:
    # Given rows whose segments are small enough, and whose table is not
    bundle, rows = _large(tmp_path, False)
    pq.write_table(rows, tmp_path / "in")
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))\n"
        + SCRIPT.replace("segment_s=0.2", "segment_s=0")
    )
    arguments = [
        sys.executable,
        "-c",
        script,
        str(bundle.path),
        str(tmp_path / "in"),
        str(tmp_path / "t"),
        "1",
    ]
    done = subprocess.run(arguments, capture_output=True, check=False)
    assert b"the disk is full" in done.stderr
    assert not (tmp_path / "t").exists()
    report = bake(bundle.path, tmp_path / "in", tmp_path / "t")
    assert (report.keys, report.resumed_rows) == (rows.num_rows, rows.num_rows)


def _large(folder: Path, sized: bool) -> tuple[StoredBundle, pa.Table]:
    """A bundle, with or without texts in its answers, and rows that make a table of more than 1 MB."""
    if not sized:
        return linear_bundle(folder / "linear"), linear_rows(35_000)
    count = 9000
    columns = {"city": [f"{i:0100d}" for i in range(count)], "area": [1.0] * count, "rooms": [1] * count}
    return mixed_bundle(folder / "mixed"), pa.table({**columns, "sold": [True] * count})


@pytest.mark.parametrize("kind", ["parquet", "csv on standard input"])
def test_memory_does_not_grow_with_the_input(kind: str, tmp_path: Path) -> None:
    width = 100 if kind == "parquet" else 4
    bundle = linear_bundle(tmp_path / "linear", width=width)
    script = SCRIPT + "\nprint(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    peaks: list[int] = []
    sizes: list[int] = []
    # Both are more than what is under way at any time.
    for rows in (100_000, 300_000) if kind == "parquet" else (10_000, 60_000):
        table = linear_rows(rows, width=width)
        if kind == "parquet":
            # One row group; without dictionaries, which a reader has to keep.
            pq.write_table(
                table, tmp_path / "in", row_group_size=rows, use_dictionary=False, data_page_size=1 << 16
            )
        else:
            pyarrow.csv.write_csv(table.append_column("note", [["x" * 2000] * rows]), tmp_path / "in")
        name = str(tmp_path / "in") if kind == "parquet" else "-"
        arguments = [sys.executable, "-c", script, str(bundle.path), name, str(tmp_path / "t"), "1"]
        with (tmp_path / "in").open("rb") as file:
            done = subprocess.run(arguments, stdin=file, capture_output=True, check=True)
        peaks.append(int(done.stdout.split()[1]) * 1024)
        sizes.append((tmp_path / "in").stat().st_size)
    assert sizes[1] > sizes[0] + (30 << 20)
    assert peaks[1] < peaks[0] + (sizes[1] - sizes[0]) / 2
