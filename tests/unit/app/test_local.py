"""Bundles in this process: every form of rows, the same bits alone and together, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

import parbake
from parbake.app.local import Bundle, load
from parbake.contract.bundle import Goldens, StoredBundle, read_bundle, write_bundle
from parbake.contract.environment import capture
from parbake.contract.model import Batch, Contract, Environment, Step, TensorSpec
from parbake.errors import (
    BundleAltered,
    BundleTorn,
    EnvironmentDiffers,
    GoldensDiffer,
    InvalidInput,
    RowRejected,
)
from tests import models


def python_bundle(
    out: Path, text: str, *, required: tuple[str, ...] = (), expected: float = 2.0
) -> StoredBundle:
    """A bundle of a function f(x) with one golden: f(1)."""
    contract = Contract(
        "f",
        (TensorSpec("x", "FP64"),),
        (TensorSpec("y", "FP64"),),
        (Step("python", "source", "own_f:f"),),
        "p",
        "o",
    )
    goldens = Goldens({"x": np.array([1.0])}, {"y": np.array([expected])})
    return write_bundle(out, contract, {"source/own_f.py": text.encode()}, goldens, capture(required))


def test_every_form_of_rows_gives_the_same_answer(doubler_bundle: StoredBundle) -> None:
    bundle = load(doubler_bundle.path)
    expected = [[2.0, 4.0], [6.0, 9.0]]
    for rows in (
        np.array([[1, 2], [3, 4.5]]),
        [[1, 2], [3, 4.5]],
        {"x": [[1, 2], [3, 4.5]]},
        {"left": [1, 3], "right": [2, 4.5]},
        [{"left": 1, "right": 2}, {"left": 3, "right": 4.5}],
        pa.table({"right": [2, 4.5], "left": [1, 3]}),
    ):
        answer = bundle.predict(rows)
        assert answer["y"].dtype == np.float32
        assert answer["y"].tolist() == expected
    assert bundle.predict({"left": 1, "right": 2})["y"].tolist() == [[2.0, 4.0]]


def test_a_path_relative_to_the_current_folder_is_a_path(
    doubler_bundle: StoredBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(doubler_bundle.path.parent)
    assert parbake.load("doubler.bundle").predict([[1, 2]])["y"].tolist() == [[2.0, 4.0]]


def test_a_bundle_says_what_it_is(doubler_bundle: StoredBundle) -> None:
    bundle = load(doubler_bundle.path)
    assert bundle.path == doubler_bundle.path
    assert bundle.digest == doubler_bundle.digest
    assert bundle.contract.name == "doubler"
    assert repr(bundle) == f"<Bundle doubler {bundle.digest[:19]} at {bundle.path}>"


def test_no_rows_are_no_answers(doubler_bundle: StoredBundle) -> None:
    answer = load(doubler_bundle.path).predict(np.zeros((0, 2)))
    assert answer["y"].shape == (0, 2)
    assert answer["y"].dtype == np.float32


def test_more_rows_than_one_request_takes_are_taken_in_parts(doubler_bundle: StoredBundle) -> None:
    contract = msgspec.structs.replace(doubler_bundle.contract, batch=Batch(max_rows=7))
    bundle = Bundle(with_contract(doubler_bundle, contract))
    rows = np.arange(40.0).reshape(20, 2)
    assert bundle.predict(rows)["y"].tolist() == (2 * rows).tolist()


def with_contract(stored: StoredBundle, contract: Contract) -> StoredBundle:
    """The same bundle with another contract."""
    return StoredBundle(stored.path, contract, stored.environment, stored.manifest)


def test_bad_rows_are_named_and_do_no_harm(doubler_bundle: StoredBundle) -> None:
    bundle = load(doubler_bundle.path)
    with pytest.raises(InvalidInput, match=r"expected FP32 for 'right', got \"two\" at \$\[1\]\.right"):
        bundle.predict([{"left": 1, "right": 2}, {"left": 1, "right": "two"}])
    with pytest.raises(InvalidInput, match=r"got nan at \$\[0\]\[1\]"):
        bundle.predict([[1.0, float("nan")]])
    assert bundle.predict([[1, 2]])["y"].tolist() == [[2.0, 4.0]]


def test_what_the_model_says_of_a_row_reaches_the_caller(tmp_path: Path) -> None:
    text = "def f(x):\n    if (x < 0).any(): raise ValueError('x is negative')\n    return x * 2"
    bundle = load(python_bundle(tmp_path / "f.bundle", text).path)
    with pytest.raises(RowRejected, match="the model refused the row: x is negative"):
        bundle.predict({"x": -1.0})
    assert bundle.predict({"x": 4.0})["y"].tolist() == [8.0]


def test_answers_have_the_contract_s_datatype(tmp_path: Path) -> None:
    bundle = load(python_bundle(tmp_path / "f.bundle", "def f(x): return (x * 2).astype(int).tolist()").path)
    assert bundle.predict({"x": [1.0, 2.0]})["y"].dtype == np.float64


def test_threads_may_share_a_bundle(tmp_path: Path) -> None:
    text = (
        "import time\nbusy = []\n"
        "def f(x):\n"
        "    busy.append(1)\n    time.sleep(0.002)\n    assert len(busy) == 1\n    busy.pop()\n    return x * 2"
    )
    bundle = load(python_bundle(tmp_path / "f.bundle", text).path)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: bundle.predict({"x": float(i)})["y"].tolist(), range(40)))
    assert answers == [[2.0 * i] for i in range(40)]


def test_an_altered_bundle_is_refused_when_it_is_loaded(doubler_bundle: StoredBundle) -> None:
    model = doubler_bundle.path / "model.onnx"
    model.write_bytes(
        models.linear(2).SerializeToString()[: model.stat().st_size].ljust(model.stat().st_size)
    )
    with pytest.raises(BundleAltered, match=r"model\.onnx has SHA-256"):
        load(doubler_bundle.path)
    with pytest.raises(BundleTorn, match="no bundle at"):
        load(doubler_bundle.path / "nowhere")


def test_goldens_that_this_machine_does_not_reproduce_end_the_first_prediction(tmp_path: Path) -> None:
    bundle = load(python_bundle(tmp_path / "f.bundle", "def f(x): return x * 2", expected=3.0).path)
    for _ in range(2):
        with pytest.raises(
            GoldensDiffer, match="1 of 1 goldens differ; first: row 0, output 'y', expected 3"
        ):
            bundle.predict({"x": 1.0})


def test_code_that_needs_another_version_of_a_library_is_refused_unless_it_is_said(tmp_path: Path) -> None:
    python_bundle(tmp_path / "f.bundle", "def f(x): return x * 2", required=("numpy",))
    stored = read_bundle(tmp_path / "f.bundle")
    libraries = tuple(
        msgspec.structs.replace(library, version="0.1") if library.name == "numpy" else library
        for library in stored.environment.libraries
    )
    environment: Environment = msgspec.structs.replace(stored.environment, libraries=libraries)
    other = write_bundle(
        tmp_path / "old.bundle", stored.contract,
        {"source/own_f.py": stored.file("source/own_f.py").read_bytes()}, stored.goldens(), environment,
    )  # fmt: skip
    with pytest.raises(EnvironmentDiffers, match=r"numpy 0\.1 \(here "):
        load(other.path).predict({"x": 1.0})
    assert load(other.path, allow_mismatch=True).predict({"x": 1.0})["y"].tolist() == [2.0]
    # A graph does not depend on them.
    assert json.loads((other.path / "environment.json").read_text())["required"] == ["numpy"]
