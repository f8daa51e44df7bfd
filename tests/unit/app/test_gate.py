"""The gate with real bundles and real processes: each thing that can be wrong is reported, and nothing is raised."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from parbake.app.gate import Asked, run_gate
from parbake.app.inventory import diff
from parbake.contract.bundle import Goldens, StoredBundle, read_bundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Library, Step, TensorSpec
from parbake.errors import BundleTorn
from parbake.release.gate import CHECKS, GateReport, make_waiver


def function_bundle(out: Path, text: str, y: list[float], **parts: Any) -> StoredBundle:
    """A bundle of f(x) -> y that should answer ``y`` to 1, 2, ..."""
    contract = Contract(
        "f",
        (TensorSpec("x", "FP64"),),
        (TensorSpec("y", "FP64"),),
        (Step("python", "source", "own_f:f"),),
        "p",
        "o",
    )
    contract = msgspec.structs.replace(contract, **parts)
    inputs = {"x": np.arange(1.0, len(y) + 1)}
    goldens = Goldens(inputs, {"y": np.array(y)})
    return write_bundle(out, contract, {"source/own_f.py": text.encode()}, goldens, capture(), replace=True)


def verdicts(report: GateReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks if check.verdict != "passed"}


def test_a_good_bundle_passes_and_is_measured(doubler_bundle: StoredBundle) -> None:
    report = run_gate(Asked(doubler_bundle.path, deadline_ms=10_000, max_bytes=10**12))
    assert report.ok
    assert (report.name, report.digest) == ("doubler", doubler_bundle.digest)
    assert [check.name for check in report.checks] == [name for name in CHECKS if name != "signature"]
    assert verdicts(report) == {}
    latency, memory = report.check("latency"), report.check("memory")
    assert latency is not None
    assert memory is not None
    assert latency.evidence[1].expected == "10000 ms"
    assert float(memory.evidence[0].found.split()[0].replace(",", "")) > 10


def test_limits_that_are_too_narrow_fail_by_name(doubler_bundle: StoredBundle) -> None:
    report = run_gate(Asked(doubler_bundle.path, deadline_ms=1e-6, max_bytes=1000, needs_table=True))
    assert verdicts(report) == {"latency": "failed", "memory": "failed", "table": "failed"}
    waivers = tuple(make_waiver(name, "me", "a test") for name in ("latency", "memory", "table"))
    report = run_gate(
        Asked(doubler_bundle.path, deadline_ms=1e-6, max_bytes=1000, needs_table=True, waivers=waivers)
    )
    assert report.ok
    assert verdicts(report) == {"latency": "waived", "memory": "waived", "table": "waived"}


def test_goldens_that_differ_are_all_counted_and_shown(tmp_path: Path) -> None:
    bundle = function_bundle(tmp_path / "f.bundle", "def f(x): return x * 2", [2.0, 5.0, 6.5, 8.0])
    report = run_gate(Asked(bundle.path))
    assert verdicts(report) == {"goldens": "failed"}
    found = report.check("goldens")
    assert found is not None
    assert found.words == "2 of 4 rows differ, by up to 1"
    assert [(one.what, one.expected, one.found) for one in found.evidence] == [
        ("row 1, output y", "5.", "4."),
        ("row 2, output y", "6.5", "6."),
    ]
    assert run_gate(Asked(bundle.path, waivers=(make_waiver("goldens", "me", "known"),))).ok


def test_another_major_version_of_the_runtime_is_refused_with_the_difference(
    tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    lock = doubler_bundle.environment
    libraries = tuple(Library(x.name, "0.9.0") if x.name == "onnxruntime" else x for x in lock.libraries)
    other = write_bundle(
        tmp_path / "other.bundle", doubler_bundle.contract,
        {"model.onnx": doubler_bundle.file("model.onnx").read_bytes()}, doubler_bundle.goldens(),
        msgspec.structs.replace(lock, libraries=libraries),
    )  # fmt: skip
    report = run_gate(Asked(other.path))
    assert verdicts(report) == {"environment": "failed"}
    found = report.check("environment")
    assert found is not None
    assert found.evidence[0].what == "onnxruntime"
    assert (found.evidence[0].expected, found.evidence[0].ok) == ("0.9.0", False)
    assert run_gate(Asked(other.path, rules={"onnxruntime": "any"})).ok


def test_a_bundle_without_owner_is_refused(tmp_path: Path) -> None:
    bundle = function_bundle(tmp_path / "f.bundle", "def f(x): return x * 2", [2.0, 4.0], owner="")
    assert verdicts(run_gate(Asked(bundle.path))) == {"metadata": "failed"}


def test_a_breaking_change_needs_to_be_allowed(tmp_path: Path) -> None:
    text = "def f(x): return x * 2"
    old = function_bundle(tmp_path / "old.bundle", text, [2.0, 4.0])
    new = function_bundle(
        tmp_path / "new.bundle", text, [2.0, 4.0], outputs=(TensorSpec("y", "FP64", unit="s"),),
        inputs=(TensorSpec("x", "FP64", allow_nan=True),),
    )  # fmt: skip
    assert run_gate(Asked(new.path, against=old.path)).ok
    report = run_gate(Asked(old.path, against=new.path))
    assert verdicts(report) == {"schema": "failed"}
    assert report.against == new.digest
    assert run_gate(Asked(old.path, against=new.path, breaking=True)).ok


def test_the_model_runs_in_another_process_without_a_network(tmp_path: Path) -> None:
    text = (
        "import os, socket\n"
        "def f(x):\n"
        "    try:\n"
        "        socket.create_connection(('127.0.0.1', int(open('PORT').read())), 1)\n"
        "    except OSError:\n"
        f"        return x * (2 if os.getpid() != {os.getpid()} else 7)\n"
        "    return x * 9\n"
    )
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = tmp_path / "port"
        port.write_text(str(server.getsockname()[1]))
        bundle = function_bundle(tmp_path / "f.bundle", text.replace("PORT", str(port)), [2.0, 4.0])
        assert verdicts(run_gate(Asked(bundle.path))) == {}


@pytest.mark.parametrize(
    "text",
    [
        "import os; os._exit(3)",
        "raise RuntimeError('no')",
        "def f(x): raise KeyError('no')",
        "def f(x): return 'text'",
        "def f(x): return x[:-1]",
        "import os\ndef f(x): os.kill(os.getpid(), 9)",
        "def f(x): raise SystemExit(0)",
        "def f(:",
    ],
)
def test_hostile_code_fails_its_checks_and_nothing_else(tmp_path: Path, text: str) -> None:
    bundle = function_bundle(tmp_path / "f.bundle", text, [2.0, 4.0])
    report = run_gate(Asked(bundle.path))
    assert verdicts(report) == {"goldens": "failed", "latency": "unknown", "memory": "unknown"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("while True: pass", "the model was not loaded within 2 s"),
        (
            "import time\nn = []\ndef f(x):\n    n.append(1)\n    time.sleep(3600 * (len(n) > 5))\n    return x * 2",
            "",
        ),
    ],
)
def test_a_model_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setattr("parbake.app.gate._LOAD_S", 2.0)
    monkeypatch.setattr("parbake.app.gate._ANSWER_S", 2.0)
    report = run_gate(Asked(function_bundle(tmp_path / "f.bundle", text, [2.0, 4.0]).path))
    found = report.check("goldens")
    assert found is not None
    assert found.verdict == "failed"
    assert words in found.words


def test_a_bundle_that_cannot_be_read_reaches_no_other_check(
    doubler_bundle: StoredBundle, tmp_path: Path
) -> None:
    goldens = doubler_bundle.path / "goldens.bin"
    goldens.write_bytes(goldens.read_bytes()[:-1] + b"\xff")
    report = run_gate(Asked(doubler_bundle.path))
    assert not report.ok
    assert verdicts(report)["digest"] == "failed"
    assert set(verdicts(report).values()) == {"failed", "unknown"}
    assert not run_gate(Asked(tmp_path / "nowhere")).ok
    (doubler_bundle.path / "manifest.json").write_text("[" * 10_000)
    assert not run_gate(Asked(doubler_bundle.path)).ok


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": [{"name": "x", "datatype": "INT64"}]},
        {"inputs": [{"name": "x", "datatype": "FP64", "shape": [3]}]},
        {"outputs": [{"name": "y", "datatype": "BYTES"}]},
        {"outputs": [{"name": "y", "datatype": "FP64", "shape": [-1]}]},
        {"steps": [{"kind": "python", "path": "../../etc", "entry": "own_f:f"}]},
        {"steps": [{"kind": "onnx", "path": "source/own_f.py"}]},
        {"steps": []},
        {"inputs": []},
        {"outputs": []},
        {"tolerance": {"rtol": -1.0, "atol": 1e308}},
        {"batch": {"dimension": "none", "multiple_of": 0, "max_rows": -5}},
        {"key": {"columns": ["nowhere"]}},
    ],
)
def test_a_contract_that_lies_fails_and_does_not_crash(tmp_path: Path, change: dict[str, Any]) -> None:
    sound = function_bundle(tmp_path / "sound.bundle", "def f(x): return x", [1.0, 2.0])
    bundle = function_bundle(tmp_path / "f.bundle", "def f(x): return x", [1.0, 2.0])
    reseal(bundle, lambda contract: contract.update(change))
    report = run_gate(Asked(bundle.path, against=sound.path))
    assert [check.verdict for check in report.checks if check.name == "digest"] == ["passed"]
    assert run_gate(Asked(sound.path, against=bundle.path)).name == "f"
    with suppress(BundleTorn):
        assert not diff(sound, read_bundle(bundle.path)).same


def test_goldens_that_are_not_those_of_the_contract_are_reported(tmp_path: Path) -> None:
    bundle = function_bundle(tmp_path / "f.bundle", "def f(x): return x", [1.0, 2.0])
    reseal(bundle, lambda contract: contract["inputs"][0].update(name="z"))
    found = run_gate(Asked(bundle.path)).check("goldens")
    assert found is not None
    assert (found.verdict, found.words) == ("failed", "the goldens have no 'z' as the contract says it")


def reseal(bundle: StoredBundle, change: Any) -> None:
    """Change the contract of a bundle on disk, and its manifest with it, as somebody hostile would."""
    import hashlib

    from parbake.contract.bundle import digest_of
    from parbake.contract.model import FileEntry

    contract = json.loads((bundle.path / "contract.json").read_bytes())
    change(contract)
    raw = json.dumps(contract).encode()
    (bundle.path / "contract.json").write_bytes(raw)
    files = tuple(
        FileEntry(x.path, len(raw), hashlib.sha256(raw).hexdigest()) if x.path == "contract.json" else x
        for x in bundle.manifest.files
    )
    manifest = msgspec.structs.replace(bundle.manifest, files=files, digest=digest_of(files))
    (bundle.path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
