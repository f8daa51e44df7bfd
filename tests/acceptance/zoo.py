"""Real models of every kind that a caller may meet, packed, with rows to ask them about."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import parbake
from parbake.contract.tensors import Tensors

ROWS = 11


@dataclass(frozen=True, slots=True)
class Animal:
    """A packed model, rows as tensors by input name, and the same rows as a table for `parbake bake`."""

    bundle: parbake.Bundle
    rows: Tensors
    table: pa.Table


Maker = Callable[[Path], Animal]


def _pack(model: Any, example: Any, folder: Path, name: str, **more: Any) -> parbake.Bundle:
    return parbake.pack(
        model,
        name=name,
        example=example,
        purpose="tests",
        owner="tests",
        out=folder / f"{name}.bundle",
        **more,
    )


def _matrix(bundle: parbake.Bundle, rows: np.ndarray[Any, Any]) -> Animal:
    (spec,) = bundle.contract.inputs
    columns = pa.table({spec.name: list(rows)})
    if spec.columns:
        columns = pa.table({column: rows[:, i] for i, column in enumerate(spec.columns)})
    return Animal(bundle, {spec.name: rows}, columns)


def string_pipeline(folder: Path) -> Animal:
    """scikit-learn: text and numbers, imputed, encoded and scaled, then a logistic regression."""
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "city": rng.choice(["Utrecht", "Graz", "Århus"], 300),
            "age": rng.integers(18, 90, 300),
            "income": rng.lognormal(10, 1, 300),
        }
    )
    target = (frame["income"] > frame["income"].median()) ^ (frame["city"] == "Graz")
    model = make_pipeline(
        ColumnTransformer(
            [
                ("text", OneHotEncoder(handle_unknown="ignore"), ["city"]),
                ("numbers", StandardScaler(), ["age", "income"]),
            ]
        ),
        LogisticRegression(),
    ).fit(frame, target.map({True: "rich", False: "poor"}))
    bundle = _pack(model, frame[:60], folder, "pipeline")
    asked = frame[100 : 100 + ROWS]
    rows = {
        "city": np.array(asked["city"].tolist(), dtype=object).reshape(-1, 1),
        "age": asked["age"].to_numpy(np.int64).reshape(-1, 1),
        "income": asked["income"].to_numpy(np.float64).reshape(-1, 1),
    }
    return Animal(bundle, rows, pa.Table.from_pandas(asked, preserve_index=False))


def scaled_forest(folder: Path) -> Animal:
    """scikit-learn: a random forest behind a scaler, which float32 gets wrong."""
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = make_classification(600, 12, n_informative=8, n_classes=3, random_state=2)
    model = make_pipeline(StandardScaler(), RandomForestClassifier(120, random_state=2)).fit(x, y)
    return _matrix(_pack(model, x[:60], folder, "forest"), x[100 : 100 + ROWS])


def timestamps(folder: Path) -> Animal:
    """LightGBM on a Unix timestamp, whose thresholds need doubles."""
    import lightgbm

    rng = np.random.default_rng(3)
    x = np.column_stack([1.7e9 + rng.integers(0, 10_000_000, 2000), rng.normal(size=2000)]).astype(np.float64)
    y = np.sin(x[:, 0] / 86_400) + x[:, 1]
    model = lightgbm.LGBMRegressor(n_estimators=80, verbose=-1, n_jobs=1).fit(x, y)
    return _matrix(_pack(model, x[:60], folder, "timestamps"), x[100 : 100 + ROWS])


def network(folder: Path) -> Animal:
    """PyTorch: a small network in float32."""
    import torch

    torch.manual_seed(4)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5), torch.nn.Softmax(dim=1)
    ).eval()
    x = np.random.default_rng(4).normal(size=(60 + ROWS, 20)).astype(np.float32)
    return _matrix(_pack(model, x[:60], folder, "network"), x[60:])


def function(folder: Path) -> Animal:
    """A Python function on a text and a number."""
    module = folder / "greeter_of_tests.py"
    module.write_text(
        "import numpy as np\n\n\n"
        "def greet(name, times):\n"
        '    """One text and one number per row."""\n'
        "    words = [' '.join([f'hello {n}'] * int(t)) for n, t in zip(name[:, 0], times[:, 0])]\n"
        "    return {'text': np.array(words, dtype=object), 'length': np.array([len(w) for w in words])}\n"
    )
    sys.path.insert(0, str(folder))
    try:
        names = np.array([f"n{i}ü" for i in range(40)], dtype=object).reshape(-1, 1)
        times = (np.arange(40) % 4).astype(np.int64).reshape(-1, 1)
        bundle = _pack("greeter_of_tests:greet", {"name": names, "times": times}, folder, "function")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("greeter_of_tests", None)
        importlib.invalidate_caches()
    rows = {"name": names[:ROWS], "times": times[:ROWS]}
    return Animal(bundle, rows, pa.table({"name": names[:ROWS, 0], "times": times[:ROWS, 0]}))


def half_precision(folder: Path) -> Animal:
    """ONNX in FP16, with a boolean and an integer input beside it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(5).normal(size=(6, 3)).astype(np.float16)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["scores"]),
            helper.make_node("Cast", ["shift"], ["shift16"], to=TensorProto.FLOAT16),
            helper.make_node("Add", ["scores", "shift16"], ["moved"]),
            helper.make_node("Where", ["flip", "moved", "scores"], ["y"]),
            helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
        ],
        "half",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 6]),
            helper.make_tensor_value_info("flip", TensorProto.BOOL, ["n", 1]),
            helper.make_tensor_value_info("shift", TensorProto.INT32, ["n", 3]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 3]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(weights, "w")],
    )
    path = folder / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    rng = np.random.default_rng(6)
    rows = {
        "x": rng.normal(size=(40, 6)).astype(np.float16),
        "flip": rng.random((40, 1)) > 0.5,
        "shift": rng.integers(-5, 5, (40, 3)).astype(np.int32),
    }
    bundle = _pack(path, rows, folder, "half")
    asked = {name: array[:ROWS] for name, array in rows.items()}
    table = pa.table(
        {
            "x": pa.array([row.astype(np.float32).tolist() for row in asked["x"]], pa.list_(pa.float32())),
            "flip": asked["flip"][:, 0],
            "shift": list(asked["shift"]),
        }
    )
    return Animal(bundle, asked, table)


def texts(folder: Path) -> Animal:
    """ONNX on BYTES: text in, text and a number out."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["word"], ["echo"]),
            helper.make_node(
                "LabelEncoder",
                ["word"],
                ["number"],
                domain="ai.onnx.ml",
                keys_strings=["a", "bé"],
                values_int64s=[1, 2],
                default_int64=-1,
            ),
            helper.make_node(
                "LabelEncoder",
                ["number"],
                ["kind"],
                domain="ai.onnx.ml",
                keys_int64s=[1, 2],
                values_strings=["first", "sécond"],
                default_string="none",
            ),
        ],
        "texts",
        [helper.make_tensor_value_info("word", TensorProto.STRING, ["n", 1])],
        [
            helper.make_tensor_value_info("echo", TensorProto.STRING, ["n", 1]),
            helper.make_tensor_value_info("kind", TensorProto.STRING, ["n", 1]),
            helper.make_tensor_value_info("number", TensorProto.INT64, ["n", 1]),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)], ir_version=9
    )
    path = folder / "texts.onnx"
    onnx.save(model, path)
    words = np.array(["a", "bé", "", "long " * 40, "漢字", "a,b", '"q"', "x\ny"] * 5, dtype=object).reshape(
        -1, 1
    )
    bundle = _pack(path, {"word": words}, folder, "texts")
    return Animal(bundle, {"word": words[:ROWS]}, pa.table({"word": words[:ROWS, 0]}))


ZOO: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (string_pipeline, scaled_forest, timestamps, network, function, half_precision, texts)
}
NEEDS: dict[str, tuple[str, ...]] = {
    "string_pipeline": ("sklearn", "pandas"),
    "scaled_forest": ("sklearn",),
    "timestamps": ("lightgbm",),
    "network": ("torch", "onnxscript"),
}
