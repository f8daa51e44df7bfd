"""`parbake gate` and `parbake matrix` as a person or a script uses them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from parbake.cli.exits import Exit
from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.model import Library
from tests.conftest import Parbake


@pytest.fixture
def foreign(tmp_path: Path, doubler_bundle: StoredBundle) -> StoredBundle:
    """A bundle packed with another major version of onnxruntime, by nobody, whose first golden was altered."""
    lock = doubler_bundle.environment
    libraries = tuple(Library(x.name, "0.9.0") if x.name == "onnxruntime" else x for x in lock.libraries)
    goldens = doubler_bundle.goldens()
    altered = goldens.outputs["y"].copy()
    altered[0, 0] += 1
    return write_bundle(
        tmp_path / "foreign.bundle",
        msgspec.structs.replace(doubler_bundle.contract, owner=""),
        {"model.onnx": doubler_bundle.file("model.onnx").read_bytes()},
        Goldens(goldens.inputs, {"y": altered}),
        msgspec.structs.replace(lock, libraries=libraries),
    )


def test_a_good_bundle_goes_through(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    done = parbake("gate", doubler_bundle.path, "--against", doubler_bundle.path)
    assert (done.returncode, done.stderr) == (Exit.DONE, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:8]] == [
        [name, "passed"]
        for name in ("digest", "metadata", "environment", "schema", "goldens", "latency", "memory", "table")
    ]
    assert lines[-1] == "doubler: may take traffic here"


@pytest.mark.needs("sqlalchemy")
def test_a_mismatch_is_refused_with_the_difference_and_goes_through_when_waived_by_name(
    parbake: Parbake, foreign: StoredBundle
) -> None:
    done = parbake("gate", foreign.path)
    assert done.returncode == Exit.REFUSED
    text = " ".join(done.stdout.split())
    assert "metadata failed no owner" in text
    assert "goldens failed 1 of 2 rows differ" in text
    assert "what expected found note" in text
    assert "onnxruntime 0.9.0 " in text
    assert "BAD exact: it runs the model" in text
    assert "row 0, output y" in text
    assert done.stdout.endswith("doubler: must not take traffic here\n")
    assert "goldens: parbake check BUNDLE says" in done.stderr
    assert "; or --waive goldens --why TEXT\n" in done.stderr

    waive = [word for name in ("metadata", "goldens", "environment") for word in ("--waive", name)]
    some = parbake("gate", foreign.path, *waive[:4], "--why", "a test", "--who", "me")
    assert some.returncode == Exit.REFUSED
    done = parbake("gate", foreign.path, *waive, "--why", "a test", "--who", "me", "--for", "doubler@7")
    assert done.returncode == Exit.DONE
    assert "goldens waived by me, 20" in done.stdout

    history = json.loads(parbake("history", "doubler", "--json").stdout)
    assert [(event["what"], event["version"], event["by"], event["why"]) for event in history] == [
        ("waiver", "7", "me", "a test")
    ] * 3
    shown = json.loads(parbake("inventory", foreign.path, "--offline", "--json").stdout)
    # Beside whatever servers run on this machine.
    (item,) = [item for item in shown["items"] if item["version"] == "7"]
    assert item["owner"] == ""
    assert {waiver["check"] for waiver in item["waivers"]} == {"metadata", "goldens", "environment"}
    assert "Waived" in parbake("inventory", foreign.path, "--offline").stdout


def test_the_report_is_there_for_a_script(parbake: Parbake, foreign: StoredBundle) -> None:
    done = parbake("gate", foreign.path, "--rule", "onnxruntime=any", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == Exit.REFUSED
    assert report["ok"] is False
    found = {check["name"]: check["verdict"] for check in report["checks"]}
    assert [name for name, verdict in found.items() if verdict != "passed"] == ["metadata", "goldens"]


def test_an_altered_file_cannot_be_waived(parbake: Parbake, doubler_bundle: StoredBundle) -> None:
    goldens = doubler_bundle.path / "goldens.bin"
    goldens.write_bytes(goldens.read_bytes()[:-1] + b"\xff")
    done = parbake("gate", doubler_bundle.path)
    assert done.returncode == Exit.REFUSED
    assert "goldens.bin has SHA-256" in " ".join(done.stdout.split())
    assert "--waive" not in done.stderr
    done = parbake("gate", doubler_bundle.path, "--waive", "digest", "--why", "please")
    assert done.returncode == Exit.USAGE
    assert done.stderr.startswith("error: the digest cannot be waived")


def test_waivers_are_refused_without_a_reason_or_for_a_check_there_is_not(
    parbake: Parbake, doubler_bundle: StoredBundle
) -> None:
    for words in (
        ("--waive", "goldens"),
        ("--waive", "golden", "--why", "x"),
        ("--why", "x"),
        ("--rule", "numpy=new"),
        ("--waive", "goldens", "--why", "x", "--for", "doubler"),
    ):
        done = parbake("gate", doubler_bundle.path, *words)
        assert done.returncode == Exit.USAGE
        assert "\nhint: " in done.stderr


@pytest.mark.needs("cryptography")
def test_an_unsigned_bundle_is_not_run_where_signatures_are_asked_for(
    parbake: Parbake, tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    parbake("sign", "--new-key", "key.pem")
    done = parbake("gate", doubler_bundle.path, "--trusted-keys", "key.pem.pub", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["signature"]["verdict"] == "failed"
    assert found["goldens"]["words"] == "not run, as nobody trusted has signed it"
    parbake("sign", doubler_bundle.path, "--key", "key.pem")
    assert parbake("gate", doubler_bundle.path, "--trusted-keys", "key.pem.pub").returncode == Exit.DONE


def test_a_table_of_another_bundle_is_refused(
    parbake: Parbake, tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    (tmp_path / "rows.csv").write_text("left,right\n1,2\n3,4\n")
    assert (
        parbake("bake", doubler_bundle.path, "--input", "rows.csv", "--out", "t.table").returncode
        == Exit.DONE
    )
    good = parbake("gate", doubler_bundle.path, "--table", "t.table")
    assert good.returncode == Exit.DONE
    assert "2 rows, baked by this bundle" in good.stdout
    other = write_bundle(
        tmp_path / "other.bundle",
        msgspec.structs.replace(doubler_bundle.contract, purpose="another"),
        {"model.onnx": doubler_bundle.file("model.onnx").read_bytes()},
        doubler_bundle.goldens(),
        doubler_bundle.environment,
    )
    done = parbake("gate", other.path, "--table", "t.table")
    assert done.returncode == Exit.REFUSED
    assert f"baked by {doubler_bundle.digest[:19]}..., another bundle" in done.stdout
    assert parbake("gate", other.path, "--table", "none.table").returncode == Exit.REFUSED


def test_the_matrix_says_where_a_bundle_runs_and_why_not(
    parbake: Parbake, tmp_path: Path, doubler_bundle: StoredBundle, foreign: StoredBundle
) -> None:
    (tmp_path / "old.txt").write_text("onnxruntime==0.9.0\nnumpy==2.0.0\n")
    done = parbake("matrix", ".", "--environment", "old.txt")
    assert done.returncode == Exit.DONE
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["model", "digest", "here", "old.txt"]
    assert lines[1] == ["doubler", doubler_bundle.digest[7:19], "yes", "NO"]
    assert lines[2] == ["doubler", foreign.digest[7:19], "NO", "yes"]
    alone = parbake("matrix", foreign.path, "--json")
    assert alone.returncode == Exit.REFUSED
    (cell,) = json.loads(alone.stdout)["cells"]
    assert (cell["ok"], cell["broken"][0]["name"]) == (False, "onnxruntime")
