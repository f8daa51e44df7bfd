"""`parbake bake` and what `serve`, `inspect` and `reload` do with the table."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from parbake.batch.model import FORMATS
from parbake.cli import bake as module
from parbake.cli.exits import Exit
from parbake.cli.reload import changes_of
from parbake.cli.serve import build
from parbake.contract.bundle import StoredBundle, write_bundle
from parbake.errors import TableForeign
from tests.conftest import Parbake


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four rows, two of them equal."""
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {"left": pa.array([1, 2, 3, 1], pa.float32()), "right": pa.array([0, 0, 0, 0], pa.float32())}
    )
    pyarrow.parquet.write_table(table, path)
    return path


def test_bake_publishes_a_table_that_inspect_knows(
    parbake: Parbake, doubler_bundle: StoredBundle, rows: Path
) -> None:
    done = parbake("bake", doubler_bundle.path, "--input", rows, "--out", "d.table")
    assert (done.returncode, done.stdout) == (0, "")
    first, last = done.stderr.splitlines()
    assert first.startswith("baked 4 rows in ")
    assert last.startswith("d.table: 3 keys, 1 rows were duplicates, ")
    shown = " ".join(parbake("inspect", "d.table").stdout.split())
    assert f"baked by doubler, {doubler_bundle.digest}" in shown
    assert (
        "rows 4 baked, 0 left out as unfit keys 3, 1 rows were duplicates records y FP32; 8 bytes each"
        in shown
    )
    lineage = json.loads(parbake("inspect", "d.table", "--json").stdout)["lineage"]
    assert (lineage["bundle_digest"], lineage["keys"]) == (doubler_bundle.digest, 3)


def test_a_second_bake_of_the_same_rows_has_nothing_to_do(
    parbake: Parbake, doubler_bundle: StoredBundle, rows: Path
) -> None:
    words = ("bake", doubler_bundle.path, "--input", rows, "--out", "d.table")
    parbake(*words)
    again = parbake(*words, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["already"] is True


def test_a_row_that_does_not_fit_ends_the_bake_or_is_left_out(
    parbake: Parbake, doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("left,right\n1,2\n1,much\n")
    words = ("bake", doubler_bundle.path, "--input", "rows.csv", "--out", "d.table")
    refused = parbake(*words)
    assert refused.returncode == Exit.USAGE
    assert "much" in refused.stderr
    assert not (tmp_path / "d.table").exists()
    done = parbake(*words, "--on-bad", "skip")
    assert done.returncode == 0, done.stderr
    assert "1 rows were left out because they do not fit the contract" in done.stderr


def test_a_file_that_is_not_there_is_not_found(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    done = parbake("bake", doubler_bundle.path, "--input", "no.parquet", "--out", "d.table")
    assert done.returncode == Exit.NOT_FOUND
    assert done.stderr == "error: no file at no.parquet\n"


def test_the_formats_shown_are_those_that_are_read() -> None:
    assert module.FORMATS == FORMATS


def test_a_table_finds_the_bundle_that_baked_it(
    parbake: Parbake, doubler_bundle: StoredBundle, rows: Path, tmp_path: Path
) -> None:
    parbake("bake", doubler_bundle.path, "--input", rows, "--out", "d.table")
    other = write_bundle(
        tmp_path / "other.bundle",
        doubler_bundle.contract,
        {"model.onnx": doubler_bundle.file("model.onnx").name.encode()},
        doubler_bundle.goldens(),
        doubler_bundle.environment,
    )
    table = str(tmp_path / "d.table")
    settings = build([other.path, doubler_bundle.path], None, {"table": (table,)})
    assert [deployment.table for deployment in settings.deployments] == ["", table]
    assert build([other.path], None, {"table": (table,)}).deployments[0].table == table

    served = [("a", other.digest), ("b", doubler_bundle.digest)]
    assert [change.name for change in changes_of([], [table], lambda: served)] == ["b"]
    targets = [str(other.path), str(doubler_bundle.path)]
    assert [change.name for change in changes_of(targets, [table], list)] == ["", "", "doubler"]
    with pytest.raises(TableForeign, match="neither named nor served"):
        changes_of([], [table], lambda: served[:1])
    with pytest.raises(TableForeign, match="none of the bundles named"):
        build([other.path, other.path], None, {"table": (table,)})
