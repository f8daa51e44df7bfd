"""Baking from every format gives the table that the session would, and bad rows are named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parbake.app.bake import BakeReport, bake
from parbake.contract.bundle import StoredBundle
from parbake.contract.key import Keys
from parbake.contract.model import Key, TensorSpec
from parbake.contract.rounding import round_inputs
from parbake.contract.tensors import Tensors
from parbake.errors import (
    EnvironmentDiffers,
    GoldensDiffer,
    InputFileError,
    ModelFailed,
    NotAllowed,
    SettingsError,
    TableError,
)
from parbake.tables.lmdb import open_table, read_lineage
from tests.unit.batch.bundles import (
    expected,
    linear_bundle,
    linear_rows,
    mixed_bundle,
    python_bundle,
    summing_bundle,
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that nobody else writes to."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


X = (TensorSpec("x", "FP32", (2,), columns=("a", "b")),)
Y = (TensorSpec("y", "FP32", ()),)
GOLDEN = {"x": np.array([[1, 2], [3, 4]], np.float32)}


def _records(table: Path, keys: list[bytes]) -> list[bytes | None]:
    opened = open_table(table)
    try:
        return [opened.get(key) for key in keys]
    finally:
        opened.close()


def _holds(table: Path, entries: dict[bytes, bytes]) -> None:
    """The table has these entries and no others."""
    assert read_lineage(table).keys == len(entries)
    assert _records(table, list(entries)) == list(entries.values())


def _stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def _file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def _jsonl(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


WRITERS: dict[str, Callable[[pa.Table, Path], object]] = {
    "parquet": pq.write_table,
    "csv": pyarrow.csv.write_csv,
    "arrow file": _file,
    "arrow stream": _stream,
    "jsonl": _jsonl,
}

MIXED = {
    "city": np.array([["Ulm"], ['"Köln", am\nRhein'], [""], ["Ulm"]], dtype=object),
    "area": np.array([[0.1], [1e-30], [16777217.0], [0.1]], dtype=np.float32),
    "rooms": np.array([[3], [-(2**63)], [2**63 - 1], [3]], dtype=np.int64),
    "sold": np.array([[True], [False], [False], [True]]),
}
MIXED_TABLE = pa.table(
    {
        "ignored": ["x"] * 4,
        "city": MIXED["city"][:, 0].tolist(),
        "area": pa.array([0.1, 1e-30, 16777217.0, 0.1], pa.float64()),
        "rooms": MIXED["rooms"][:, 0],
        "sold": MIXED["sold"][:, 0],
    }
)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("standard", [False, True], ids=["file", "standard input"])
def test_the_same_rows_give_the_same_table_in_every_format(kind: str, standard: bool, place: Path) -> None:
    bundle = mixed_bundle(place / "mixed")
    WRITERS[kind](MIXED_TABLE, place / "in")
    table = place / "t"
    if standard:
        script = "import sys; from parbake.app.bake import bake; bake(sys.argv[1], '-', sys.argv[2])"
        with (place / "in").open("rb") as rows:
            arguments = [sys.executable, "-c", script, str(bundle.path), str(table)]
            subprocess.run(arguments, stdin=rows, check=True, timeout=60)
    else:
        report = bake(bundle.path, place / "in", table)
        assert (report.rows, report.keys, report.duplicates, report.skipped) == (4, 3, 1, 0)
        assert report.ignored_columns == ("ignored",)
    _holds(table, expected(bundle, MIXED))
    lineage = read_lineage(table)
    assert lineage.bundle_digest == bundle.digest
    assert lineage.input_format == kind.split(maxsplit=1)[0]
    assert lineage.input == ("-" if standard else str(place / "in"))
    b2sum = ["b2sum", "-l", "256", str(place / "in")]
    digest = subprocess.run(b2sum, capture_output=True, text=True, check=True).stdout
    assert lineage.input_digest == "blake2b:" + digest.split()[0]
    assert lineage.input_bytes == (place / "in").stat().st_size
    assert sorted(path.name for path in place.iterdir()) == ["in", "mixed", "mixed.draft", "t"]


@settings(max_examples=12)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=40),
    st.sampled_from([Key(), Key(("c1",)), Key(("c2", "c0"), {"c0": 1}), Key(rounding={"x": 2})]),
    st.sampled_from(["parquet", "jsonl"]),
)
def test_a_table_holds_what_the_session_answers_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], key: Key, kind: str
) -> None:
    # Given rows of which no two have the same key and different inputs
    folder = tmp_path_factory.mktemp("bake")
    bundle = linear_bundle(folder / "linear", key=key)
    values = np.array(rows, np.float32)
    rounded = round_inputs(bundle.contract, {"x": values})["x"]
    keys = Keys(bundle.contract)
    names = [keys.of([rounded[i : i + 1].tobytes()], 1)[0] for i in range(len(values))]
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    chosen = sorted(i for i in range(len(values)) if (rounded[i] == rounded[first[names[i]]]).all())
    table = pa.table({f"c{at}": values[chosen][:, at] for at in range(4)})
    # When they are baked
    WRITERS[kind](table, folder / "in")
    report = bake(bundle.path, folder / "in", folder / "t")
    # Then the table has the session's answers to them, and nothing else
    assert report.rows == len(chosen)
    _holds(folder / "t", expected(bundle, {"x": rounded[chosen]}))
    unknown = keys.of([(rounded[:1] + np.float32(1e7)).tobytes()], 1)
    assert _records(folder / "t", unknown) == [None]


def test_rows_of_different_sizes_are_baked_too(tmp_path: Path) -> None:
    bundle = summing_bundle(tmp_path / "sum")
    lists = [[1.0], [1.0, 2.0], [3.0, 4.0], [], [0.5] * 7]
    entries: dict[bytes, bytes] = {}
    for values in lists:
        entries |= expected(bundle, {"x": np.array([values], np.float32)})
    for kind in ("parquet", "arrow stream", "jsonl"):
        WRITERS[kind](pa.table({"x": pa.array(lists, pa.list_(pa.float64()))}), tmp_path / "in")
        bake(bundle.path, tmp_path / "in", tmp_path / "t", replace=True)
        _holds(tmp_path / "t", entries)


def test_several_processes_bake_the_same_table_as_one(tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear")
    rows = linear_rows(60_000)
    for kind in ("parquet", "csv", "arrow file"):
        WRITERS[kind](rows, tmp_path / f"in.{kind}")
    one = bake(bundle.path, tmp_path / "in.parquet", tmp_path / "one", workers=1)
    assert one.workers == 1
    data = (tmp_path / "one" / "data.mdb").read_bytes()
    for kind in ("parquet", "csv", "arrow file"):
        seen: list[tuple[int, int | None]] = []
        many = bake(
            bundle.path,
            tmp_path / f"in.{kind}",
            tmp_path / "many",
            workers=3,
            replace=True,
            progress=lambda done, total, seen=seen: seen.append((done, total)),  # type: ignore[misc]  # bound now
        )
        assert (many.rows, many.keys) == (60_000, 60_000)
        assert (tmp_path / "many" / "data.mdb").read_bytes() == data
        assert seen[-1] == (60_000, 60_000 if kind == "parquet" else None)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_few_rows_of_a_slow_model_get_help(tmp_path: Path) -> None:
    # Given a model that takes its time as long as nobody helps
    source = (
        "import os, sys, time\ndef predict(x):\n"
        f"    flag = {str(tmp_path / 'flag')!r}\n"
        "    if sys.argv[0].endswith('worker.py') and len(x) > 2:\n        open(flag, 'w').close()\n"
        "    time.sleep(0 if os.path.exists(flag) else 0.02 * len(x))\n    return x.sum(axis=1)\n"
    )
    bundle = python_bundle(tmp_path / "slow", source, X, Y, GOLDEN)
    pq.write_table(linear_rows(1500, width=2).rename_columns(["a", "b"]), tmp_path / "in")
    # Then another process comes to help
    report = bake(bundle.path, tmp_path / "in", tmp_path / "t", workers=2)
    assert (report.rows, report.workers) == (1500, 2)


def test_a_model_that_does_not_reproduce_its_goldens_here_is_not_baked(tmp_path: Path) -> None:
    source = "import os\ndef predict(x):\n    return x.sum(axis=1) + os.path.exists('FLAG')\n"
    source = source.replace("FLAG", str(tmp_path / "flag"))
    bundle = python_bundle(tmp_path / "m", source, X, Y, GOLDEN)
    (tmp_path / "in").write_text("a,b\n1,2\n")
    (tmp_path / "flag").touch()
    with pytest.raises(GoldensDiffer):
        bake(bundle.path, tmp_path / "in", tmp_path / "t")


BAD = "a,b\n1,2\n3,NaN\n5,6\n7,x\n9,1e300\n\n,4\n11,12,13\n13,14\n"


def test_the_first_bad_row_is_named_and_nothing_is_published(place: Path) -> None:
    bundle = python_bundle(place / "m", "def predict(x):\n    return x.sum(axis=1)\n", X, Y, GOLDEN)
    (place / "in.csv").write_text("a,b\n1,2\n3,NaN\n5,x\n")
    with pytest.raises(InputFileError) as caught:
        bake(bundle.path, place / "in.csv", place / "t")
    assert caught.value.message == "NaN, where the contract wants a number"
    assert caught.value.path == f"{place}/in.csv, line 3, column 'b'"
    assert "--on-bad skip" in caught.value.hint
    assert sorted(path.name for path in place.iterdir()) == ["in.csv", "m", "m.draft"]


def test_bad_rows_are_left_out_counted_and_listed_when_asked(tmp_path: Path) -> None:
    bundle = python_bundle(tmp_path / "m", "def predict(x):\n    return x.sum(axis=1)\n", X, Y, GOLDEN)
    (tmp_path / "in.csv").write_text(BAD)
    report = bake(bundle.path, tmp_path / "in.csv", tmp_path / "t", on_bad="skip")
    assert (report.rows, report.keys, report.skipped) == (3, 3, 5)
    assert [(bad.number, bad.reason) for bad in report.skipped_rows] == [
        (3, "NaN, where the contract wants a number"),
        (5, "'x' is no FP32"),
        (6, "1e+300 is too large for FP32"),
        (8, "missing, where the contract wants FP32"),
        (9, "3 columns, the header has 2"),
    ]
    good = {"x": np.array([[1, 2], [5, 6], [13, 14]], np.float32)}
    _holds(tmp_path / "t", expected(bundle, good))
    assert read_lineage(tmp_path / "t").skipped == 5


def test_a_row_that_the_model_refuses_is_a_bad_row_and_nan_is_an_answer(tmp_path: Path) -> None:
    source = (
        "import numpy as np\ndef predict(x):\n    if (x < 0).any():\n        raise ValueError('negative')\n"
        "    return np.where(x[:, 0] == 13, np.nan, x.sum(axis=1))\n"
    )
    bundle = python_bundle(tmp_path / "m", source, X, Y, GOLDEN)
    values = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    values[[5, 700]] *= -1
    values[42, 0] = 13
    pq.write_table(pa.table({"a": values[:, 0], "b": values[:, 1]}), tmp_path / "in")
    with pytest.raises(InputFileError, match="negative") as caught:
        bake(bundle.path, tmp_path / "in", tmp_path / "t")
    assert caught.value.path == f"{tmp_path}/in, row 6"
    report = bake(bundle.path, tmp_path / "in", tmp_path / "t", on_bad="skip")
    assert [bad.number for bad in report.skipped_rows] == [6, 701]
    assert report.rows == 998
    nan = expected(bundle, {"x": values[42:43]})
    assert _records(tmp_path / "t", list(nan)) == list(nan.values()) == [np.float32(math.nan).tobytes()]


def test_an_error_of_the_model_itself_ends_the_bake(tmp_path: Path) -> None:
    source = "def predict(x):\n    if len(x) > 2: return 1 / 0\n    return x.sum(axis=1)\n"
    bundle = python_bundle(tmp_path / "m", source, X, Y, GOLDEN)
    (tmp_path / "in").write_text("a,b\n" + "1,2\n" * 5)
    with pytest.raises(ModelFailed, match="ZeroDivisionError"):
        bake(bundle.path, tmp_path / "in", tmp_path / "t", on_bad="skip")


def test_what_a_model_prints_does_not_get_into_the_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "def predict(x):\n    print('look')\n    return x.sum(axis=1)\n"
    bundle = python_bundle(tmp_path / "m", source, X, Y, GOLDEN)
    pq.write_table(linear_rows(30_000, width=2).rename_columns(["a", "b"]), tmp_path / "in")
    capfd.readouterr()
    bake(bundle.path, tmp_path / "in", tmp_path / "t", workers=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert "look" in err


def test_rows_of_one_entity_with_different_answers_are_named(tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear", key=Key(("c0",)))
    (tmp_path / "in").write_text("c0,c1,c2,c3\n1,2,3,4\n2,2,3,4\n1,2,3,4\n2,2,3,5\n")
    with pytest.raises(InputFileError, match="lines 3 and 5 have the same key and different predictions"):
        bake(bundle.path, tmp_path / "in", tmp_path / "t")
    (tmp_path / "in").write_text("c0,c1,c2,c3\n1,2,3,4\n2,2,3,4\n1,2,3,4\n")
    report = bake(bundle.path, tmp_path / "in", tmp_path / "t")
    assert (report.rows, report.keys, report.duplicates) == (3, 2, 1)


INPUTS: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "is empty", "at least one row"),
    "header only": (b"c0,c1,c2,c3\n", "has no rows to bake", ""),
    "column missing": (b"c0,c1,c2\n1,2,3\n", "column 'c3' is missing", "the file has c0, c1, c2"),
    "gzip": (b"\x1f\x8b\x08\x00", "is gzip", "zcat"),
    "JSON array": (b'[{"c0": 1}]', "is one JSON array", "one object per line"),
    "UTF-16": ("c0,c1".encode("utf-16"), "is UTF-16", "UTF-8"),
    "binary": (b"\x00\x01\x02\x03", "is neither Parquet, Arrow, CSV nor JSON lines", "starts with"),
    "torn Parquet": (b"PAR1" + b"x" * 100, "cannot be read as Parquet", "complete"),
    "torn Arrow": (b"\xff\xff\xff\xff\x10\x00", "cannot be read as Arrow IPC", "complete"),
}


@pytest.mark.parametrize("what", INPUTS)
def test_an_input_that_cannot_be_read_is_refused_with_what_to_do(what: str, tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear")
    data, words, hint = INPUTS[what]
    (tmp_path / "in").write_bytes(data)
    with pytest.raises(InputFileError) as caught:
        bake(bundle.path, tmp_path / "in", tmp_path / "t")
    assert words in caught.value.message
    assert str(tmp_path / "in") in caught.value.path
    assert hint in caught.value.hint
    assert not (tmp_path / "t").exists()


def test_what_is_no_file_or_no_format_or_no_number_of_processes_is_refused(tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear")
    for name in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputFileError, match="cannot be read"):
            bake(bundle.path, name, tmp_path / "t")
    (tmp_path / "in").write_text("c0,c1,c2,c3\n1,2,3,4\n")
    with pytest.raises(InputFileError, match="format 'xls' is not known"):
        bake(bundle.path, tmp_path / "in", tmp_path / "t", format="xls")  # type: ignore[arg-type]  # not a format
    with pytest.raises(SettingsError):
        bake(bundle.path, tmp_path / "in", tmp_path / "t", workers=-1)


def test_a_bake_that_is_done_already_is_not_done_again(place: Path) -> None:
    bundle = linear_bundle(place / "linear")
    pq.write_table(linear_rows(100), place / "in")
    first = bake(bundle.path, place / "in", place / "t")
    again = bake(bundle.path, place / "in", place / "t")
    assert (first.already, again.already) == (False, True)
    assert (again.rows, again.keys, again.bytes, again.input_digest) == (
        100,
        100,
        first.bytes,
        first.input_digest,
    )
    pq.write_table(linear_rows(100, seed=1), place / "in")
    with pytest.raises(TableError, match="exists"):
        bake(bundle.path, place / "in", place / "t")
    assert bake(bundle.path, place / "in", place / "t", replace=True).keys == 100
    assert sorted(path.name for path in place.iterdir()) == ["in", "linear", "linear.draft", "t"]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_named_pipe_is_read_like_the_standard_input(kind: str, tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear")
    rows = linear_rows(100)
    WRITERS[kind](rows, tmp_path / "in")
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["dd", f"if={tmp_path}/in", f"of={tmp_path}/pipe"], stderr=subprocess.DEVNULL):
        assert bake(bundle.path, tmp_path / "pipe", tmp_path / "t").keys == 100
    bake(bundle.path, tmp_path / "in", tmp_path / "u")
    assert read_lineage(tmp_path / "t").input_digest == read_lineage(tmp_path / "u").input_digest


def test_a_folder_that_is_no_table_is_never_replaced(tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear")
    (tmp_path / "in").write_text("c0,c1,c2,c3\n1,2,3,4\n")
    with pytest.raises(TableError, match="not a prediction table"):
        bake(bundle.path, tmp_path / "in", bundle.path, replace=True)
    with pytest.raises(TableError, match="not a prediction table"):
        bake(bundle.path, tmp_path / "in", tmp_path / "in", replace=True)


def test_a_table_may_be_published_through_a_link(tmp_path: Path) -> None:
    bundle = linear_bundle(tmp_path / "linear")
    (tmp_path / "in").write_text("c0,c1,c2,c3\n1,2,3,4\n")
    bake(bundle.path, tmp_path / "in", tmp_path / "deep" / "t1")
    (tmp_path / "current").symlink_to(tmp_path / "deep" / "t1")
    (tmp_path / "in").write_text("c0,c1,c2,c3\n1,2,3,4\n2,2,3,4\n")
    report = bake(bundle.path, tmp_path / "in", tmp_path / "current", replace=True)
    assert report.table == str(tmp_path / "deep" / "t1")
    assert read_lineage(tmp_path / "current").keys == 2


def test_a_bundle_with_a_pickle_or_other_libraries_is_refused_as_the_server_does(tmp_path: Path) -> None:
    from msgspec.structs import replace

    from parbake.contract.bundle import write_bundle
    from parbake.contract.model import Library, Step

    bundle = python_bundle(tmp_path / "m", "def predict(x):\n    return x.sum(axis=1)\n", X, Y, GOLDEN)
    (tmp_path / "in").write_text("a,b\n1,2\n")

    def variant(name: str, **changes: Any) -> StoredBundle:
        files = {"source/model.py": (bundle.path / "source" / "model.py").read_bytes(), "p.joblib": b"x"}
        environment = replace(bundle.environment, **changes.pop("environment", {}))
        contract = replace(bundle.contract, **changes)
        return write_bundle(tmp_path / name, contract, files, bundle.goldens(), environment)

    pickled = variant("pickled", steps=(Step("pickle", "p.joblib", "y=predict"),))
    with pytest.raises(NotAllowed, match="pickle"):
        bake(pickled.path, tmp_path / "in", tmp_path / "t")
    other = variant("other", environment={"libraries": (Library("numpy", "0.1"),), "required": ("numpy",)})
    with pytest.raises(EnvironmentDiffers, match=r"numpy 0\.1"):
        bake(other.path, tmp_path / "in", tmp_path / "t")
    assert bake(other.path, tmp_path / "in", tmp_path / "t", allow_mismatch=True).keys == 1


def test_missing_values_are_baked_where_the_contract_allows_them(tmp_path: Path) -> None:
    source = "import numpy as np\ndef predict(x):\n    return np.nansum(x, axis=1)\n"
    inputs = (TensorSpec("x", "FP32", (2,), columns=("a", "b"), allow_nan=True),)
    bundle = python_bundle(tmp_path / "m", source, inputs, Y, GOLDEN)
    rows: Tensors = {"x": np.array([[1, math.nan], [math.nan, math.nan]], np.float32)}
    tables = {
        "parquet": pa.table({"a": [1.0, None], "b": pa.array([math.nan, None])}),
        "csv": pa.table({"a": ["1", ""], "b": ["nan", ""]}),
        "jsonl": pa.table({"a": [1.0, None], "b": pa.array([None, None], pa.float64())}),
    }
    for kind, table in tables.items():
        WRITERS[kind](table, tmp_path / "in")
        report: BakeReport = bake(bundle.path, tmp_path / "in", tmp_path / "t", replace=True)
        assert report.rows == 2
        _holds(tmp_path / "t", expected(bundle, rows))
