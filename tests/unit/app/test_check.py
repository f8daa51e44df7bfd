"""Checking a bundle on this machine: a good one passes, and each thing that can be wrong is reported, not raised."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from parbake.app.check import check
from parbake.contract.bundle import Goldens, StoredBundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Contract, Library, Step, TensorSpec


def function_bundle(out: Path, text: str, **goldens: list[float]) -> StoredBundle:
    """A bundle of f(x) -> y; ``goldens`` are what it should answer to 1, 2, ..."""
    contract = Contract(
        "f",
        (TensorSpec("x", "FP64"),),
        (TensorSpec("y", "FP64"),),
        (Step("python", "source", "own_f:f"),),
        "p",
        "o",
    )
    expected = np.array(goldens.get("y", [2.0, 4.0]))
    inputs = {"x": np.arange(1.0, len(expected) + 1)}
    return write_bundle(
        out, contract, {"source/own_f.py": text.encode()}, Goldens(inputs, {"y": expected}), capture()
    )


def test_a_good_bundle_is_ok(doubler_bundle: StoredBundle) -> None:
    report = check(doubler_bundle.path)
    assert report.ok
    assert (report.name, report.digest, report.digest_ok) == ("doubler", doubler_bundle.digest, True)
    assert (report.golden_rows, report.differing_rows, report.max_abs_diff) == (2, 0, 0.0)
    assert (report.differences, report.error, report.first_difference) == ((), "", "")


def test_goldens_that_differ_are_counted_and_the_first_is_shown(tmp_path: Path) -> None:
    bundle = function_bundle(tmp_path / "f.bundle", "def f(x): return x * 2", y=[2.0, 5.0, 6.5, 8.0])
    report = check(bundle.path)
    assert not report.ok
    assert report.digest_ok
    assert (report.golden_rows, report.differing_rows, report.max_abs_diff) == (4, 2, 1.0)
    assert report.first_difference == "row 1, output 'y': expected [5.], got [4.]"


def test_an_altered_file_is_reported_with_its_name(doubler_bundle: StoredBundle) -> None:
    (doubler_bundle.path / "goldens.bin").write_bytes(
        b"x" * (doubler_bundle.path / "goldens.bin").stat().st_size
    )
    report = check(doubler_bundle.path)
    assert not report.ok
    assert not report.digest_ok
    assert "goldens.bin has SHA-256" in report.error
    assert "pack again" in report.hint


def test_no_bundle_at_all_is_reported(tmp_path: Path) -> None:
    report = check(tmp_path / "nowhere")
    assert (report.ok, report.digest) == (False, "")
    assert report.error.startswith("no bundle at ")


def test_code_that_cannot_run_is_reported(tmp_path: Path) -> None:
    for name, text, said in [
        ("import", "import no_such_library", "No module named 'no_such_library'"),
        ("raise", "def f(x): raise KeyError('gone')", "KeyError: 'gone'"),
        ("refuse", "def f(x): raise ValueError('never')", "the model refused the row: never"),
        ("silent", "def f(x): return {'z': x}", "the model gave no output 'y'"),
    ]:
        report = check(function_bundle(tmp_path / f"{name}.bundle", text).path)
        assert (report.ok, report.digest_ok, report.golden_rows) == (False, True, None)
        assert said in report.error


def test_a_pickle_is_reported_and_not_opened(tmp_path: Path) -> None:
    contract = Contract(
        "f",
        (TensorSpec("x", "FP64"),),
        (TensorSpec("y", "FP64"),),
        (Step("pickle", "model.pkl", "y=predict"),),
        "p",
        "o",
    )
    goldens = Goldens({"x": np.ones(1)}, {"y": np.ones(1)})
    bundle = write_bundle(tmp_path / "f.bundle", contract, {"model.pkl": b"not even one"}, goldens, capture())
    report = check(bundle.path)
    assert not report.ok
    assert "holds a pickle, which can run any code when it is loaded" in report.error


def test_what_differs_here_is_listed_and_only_what_is_needed_counts(
    tmp_path: Path, doubler_bundle: StoredBundle
) -> None:
    numpy = next(library for library in doubler_bundle.environment.libraries if library.name == "numpy")
    others = tuple(library for library in doubler_bundle.environment.libraries if library.name != "numpy")
    for required, ok in [((), True), (("numpy",), False)]:
        environment = msgspec.structs.replace(
            doubler_bundle.environment,
            libraries=(*others, Library("numpy", "1.0"), Library("long-gone", "3.1")),
            required=required,
        )
        files = {"model.onnx": doubler_bundle.file("model.onnx").read_bytes()}
        bundle = write_bundle(
            tmp_path / f"{ok}.bundle", doubler_bundle.contract, files, doubler_bundle.goldens(), environment
        )
        report = check(bundle.path)
        assert report.ok is report.environment_ok is ok
        found = {(d.name, d.packed, d.here, d.required) for d in report.differences}
        assert found == {
            ("numpy", "1.0", numpy.version, bool(required)), ("long-gone", "3.1", "not installed", False),
        }  # fmt: skip
