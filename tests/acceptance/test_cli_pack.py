"""`parbake pack` and `parbake check`, as scripts call them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from parbake.cli.exits import Exit
from parbake.contract.bundle import StoredBundle, read_bundle
from tests.conftest import Parbake

WHO = ("--purpose", "doubles numbers", "--owner", "tests@parbake.example")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Twenty rows for the doubler, by input name."""
    path = tmp_path / "x.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32))
    return path


def test_pack_writes_a_bundle_that_inspect_and_check_know(
    parbake: Parbake, doubler_onnx: Path, example: Path, tmp_path: Path
) -> None:
    done = parbake("pack", doubler_onnx, "--name", "doubler", "--example", example, *WHO, "--out", "d.bundle")
    assert (done.returncode, done.stdout) == (0, "")
    digest = read_bundle(tmp_path / "d.bundle").digest
    assert done.stderr.startswith(f"packed d.bundle, {digest[:19]}\nparity: bit-equal to onnx ")
    assert digest in parbake("inspect", "d.bundle").stdout
    checked = parbake("check", "d.bundle")
    assert checked.returncode == 0
    assert [line.split()[:2] for line in checked.stdout.splitlines()[:3]] == [
        ["ok", "digest"], ["ok", "environment"], ["ok", "goldens"],
    ]  # fmt: skip
    assert checked.stdout.endswith("\ndoubler: keeps its promises here\n")


def test_pack_as_json_describes_the_bundle(parbake: Parbake, doubler_onnx: Path, example: Path) -> None:
    done = parbake(
        "pack", doubler_onnx, "--name", "doubler", "--example", example, *WHO, "--out", "d.bundle", "--json"
    )
    assert json.loads(done.stdout) == json.loads(parbake("inspect", "d.bundle", "--json").stdout)


def test_what_the_options_say_is_in_the_contract(
    parbake: Parbake, doubler_onnx: Path, tmp_path: Path
) -> None:
    rows = pa.table({"left": np.arange(9, dtype=np.float32), "right": np.ones(9, dtype=np.float32)})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    done = parbake(
        "pack", doubler_onnx, "--name", "doubler", "--example", "rows.parquet", *WHO, "--out", "d.bundle",
        "--key", "left", "--unit", "x=m", "--unit", "y=cm", "--round", "left=2", "--default", '{"y": [0, 0]}',
        "--deadline-ms", "50", "--freshness-s", "3600", "--rtol", "1e-3", "--allow-nan",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    contract = read_bundle(tmp_path / "d.bundle").contract
    assert contract.inputs[0].columns == ("left", "right")
    assert (contract.inputs[0].unit, contract.outputs[0].unit) == ("m", "cm")
    assert contract.inputs[0].allow_nan
    assert (contract.key.columns, contract.key.rounding) == (("left",), {"left": 2})
    assert contract.default == {"y": [0, 0]}
    assert (contract.deadline_ms, contract.freshness_s) == (50.0, 3600.0)
    assert (contract.tolerance.rtol, contract.tolerance.atol) == (1e-3, 0.0)


def test_a_python_function_of_the_folder_is_packed_with_a_csv_example(
    parbake: Parbake, tmp_path: Path
) -> None:
    (tmp_path / "fare.py").write_text("def fare(km):\n    return 3.0 + 2.0 * km\n")
    (tmp_path / "trips.csv").write_text("km\n1.5\n20.25\n")
    done = parbake(
        "pack", "fare:fare", "--name", "fare", "--example", "trips.csv", *WHO, "--out", "fare.bundle"
    )
    assert done.returncode == 0, done.stderr
    assert read_bundle(tmp_path / "fare.bundle").goldens().outputs["output"].tolist() == [6.0, 43.5]


def test_a_bundle_that_is_there_is_only_replaced_if_that_is_said(
    parbake: Parbake, doubler_onnx: Path, example: Path, doubler_bundle: StoredBundle
) -> None:
    words = (
        "pack",
        doubler_onnx,
        "--name",
        "doubler",
        "--example",
        example,
        *WHO,
        "--out",
        doubler_bundle.path,
    )
    refused = parbake(*words)
    assert refused.returncode == Exit.REFUSED
    assert refused.stderr.startswith(f"error: {doubler_bundle.path} exists\nhint: ")
    assert "--replace" in refused.stderr
    assert read_bundle(doubler_bundle.path).digest == doubler_bundle.digest
    assert parbake(*words, "--replace").returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no.onnx"], Exit.NOT_FOUND, "no model at no.onnx"),
        (["nowhere:f"], Exit.REFUSED, "cannot import nowhere"),
        (["doubler.onnx", "--unit", "m"], Exit.USAGE, "invalid value for '--unit': 'm' is not COLUMN=VALUE"),
        (["doubler.onnx", "--round", "x=two"], Exit.USAGE, "'two' is not a number of decimals"),
        (["doubler.onnx", "--default", "{"], Exit.USAGE, "--default is not JSON"),
        (
            ["doubler.onnx", "--default", "3"],
            Exit.USAGE,
            "--default: expected an object by output name, got 3",
        ),
        (["doubler.onnx", "--rtol", "-1"], Exit.USAGE, "-1.0 is not in the range x>=0"),
        (["doubler.onnx", "--name", "../x"], Exit.REFUSED, "'../x'"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    parbake: Parbake, doubler_onnx: Path, example: Path, words: list[str], code: Exit, message: str
) -> None:
    name = () if "--name" in words else ("--name", "doubler")
    done = parbake("pack", *words, *name, "--example", example, *WHO, "--out", "d.bundle")
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert not (example.parent / "d.bundle").exists()


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("x.npz", None, Exit.NOT_FOUND, "no file at x.npz"),
        ("x.xlsx", b"", Exit.USAGE, "x.xlsx: the example is no .npz, "),
        ("x.npz", b"PK\x03\x04 torn", Exit.USAGE, "x.npz cannot be read: File is not a zip file"),
        ("x.parquet", b"PAR1 torn", Exit.USAGE, "x.parquet cannot be read: "),
        ("x.csv", b"a,b\n1\n", Exit.USAGE, "x.csv cannot be read: CSV parse error"),
        ("x.jsonl", b"{", Exit.USAGE, "x.jsonl cannot be read: "),
        ("x.npy", b"", Exit.USAGE, "x.npy cannot be read: "),
    ],
)
def test_an_example_that_cannot_be_read_is_named(
    parbake: Parbake,
    doubler_onnx: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    code: Exit,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = parbake("pack", doubler_onnx, "--name", "doubler", "--example", name, *WHO, "--out", "d.bundle")
    assert done.returncode == code
    assert f"error: {message}" in done.stderr


def test_pickled_arrays_in_an_example_are_not_loaded(
    parbake: Parbake, doubler_onnx: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", x=np.array(["a", None], dtype=object))
    done = parbake("pack", doubler_onnx, "--name", "doubler", "--example", "x.npz", *WHO, "--out", "d.bundle")
    assert done.returncode == Exit.USAGE
    assert done.stderr.endswith("hint: save strings as numpy strings: array.astype(str)\n")


def test_check_of_an_altered_bundle_says_which_file(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    weights = doubler_bundle.path / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    done = parbake("check", doubler_bundle.path)
    assert done.returncode == Exit.REFUSED
    assert done.stdout.splitlines()[0].split()[:2] == ["BAD", "digest"]
    assert done.stdout.endswith("must not be served here\n")
    assert done.stderr.startswith(f"error: {weights} has SHA-256 ")


def test_check_as_json_has_a_verdict(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    found = json.loads(parbake("check", doubler_bundle.path, "--json").stdout)
    assert found["ok"] is True
    assert (found["name"], found["golden_rows"], found["differing_rows"]) == ("doubler", 2, 0)
