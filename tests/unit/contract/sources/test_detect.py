"""Telling what a model is: by its type, by its file, without importing what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from parbake.contract.sources.detect import framework_of, load_model, source_of
from parbake.errors import NotAllowed, NotConvertible, PackRefused
from tests import models

X = np.random.default_rng(0).normal(size=(40, 4))


def test_a_framework_is_known_by_its_classes() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    lightgbm = pytest.importorskip("lightgbm")
    xgboost = pytest.importorskip("xgboost")
    # These two inherit from scikit-learn's classes, too.
    assert framework_of(lightgbm.LGBMClassifier()) == "lightgbm"
    assert framework_of(xgboost.XGBRegressor()) == "xgboost"
    assert framework_of(sklearn.LinearRegression()) == "sklearn"
    assert framework_of(models.linear(4)) == "onnx"
    assert framework_of(np.sqrt) is None


@pytest.mark.needs("torch")
def test_a_module_of_one_s_own_is_torch() -> None:
    torch: Any = pytest.importorskip("torch")

    class Own(torch.nn.Sequential):  # type: ignore[misc]  # torch is optional, so Any
        pass

    assert framework_of(Own()) == "torch"


def test_no_framework_is_imported_to_tell() -> None:
    code = (
        "import sys\n"
        "from parbake.contract.sources.detect import source_of\n"
        "try: source_of(object(), None)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(*sorted({'torch', 'sklearn', 'lightgbm', 'xgboost', 'onnxruntime', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "NotConvertible\n\n"


def test_what_nobody_knows_is_refused_by_its_type() -> None:
    with pytest.raises(NotConvertible, match=r"cannot pack a decimal\.Decimal"):
        source_of(__import__("decimal").Decimal(1), X)


def test_a_path_to_an_onnx_file_is_that_model(tmp_path: Path) -> None:
    onnx.save(models.linear(4), tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert source_of(path, X).framework == "onnx"


def test_a_file_of_lightgbm_or_xgboost_is_that_model(tmp_path: Path) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    xgboost = pytest.importorskip("xgboost")
    booster = lightgbm.train({"verbose": -1}, lightgbm.Dataset(X, X[:, 0]), 3)
    booster.save_model(tmp_path / "m.txt")
    assert source_of(tmp_path / "m.txt", X).framework == "lightgbm"
    trees = xgboost.train({}, xgboost.DMatrix(X, X[:, 0]), 3)
    for suffix in ("json", "ubj"):
        trees.save_model(tmp_path / f"m.{suffix}")
        assert source_of(tmp_path / f"m.{suffix}", X).framework == "xgboost"


def test_files_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    pytest.importorskip("xgboost")
    (tmp_path / "m.txt").write_text("a shopping list")
    (tmp_path / "m.json").write_text(json.dumps({"learner": 1}))
    (tmp_path / "m.onnx").write_text("{}")
    (tmp_path / "m.h5").write_text("")
    for name, message in [
        ("m.txt", r"m\.txt is not a LightGBM model"),
        ("m.json", r"m\.json is not an XGBoost model"),
        ("m.onnx", r"m\.onnx is not an ONNX model"),
        ("m.h5", r"cannot tell what .*m\.h5 is"),
        ("none.onnx", "no model file at"),
    ]:
        with pytest.raises(PackRefused, match=message):
            source_of(tmp_path / name, X)


def test_a_bundle_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(PackRefused) as caught:
        source_of(tmp_path, X)
    assert caught.value.hint.startswith("this is a bundle already")


def test_pickles_need_permission(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")
    linear = pytest.importorskip("sklearn.linear_model")
    joblib.dump(linear.LinearRegression().fit(X, X[:, 0]), tmp_path / "m.joblib")
    (tmp_path / "torn.pkl").write_bytes(b"\x80\x04torn")
    with pytest.raises(NotAllowed, match=r"m\.joblib is a pickle, which can run any code"):
        source_of(tmp_path / "m.joblib", X)
    assert framework_of(load_model(tmp_path / "m.joblib", allow_pickle=True)) == "sklearn"
    with pytest.raises(PackRefused, match=r"torn\.pkl cannot be unpickled"):
        load_model(tmp_path / "torn.pkl", allow_pickle=True)


def test_a_converted_model_can_be_told_to_take_one_row_at_a_time() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    model = linear.LinearRegression().fit(X, X[:, 0])
    source = source_of(model, X, batch="one")
    assert source.batch_dimension == "one"
    assert source.predict(source.example)["prediction"].shape == (40,)
    with pytest.raises(PackRefused, match="batch='none' does not fit a scikit-learn model"):
        source_of(model, X, batch="none")
