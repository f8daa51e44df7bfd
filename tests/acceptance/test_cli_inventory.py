"""`parbake inventory` as a person or a script uses it, with and without a running server."""

from __future__ import annotations

import csv
import io
import json
import urllib.request
from pathlib import Path

import msgspec
import pytest

from parbake.cli.exits import Exit
from parbake.contract.bundle import StoredBundle, write_bundle
from parbake.testing import serving
from tests.conftest import Parbake


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Servers of this test are found by commands of this test alone."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    return {"XDG_RUNTIME_DIR": str(runtime)}


@pytest.fixture
def second(tmp_path: Path, doubler_bundle: StoredBundle) -> StoredBundle:
    """Another version of the doubler, whose input has another unit and whose owner writes formulas."""
    contract = doubler_bundle.contract
    return write_bundle(
        tmp_path / "store" / "second.bundle",
        msgspec.structs.replace(
            contract,
            inputs=(msgspec.structs.replace(contract.inputs[0], unit="km"),),
            owner='=HYPERLINK("x")\x1b[2J',
            run="run-77",
            training_data="s3://rows/2026",
        ),
        {"model.onnx": doubler_bundle.file("model.onnx").read_bytes()},
        doubler_bundle.goldens(),
        doubler_bundle.environment,
    )


def test_what_runs_and_what_lies_in_a_folder_is_shown(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle, second: StoredBundle
) -> None:
    with serving(doubler_bundle.path, environment=environment) as server:
        row = json.dumps({"left": 1.0, "right": 2.0}).encode()
        with urllib.request.urlopen(f"{server.url}/predict/doubler", row, timeout=30):
            pass
        done = parbake("inventory", "store", "--offline", "--json", env=environment)
        assert done.returncode == Exit.DONE
        found = json.loads(done.stdout)
        running, stored = found["items"]
        assert (running["name"], running["version"], running["state"]) == ("doubler", "1", "running")
        assert running["digest"] == doubler_bundle.digest
        assert running["requests"] == 1
        assert running["last_request"] > 0
        assert running["where"] == server.url
        assert running["machine"]["runtime"].startswith("onnxruntime ")
        assert running["lifetimes"][0]["what"].startswith("python 3.")
        assert (stored["state"], stored["run"], stored["training_data"]) == (
            "stored",
            "run-77",
            "s3://rows/2026",
        )
        assert running["vulnerable"] is stored["vulnerable"] is None
        assert found["advisories"]["known"] is False

        table = parbake("inventory", "--offline", env=environment)
        assert "vulnerabilities are unknown" in table.stderr
        assert table.stdout.endswith("1 version, 1 running, 1 owner\n")

        diff = parbake("inventory", "--diff", "doubler@1", second.path, env=environment)
        assert diff.returncode == Exit.DONE
        text = " ".join(diff.stdout.split())
        assert "input x, unit m km breaks the same number means something else" in text
        assert "run - run-77" in text
        missing = parbake("inventory", "--diff", "doubler@9", second.path, env=environment)
        assert missing.returncode == Exit.NOT_FOUND
        assert "known: doubler@1" in missing.stderr
        # Where no bundle is named, those are meant that run.
        lines = parbake("matrix", "--port", str(server.port), env=environment).stdout.splitlines()
        assert [line.split()[-2:] for line in lines] == [["here", "server"], ["yes", "yes"]]


def test_csv_has_a_line_for_each_version_and_no_formula(
    parbake: Parbake, environment: dict[str, str], second: StoredBundle, tmp_path: Path
) -> None:
    (tmp_path / "store" / "torn.bundle").mkdir()
    (tmp_path / "store" / "torn.bundle" / "manifest.json").write_text("{")
    done = parbake("inventory", "store", "--offline", "--csv", env=environment)
    assert done.returncode == Exit.DONE
    good, torn = csv.DictReader(io.StringIO(done.stdout))
    assert good["owner"].startswith("'=HYPERLINK")
    assert good["inputs"] == "x FP32 2 km"
    assert good["vulnerable"] == "unknown"
    assert "numpy " in good["libraries"]
    assert (torn["state"], torn["name"]) == ("damaged", "torn.bundle")
    assert "is not valid JSON" in torn["problem"]
    shown = parbake("inventory", "store", "--offline", env=environment)
    assert "\x1b" not in shown.stdout
    assert "torn.bundle" in shown.stdout


def test_vulnerabilities_come_from_a_file(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    (tmp_path / "osv").mkdir()
    (tmp_path / "osv" / "1.json").write_text(
        json.dumps(
            {
                "id": "PYSEC-0000-1",
                "aliases": ["CVE-0000-1"],
                "affected": [
                    {
                        "package": {"ecosystem": "PyPI", "name": "numpy"},
                        "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}],
                    }
                ],
            }
        )
    )
    done = parbake("inventory", doubler_bundle.path, "--advisories", "osv", env=environment)
    assert (done.returncode, done.stderr) == (Exit.DONE, "")
    assert "1 of " in done.stdout
    assert "CVE-0000-1" in done.stdout
    wrong = parbake("inventory", doubler_bundle.path, "--advisories", doubler_bundle.path / "goldens.bin")
    assert wrong.returncode == Exit.USAGE


def test_a_service_that_is_not_there_makes_it_unknown_and_not_fine(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle
) -> None:
    done = parbake("inventory", doubler_bundle.path, "--advisories", "http://127.0.0.1:9", env=environment)
    assert done.returncode == Exit.DONE
    assert "unknown" in done.stdout.splitlines()[1]
    assert "vulnerabilities are unknown: http://127.0.0.1:9 does not answer" in done.stderr


def test_nothing_at_all_says_what_to_do(parbake: Parbake, environment: dict[str, str]) -> None:
    done = parbake("inventory", "--offline", env=environment)
    assert (done.returncode, done.stdout) == (Exit.DONE, "0 versions, 0 running, 0 owners\n")
    assert "parbake inventory FOLDER" in done.stderr
    assert parbake("inventory", "nowhere", env=environment).returncode == Exit.NOT_FOUND


def test_a_store_that_cannot_be_read_leaves_releases_unknown(
    parbake: Parbake, environment: dict[str, str], doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    (tmp_path / "torn.db").write_bytes(b"no database at all" * 100)
    done = parbake(
        "inventory",
        doubler_bundle.path,
        "--offline",
        "--store",
        f"sqlite:///{tmp_path / 'torn.db'}",
        env=environment,
    )
    assert done.returncode == Exit.DONE
    assert "releases and waivers are unknown" in done.stderr
