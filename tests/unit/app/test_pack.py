"""Packing: what is proven is written, what is not leaves nothing behind, and the same packs to the same digest."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pyarrow as pa
import pytest
from onnx import helper

import parbake
from parbake.cli.inspect import parity_words
from parbake.contract.bundle import read_bundle
from parbake.contract.model import Batch, TensorSpec, Tolerance
from parbake.errors import NotAllowed, PackRefused, ParityRefused
from tests import models
from tests.models import BOOL, DOUBLE, FLOAT, HALF, INT64, STRING, tensor

WHO: dict[str, Any] = {"purpose": "tests the packing", "owner": "tests@parbake.example"}

Modules = Callable[..., Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which bundles are written to."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """Write modules that can be imported; they are forgotten afterwards."""
    root = tmp_path / "code"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    names: list[str] = []

    def write(**files: str) -> Path:
        for name, text in files.items():
            (root / f"{name}.py").write_text(textwrap.dedent(text))
            names.append(name)
        return root

    yield write
    for name in names:
        sys.modules.pop(name, None)


def rows(count: int = 60, width: int = 4) -> np.ndarray[Any, Any]:
    """Normal rows."""
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def test_a_packed_model_answers_as_its_source(here: Path) -> None:
    stages: list[str] = []
    bundle = parbake.pack(models.linear(4), name="eta", example=rows(), **WHO, progress=stages.append)
    assert bundle.path == Path("eta.bundle")
    contract = read_bundle(here / "eta.bundle").contract
    assert contract == bundle.contract
    assert (contract.purpose, contract.owner) == (WHO["purpose"], WHO["owner"])
    assert contract.parity is not None
    assert (contract.parity.framework, contract.parity.example_rows, contract.parity.exact) == (
        "onnx",
        60,
        True,
    )
    assert bundle.predict(rows())["y"].shape == (60, 2)
    assert [stage.split()[0] for stage in stages] == ["converting", "comparing", "measuring", "writing"]
    goldens = read_bundle(here / "eta.bundle").goldens()
    assert goldens.rows == 60
    assert goldens.outputs["y"].tobytes() == bundle.predict(goldens.inputs["x"])["y"].tobytes()


def test_the_same_model_packs_to_the_same_digest(here: Path) -> None:
    first = parbake.pack(models.forest(100), name="eta", example=rows(60, 6), out="a.bundle", **WHO)
    second = parbake.pack(models.forest(100), name="eta", example=rows(60, 6), out="b.bundle", **WHO)
    assert first.digest == second.digest
    other = parbake.pack(models.forest(100, seed=1), name="eta", example=rows(60, 6), out="c.bundle", **WHO)
    assert other.digest != first.digest


def test_few_goldens_are_spread_over_the_example(here: Path) -> None:
    example = np.arange(404.0, dtype=np.float32).reshape(101, 4)
    bundle = parbake.pack(models.linear(4), name="eta", example=example, max_goldens=5, **WHO)
    inputs = read_bundle(bundle.path).goldens().inputs["x"]
    assert inputs[:, 0].tolist() == [0.0, 100.0, 200.0, 300.0, 400.0]


def scaled_forest() -> tuple[Any, np.ndarray[Any, Any]]:
    """A forest behind a scaler, on values that scaling in float32 pushes over thresholds."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    pipeline = pytest.importorskip("sklearn.pipeline")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1000, size=(400, 4)).astype(np.float64) / 7.0
    model = pipeline.make_pipeline(
        preprocessing.StandardScaler(), ensemble.RandomForestRegressor(20, random_state=0)
    )
    return model.fit(x, x[:, 0] + rng.normal(size=400)), x


def test_a_conversion_that_changes_answers_is_refused_with_the_rows_and_nothing_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx

    from parbake.contract.sources.model import Source
    from parbake.contract.sources.onnx import from_onnx

    model, x = scaled_forest()
    converted = from_onnx(to_onnx(model, x[:1].astype(np.float32)), x.astype(np.float32))
    wrong = Source(
        framework="scikit-learn",
        framework_version="1",
        inputs=(TensorSpec("X", "FP32", (4,), columns=("a", "b", "c", "d")),),
        outputs=converted.outputs,
        steps=converted.steps,
        files=converted.files,
        predict=lambda tensors: {converted.outputs[0].name: model.predict(tensors["X"])},
        example=converted.example,
    )
    # The converter as others use it, where parbake's own stands.
    monkeypatch.setattr("parbake.app.pack.source_of", lambda *a, **k: wrong)
    with pytest.raises(ParityRefused) as caught:
        parbake.pack(model, name="eta", example=x, **WHO)
    lines = caught.value.message.splitlines()
    assert " rows differ between scikit-learn 1 and the bundle, by up to " in lines[0]
    assert len(lines) == 7
    assert lines[1].startswith("  a=")
    assert ", d=" in lines[1]
    assert "the bundle says" in lines[1]
    assert lines[-1].startswith("  and ")
    assert list(here.iterdir()) == []


def test_the_same_forest_is_packed_exactly_by_the_own_converter(here: Path) -> None:
    model, x = scaled_forest()
    bundle = parbake.pack(model, name="eta", example=x, **WHO)
    assert bundle.contract.parity is not None
    assert bundle.contract.parity.exact
    assert bundle.contract.parity.threshold_rows > 1000
    assert bundle.predict(x)["prediction"].tolist() == model.predict(x).tolist()


def test_a_refused_pack_leaves_what_is_there_as_it_is(here: Path) -> None:
    first = parbake.pack(models.linear(4), name="eta", example=rows(), **WHO)
    with pytest.raises(PackRefused, match=r"eta\.bundle exists"):
        parbake.pack(models.linear(4), name="eta", example=rows(), **WHO)
    with pytest.raises(PackRefused, match="the example does not fit"):
        parbake.pack(models.linear(4), name="eta", example=rows(5, 9), replace=True, **WHO)
    assert read_bundle("eta.bundle").digest == first.digest
    parbake.pack(models.linear(6), name="eta", example=rows(5, 6), replace=True, **WHO)
    assert read_bundle("eta.bundle").digest != first.digest
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("")
    with pytest.raises(PackRefused, match="notes exists and is not a bundle"):
        parbake.pack(models.linear(4), name="eta", example=rows(), out="notes", replace=True, **WHO)


EIGHT = models.model(
    [
        helper.make_node("Cast", ["flag"], ["f"], to=FLOAT),
        helper.make_node("Cast", ["count"], ["c"], to=FLOAT),
        helper.make_node("Cast", ["half"], ["h"], to=FLOAT),
        helper.make_node("Add", ["f", "c"], ["s"]),
        helper.make_node("Add", ["s", "h"], ["total"]),
        helper.make_node("Cast", ["total"], ["small"], to=HALF),
        helper.make_node("Not", ["flag"], ["off"]),
        helper.make_node("Identity", ["word"], ["echo"]),
        helper.make_node("Exp", ["wide"], ["grown"]),
    ],
    [
        tensor("flag", BOOL), tensor("count", INT64), tensor("half", HALF), tensor("word", STRING, ("N", 2)),
        tensor("wide", DOUBLE, ("N", 3)),
    ],
    [
        tensor("total", FLOAT), tensor("small", HALF), tensor("off", BOOL), tensor("echo", STRING, ("N", 2)),
        tensor("grown", DOUBLE, ("N", 3)),
    ],
)  # fmt: skip


def test_every_kind_of_tensor_packs_and_keeps_its_bits_in_any_company(here: Path) -> None:
    rng = np.random.default_rng(0)
    example = {
        "flag": rng.random(50) < 0.5,
        "count": rng.integers(-5, 5, 50),
        "half": rng.normal(size=50).astype(np.float16),
        "word": rng.choice(["rome", "", "é"], size=(50, 2)).astype(object),
        "wide": rng.normal(size=(50, 3)),
    }
    bundle = parbake.pack(EIGHT, name="eight", example=example, **WHO)
    together = bundle.predict(example)
    assert {name: str(array.dtype) for name, array in together.items()} == {
        "total": "float32", "small": "float16", "off": "bool", "echo": "object", "grown": "float64",
    }  # fmt: skip
    assert together["echo"].tolist() == example["word"].tolist()
    for i in range(50):
        alone = bundle.predict({name: array[i : i + 1] for name, array in example.items()})
        for name, array in together.items():
            assert alone[name].tolist() == array[i : i + 1].tolist()


def test_a_linear_classifier_gets_the_padding_that_was_measured(here: Path) -> None:
    x = rows(300, 30)
    bundle = parbake.pack(models.linear_classifier(30, zipmap=True), name="digits", example=x, **WHO)
    assert bundle.contract.batch.invariant_from is not None
    assert bundle.contract.outputs[1].labels == ("0", "1", "2")
    together = bundle.predict(x)["probability"]
    alone = np.concatenate([bundle.predict(x[i : i + 1])["probability"] for i in range(len(x))])
    assert alone.tobytes() == together.tobytes()


def test_trees_that_threads_would_sum_in_another_order_get_one_thread(here: Path) -> None:
    bundle = parbake.pack(models.forest(120), name="forest", example=rows(60, 6), **WHO)
    assert bundle.contract.batch.one_thread


def test_a_model_that_mixes_rows_promises_a_tolerance_that_covers_it(here: Path) -> None:
    # Quantised dynamically: the scale is that of the largest value of the whole batch.
    mixing = models.model(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [tensor("x", FLOAT, ("N", 4))],
        [tensor("y", FLOAT, ("N", 4))],
    )
    bundle = parbake.pack(mixing, name="mixing", example=rows(), **WHO)
    batch = bundle.contract.batch
    assert batch.invariant_from is None
    assert bundle.contract.tolerance.atol >= batch.spread > 0.001
    with pytest.raises(PackRefused, match=r"differ by .* between batches, more than the tolerance"):
        parbake.pack(mixing, name="strict", example=rows(), tolerance=1e-6, **WHO)
    alone = parbake.pack(mixing, name="alone", example=rows(), tolerance=1e-6, batch="one", **WHO)
    assert alone.contract.batch == Batch(dimension="one")
    assert alone.predict(rows())["y"][3].tobytes() == alone.predict(rows()[3:4])["y"][0].tobytes()


def test_a_label_that_depends_on_other_rows_is_refused(here: Path) -> None:
    ranks = models.model(
        [
            helper.make_node("ReduceMax", ["x"], ["m"], keepdims=1),
            helper.make_node("Equal", ["x", "m"], ["best"]),
        ],
        [tensor("x", FLOAT, ("N", 1))],
        [tensor("best", BOOL, ("N", 1))],
    )
    with pytest.raises(PackRefused, match="depends on the other rows of the batch") as caught:
        parbake.pack(ranks, name="ranks", example=rows(20, 1), **WHO)
    assert caught.value.hint == "batch='one' runs each row by itself"
    assert list(here.iterdir()) == []


def test_what_was_declared_is_in_the_contract(here: Path) -> None:
    table = pa.table(
        {"store": [1.0, 2.0, 3.0], "km": [1.25, 2.5, None], "a": [1.0, 2.0, 3.0], "b": [0.0, 0.0, 0.0]}
    )
    bundle = parbake.pack(
        models.linear(4), name="eta", example=table, key=["store"], units={"km": "km", "y": "min"},
        tolerance=(1e-3, 1e-4), default={"y": [0, 1.5]}, deadline_ms=20, freshness_s=60.0, rounding={"km": 1}, **WHO,
    )  # fmt: skip
    contract = bundle.contract
    assert contract.inputs[0].columns == ("store", "km", "a", "b")
    assert contract.inputs[0].allow_nan
    assert (contract.inputs[0].unit, contract.outputs[0].unit) == ("km: km", "min")
    assert (contract.key.columns, contract.key.rounding) == (("store",), {"km": 1})
    assert contract.tolerance == Tolerance(1e-3, 1e-4)
    assert contract.default == {"y": [0.0, 1.5]}
    assert (contract.deadline_ms, contract.freshness_s) == (20, 60.0)
    assert contract.outputs[0].allow_nan
    # The model only ever sees rounded numbers: 1.25 and 1.2 (half to even) are one row.
    answers = bundle.predict([{"store": 1, "km": km, "a": 0, "b": 0} for km in (1.25, 1.2, 1.3)])["y"]
    assert answers[0].tobytes() == answers[1].tobytes() != answers[2].tobytes()
    assert read_bundle(bundle.path).goldens().inputs["x"][:2, 1].tolist() == [
        np.float32(1.2),
        np.float32(2.5),
    ]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"name": "../eta"}, "'../eta' cannot name a model"),
        ({"name": "eta\n"}, "cannot name a model"),
        ({"purpose": " "}, "the model has no purpose"),
        ({"owner": ""}, "the model has no owner"),
        ({"key": ["shop"]}, "key column 'shop' is not an input"),
        ({"key": []}, r"key is \[\]"),
        ({"units": {"kg": "kg"}}, "units name 'kg', which is no input or output"),
        ({"rounding": {"kg": 1}}, "rounding names 'kg', which is not an input"),
        ({"rounding": {"x": 1.5}}, "rounding of 'x' is 1.5"),
        ({"default": {"z": 1}}, "the default answer has z"),
        ({"default": {"y": 1}}, r"the default 1 of output 'y' is not FP32 of shape \[2\]"),
        ({"default": {"y": ["a", "b"]}}, "of output 'y' is not FP32"),
        ({"deadline_ms": 0}, "deadline_ms is 0, it must be a positive number"),
        ({"freshness_s": float("nan")}, "freshness_s is nan"),
        ({"tolerance": -1.0}, "tolerance is -1.0, it must not be negative"),
        ({"max_goldens": 0}, "max_goldens is 0"),
        ({"allow_nan": ["z"]}, "allow_nan names 'z', which is not an input"),
    ],
)
def test_a_declaration_that_cannot_hold_is_refused(
    here: Path, declared: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"name": "eta", "example": rows(), **WHO, **declared}
    with pytest.raises(PackRefused, match=message):
        parbake.pack(models.linear(4), **arguments)
    assert list(here.iterdir()) == []


def test_missing_values_are_allowed_where_the_example_has_them_or_it_is_said(here: Path) -> None:
    gaps = rows()
    gaps[3, 1] = np.nan
    for allow_nan, example, expected in [
        (None, rows(), False), (None, gaps, True), (True, rows(), True), (["x"], rows(), True), ([], rows(), False),
    ]:  # fmt: skip
        bundle = parbake.pack(
            models.linear(4), name="eta", example=example, allow_nan=allow_nan, replace=True, **WHO
        )
        assert bundle.contract.inputs[0].allow_nan is expected
    with pytest.raises(PackRefused, match="the example has missing values in 'x', which allow_nan forbids"):
        parbake.pack(models.linear(4), name="eta", example=gaps, allow_nan=False, replace=True, **WHO)


def test_a_function_is_packed_with_its_source_and_runs_without_the_original(
    here: Path, modules: Modules
) -> None:
    root = modules(
        fares="""
            import numpy as np
            from fares_rates import RATES

            def fare(km, city):
                if (km < 0).any():
                    raise ValueError("km is negative")
                return {"fare": km * np.array([RATES.get(c, 1.0) for c in city]), "far": km > 10}
        """,
        fares_rates='RATES = {"rome": 2.0}',
    )
    table = pa.table({"km": [1.5, 20.0], "city": ["rome", "oslo"]})
    bundle = parbake.pack("fares:fare", name="fare", example=table, **WHO)
    stored = read_bundle(bundle.path)
    assert stored.environment.required == ("numpy",)
    assert {file.path for file in stored.manifest.files if file.path.endswith(".py")} == {
        "source/fares.py", "source/fares_rates.py",
    }  # fmt: skip
    shutil.rmtree(root)
    answer = parbake.load(bundle.path).predict(table)
    assert answer["fare"].tolist() == [3.0, 20.0]
    assert answer["far"].tolist() == [False, True]


def test_source_that_only_runs_where_it_was_written_is_refused(here: Path, modules: Modules) -> None:
    root = modules(
        hidden="""
            import importlib
            part = importlib.import_module("hidden_" + "part")
            def f(x): return x * part.K
        """,
        hidden_part="K = 2.0",
    )
    assert (root / "hidden_part.py").exists()
    with pytest.raises(PackRefused, match=r"does not run on its own: .*No module named 'hidden_part'"):
        parbake.pack("hidden:f", name="f", example=rows(), **WHO)
    assert list(here.iterdir()) == []


def test_a_script_that_packs_while_it_is_imported_is_refused_and_does_not_multiply(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    call = "parbake.pack(f, name='f', example=np.ones((3, 2)), purpose='p', owner='o')\n"
    text = "import numpy as np\nimport parbake\ndef f(x): return x * 2\n"
    script.write_text(text + call)
    started = time.monotonic()
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "put what should not run on import under: if __name__ == '__main__':" in done.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "f.bundle").exists()
    script.write_text(f"{text}if __name__ == '__main__':\n    {call}")
    subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, check=True)
    assert read_bundle(tmp_path / "f.bundle").contract.steps[0].entry == "train:f"


def test_functions_before_and_after_a_model_are_part_of_the_bundle(here: Path, modules: Modules) -> None:
    modules(
        around="""
            import numpy as np
            def parse(text):
                return {"x": np.array([[float(part) for part in t.split()] for t in text], dtype=np.float32)}
            def describe(y):
                return {"words": np.array([f"{left:.2f} {right:.2f}" for left, right in y], dtype=object)}
            def bare(text):
                return np.zeros((len(text), 4), dtype=np.float32)
        """
    )
    example = {"text": np.array(["1 2 3 4", "0 0 0 0", "9 8 7 6"], dtype=object)}
    bundle = parbake.pack(
        models.linear(4), name="eta", example=example, pre="around:parse", post="around:describe", **WHO
    )
    assert [(step.kind, step.path) for step in bundle.contract.steps] == [
        ("python", "pre"), ("onnx", "model.onnx"), ("python", "post"),
    ]  # fmt: skip
    plain = parbake.pack(models.linear(4), name="plain", example=rows(), **WHO)
    left, right = plain.predict(np.array([[9, 8, 7, 6]], dtype=np.float32))["y"][0]
    assert bundle.predict({"text": "9 8 7 6"})["words"].tolist() == [f"{left:.2f} {right:.2f}"]
    with pytest.raises(PackRefused, match=r"the model takes|the example does not fit the model"):
        parbake.pack(models.linear(4), name="bare", example=example, pre="around:bare", **WHO)


def test_functions_around_a_function_get_the_names_that_they_were_written_for(
    here: Path, modules: Modules
) -> None:
    modules(
        three="""
            def pre(miles):
                return {"km": miles * 2}
            def fare(km):
                return km + 1
            def post(output):
                return {"dollars": output, "cents": 100 * output}
        """
    )
    example = {"miles": np.array([1.0, 2.0, 5.0])}
    bundle = parbake.pack(
        "three:fare", name="fare", example=example, pre="three:pre", post="three:post", **WHO
    )
    answer = bundle.predict({"miles": 3.0})
    assert {name: array.tolist() for name, array in answer.items()} == {"dollars": [7.0], "cents": [700.0]}


def test_functions_around_a_model_of_one_row_at_a_time_see_one_row_at_a_time(
    here: Path, modules: Modules
) -> None:
    modules(
        single="""
            import numpy as np
            def pre(raw):
                assert raw.shape == (4,), raw.shape
                return {"x": raw * np.float32(2)}
            def post(y):
                assert y.shape == (4,), y.shape
                return {"total": y.sum()}
        """
    )
    relu = models.model(
        [helper.make_node("Relu", ["x"], ["y"])], [tensor("x", FLOAT, (4,))], [tensor("y", FLOAT, (4,))]
    )
    example = {"raw": np.ones((5, 4), dtype=np.float32)}
    bundle = parbake.pack(
        relu, name="single", example=example, pre="single:pre", post="single:post", batch="none", **WHO
    )
    assert bundle.contract.batch.dimension == "none"
    assert bundle.predict(example)["total"].tolist() == [8.0] * 5


def test_a_model_with_string_and_number_columns_and_gaps_packs_from_a_frame(here: Path) -> None:
    pandas = pytest.importorskip("pandas")
    compose, pipeline = pytest.importorskip("sklearn.compose"), pytest.importorskip("sklearn.pipeline")
    preprocessing, impute = (
        pytest.importorskip("sklearn.preprocessing"),
        pytest.importorskip("sklearn.impute"),
    )
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "age": rng.normal(40, 9, 120).round(1),
            "city": rng.choice(["rome", "oslo"], 120),
            "kids": rng.integers(0, 4, 120),
        }
    )
    frame.loc[::9, "age"] = np.nan
    columns = compose.ColumnTransformer(
        [
            (
                "numbers",
                pipeline.make_pipeline(impute.SimpleImputer(), preprocessing.StandardScaler()),
                ["age", "kids"],
            ),
            ("city", preprocessing.OneHotEncoder(handle_unknown="ignore"), ["city"]),
        ]
    )
    model = pipeline.make_pipeline(columns, linear.LogisticRegression())
    model.fit(frame, np.where(frame.kids > 1, "many", "few"))
    bundle = parbake.pack(model, name="family", example=frame, **WHO)
    answer = bundle.predict(frame)
    assert answer["label"].tolist() == model.predict(frame).tolist()
    np.testing.assert_allclose(answer["probability"], model.predict_proba(frame), rtol=1e-9)
    single = bundle.predict({"age": None, "city": "lima", "kids": 2})
    assert (
        single["label"].tolist()
        == model.predict(frame.iloc[:1].assign(age=np.nan, city="lima", kids=2)).tolist()
    )
    probability = np.concatenate([bundle.predict(frame.iloc[i : i + 1])["probability"] for i in range(120)])
    assert probability.tobytes() == answer["probability"].tobytes()


def test_lightgbm_with_timestamps_packs_exactly(here: Path) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.integers(1_600_000_000, 1_700_000_000, 600), rng.integers(0, 7, 600)]).astype(
        np.float64
    )
    model = lightgbm.LGBMRegressor(n_estimators=40, verbose=-1).fit(
        x, (x[:, 0] % 86400 > 43200) * 3 + x[:, 1]
    )
    bundle = parbake.pack(model, name="eta", example=x, **WHO)
    assert bundle.contract.parity is not None
    assert bundle.contract.parity.exact
    assert bundle.predict(x)["prediction"].tolist() == model.predict(x).tolist()


@pytest.mark.needs("torch")
def test_a_network_with_a_label_output_packs_although_rounding_decides_at_ties(here: Path) -> None:
    torch: Any = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[misc]  # torch is optional, so Any
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))

        def forward(self, features: Any) -> Any:
            scores = self.layers(features)
            return scores, scores.argmax(dim=1)

    x = rows(50, 8)
    with warnings.catch_warnings():
        # Deprecated, and exported in a tenth of the time that the module itself takes.
        warnings.simplefilter("ignore")
        model = torch.jit.trace(Net().eval(), torch.from_numpy(x))
    bundle = parbake.pack(model, name="net", example=x, **WHO)
    assert [spec.name for spec in bundle.contract.outputs] == ["output0", "output1"]
    together = bundle.predict(x)
    alone = np.concatenate([bundle.predict(x[i : i + 1])["output0"] for i in range(50)])
    assert alone.tobytes() == together["output0"].tobytes()
    with torch.no_grad():
        expected = Net().eval()(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(together["output0"], expected, rtol=1e-4, atol=1e-5)


def test_only_a_pickle_would_do_and_that_must_be_said(here: Path) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    x = rows(40).astype(np.float64)
    model = neighbors.KNeighborsRegressor(3).fit(x, x[:, 0])
    # Its nearest neighbours, summed in another order, are others where two are equally far.
    with pytest.raises(PackRefused):
        parbake.pack(model, name="near", example=x, **WHO)
    assert list(here.iterdir()) == []
    bundle = parbake.pack(model, name="near", example=x, allow_pickle=True, **WHO)
    assert bundle.contract.steps[0].kind == "pickle"
    assert bundle.predict(x)["prediction"].tolist() == model.predict(x).tolist()
    with pytest.raises(NotAllowed, match="holds a pickle, which can run any code"):
        parbake.load(bundle.path).predict(x)


def test_an_example_that_the_model_refuses_is_refused(here: Path, modules: Modules) -> None:
    modules(picky="def f(x):\n    raise ValueError('never')")
    with pytest.raises(PackRefused, match="picky:f fails on the example: ValueError: never"):
        parbake.pack("picky:f", name="f", example=rows(), **WHO)


def test_the_contract_on_disk_is_what_anybody_can_read(here: Path) -> None:
    onnx.save(models.linear(4), here / "m.onnx")
    parbake.pack("m.onnx", name="eta", example=rows(), **WHO)
    contract = msgspec.json.decode((here / "eta.bundle" / "contract.json").read_bytes())
    assert contract["name"] == "eta"
    assert contract["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [4]}]
    assert (here / "eta.bundle" / "model.onnx").read_bytes() == (here / "m.onnx").read_bytes()


def test_rows_that_the_model_refuses_become_no_goldens(here: Path, modules: Modules) -> None:
    modules(
        warm="""
            def f(x):
                if (x < 10).any():
                    raise ValueError("too cold")
                return x * 2
        """
    )
    # The function is tried on the first rows; of all of them only four are good.
    example = np.concatenate([np.full(8, 20.0), np.zeros(300)])
    with pytest.raises(PackRefused, match="too cold"):
        parbake.pack("warm:f", name="f", example=example[::-1], **WHO)
    bundle = parbake.pack("warm:f", name="f", example=example, max_goldens=3, **WHO)
    assert set(read_bundle(bundle.path).goldens().inputs["x"].tolist()) == {20.0}
    parity = bundle.contract.parity
    assert parity is not None
    # Of many examples some are taken; each of them was either compared or left out.
    assert 0 < parity.example_rows <= 8
    assert 200 < parity.left_out <= 300
    assert parity.ties == 0
    assert parity_words(bundle.contract).endswith(
        f"; {parity.left_out} rows left out, which the source refuses"
    )


def test_a_model_that_needs_company_is_refused(here: Path, modules: Modules) -> None:
    modules(
        herd="""
            def f(x):
                if len(x) < 2:
                    raise ValueError("I am lonely")
                return x * 2
        """
    )
    with pytest.raises(PackRefused, match="I am lonely"):
        parbake.pack("herd:f", name="f", example=np.ones(5), **WHO)
