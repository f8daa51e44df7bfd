"""A session: each row's bits are its own, and what a model answers is held against its contract."""

from __future__ import annotations

import py_compile
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from parbake.contract.bundle import Goldens, StoredBundle, read_bundle, write_bundle
from parbake.contract.datatypes import NUMPY
from parbake.contract.environment import capture
from parbake.contract.model import Batch, Contract, Step, TensorSpec
from parbake.contract.tensors import Tensor, from_raw, to_raw
from parbake.errors import BundleAltered, BundleError, GoldensDiffer, ModelFailed, RowRejected
from parbake.runtime.session import Session, check_goldens
from tests import models
from tests.echo import write_echo
from tests.functions import X, Y, write_function


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    """A linear model of 30 inputs: onnxruntime takes rows in packets, so that a row's bits depend on its place."""
    contract = Contract(
        name="linear", inputs=(TensorSpec("x", "FP32", (30,)),), outputs=(Y,), steps=(Step("onnx", "model.onnx"),),
        purpose="test", owner="test",
    )  # fmt: skip
    goldens = Goldens({"x": np.empty((0, 30), np.float32)}, {"y": np.empty((0, 2), np.float32)})
    files = {"model.onnx": models.linear(30).SerializeToString()}
    return write_bundle(
        tmp_path_factory.mktemp("linear") / "linear.bundle", contract, files, goldens, capture()
    )


@pytest.mark.parametrize(
    "batch", [Batch(invariant_from=2), Batch(invariant_from=4, multiple_of=4), Batch(multiple_of=8)]
)
@given(rows=st.integers(1, 17))
def test_padding_gives_every_row_the_batch_that_the_contract_asks_for(
    linear: StoredBundle, batch: Batch, rows: int
) -> None:
    x = np.random.default_rng(rows).normal(size=(rows, 30)).astype(np.float32)
    sizes: list[int] = []
    session = Session(linear, batch=batch)
    through = session._through

    def watch(inputs: Any) -> dict[str, Tensor]:
        sizes.append(len(inputs["x"]))
        return through(inputs)

    session._through = watch  # type: ignore[method-assign]  # seen from the inside: how many rows the graph got
    answer = session.run({"x": x})["y"]
    assert answer.shape == (rows, 2)
    (size,) = sizes
    assert size >= max(rows, batch.invariant_from or 1)
    assert size % batch.multiple_of == 0
    assert size < max(rows, batch.invariant_from or 1) + batch.multiple_of
    assert np.allclose(answer, Session(linear).run({"x": x})["y"], rtol=1e-4)


def test_a_lone_row_has_the_bits_that_it_has_in_company(linear: StoredBundle) -> None:
    x = np.random.default_rng(1).normal(size=(64, 30)).astype(np.float32)
    session = Session(linear, batch=Batch(invariant_from=4, multiple_of=4))
    whole = session.run({"x": x})["y"]
    alone = np.concatenate([session.run({"x": x[i : i + 1]})["y"] for i in range(64)])
    pairs = np.concatenate([session.run({"x": x[i : i + 2]})["y"] for i in range(0, 64, 2)])
    assert alone.tobytes() == whole.tobytes() == pairs.tobytes()


@pytest.mark.parametrize("dimension", ["one", "none"])
def test_a_model_for_one_row_at_a_time_answers_many(tmp_path: Path, dimension: Any) -> None:
    sizes = "x.shape == (1, 2)" if dimension == "one" else "x.shape == (2,)"
    source = f"def predict(x, word):\n    assert {sizes}\n    return {{'y': x * 2, 'word': word}}\n"
    specs = (X, TensorSpec("word", "BYTES"))
    bundle = write_function(
        tmp_path,
        source,
        inputs=specs,
        outputs=(Y, TensorSpec("word", "BYTES")),
        batch=Batch(dimension=dimension),
    )
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    words = np.array([b"a", b"", b"ends with NUL\0"], dtype=object)
    answer = Session(bundle).run({"x": x, "word": words})
    assert answer["y"].tolist() == (2 * x).tolist()
    assert answer["word"].tolist() == ["a", "", "ends with NUL\0"]


@pytest.mark.parametrize(
    ("datatype", "expression", "message"),
    [
        ("INT64", "x[:, 0] / 3", "output 'y' has datatype float32, the contract says INT64"),
        ("BOOL", "x[:, 0].astype('i8')", "output 'y' has datatype int64, the contract says BOOL"),
        ("BYTES", "x[:, 0]", "output 'y' has datatype float32, the contract says BYTES"),
        ("UINT8", "x[:, 0].astype('i8') - 21", "output 'y' has -1 as int64, out of the range of UINT8"),
        ("INT8", "x[:, 0].astype('i8') * 10", "output 'y' has 200 as int64, out of the range of INT8"),
    ],
)
def test_an_answer_that_the_promised_datatype_cannot_say_is_the_models_failure(
    tmp_path: Path, datatype: Any, expression: str, message: str
) -> None:
    source = f"def predict(x):\n    return {expression}\n"
    session = Session(write_function(tmp_path, source, outputs=(TensorSpec("y", datatype),)))
    with pytest.raises(ModelFailed) as caught:
        session.run({"x": np.array([[20, 0]], np.float32)})
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("datatype", "expression"),
    [
        ("INT64", "x[:, 0].astype('i4')"),
        ("UINT8", "x[:, 0].astype('i8')"),
        ("FP32", "x[:, 0].astype('f8')"),
        ("FP64", "x[:, 0].astype('i8')"),
    ],
)
def test_an_answer_of_a_datatype_that_fits_is_given_in_the_promised_one(
    tmp_path: Path, datatype: Any, expression: str
) -> None:
    source = f"def predict(x):\n    return {expression}\n"
    session = Session(write_function(tmp_path, source, outputs=(TensorSpec("y", datatype),)))
    answer = session.run({"x": np.array([[20, 0]], np.float32)})["y"]
    assert (answer.dtype, answer.tolist()) == (NUMPY[datatype], [20])


def test_a_compiled_file_beside_the_source_is_not_what_runs(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, "def predict(x):\n    return x * 2\n")
    other = tmp_path / "other.py"
    other.write_text("def predict(x):\n    return x * 1000\n")
    compiled = cache_from_source(str(bundle.file("source/model.py")))
    # Of this mode Python asks nothing: neither the time nor the content of the source.
    py_compile.compile(str(other), compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    answer = Session(bundle).run({"x": np.ones((1, 2), np.float32)})["y"]
    assert answer.tolist() == [[2, 2]]
    with pytest.raises(BundleAltered, match=r"__pycache__.* is not part of the bundle"):
        read_bundle(bundle.path)


@pytest.mark.parametrize("dimension", ["one", "none"])
def test_rows_with_answers_of_different_shapes_cannot_go_together(tmp_path: Path, dimension: Any) -> None:
    source = "import numpy as np\ndef predict(n):\n    return np.zeros(n.shape[:-1] + (int(n.max()),), np.float32)\n"
    bundle = write_function(
        tmp_path, source, inputs=(TensorSpec("n", "INT64", (1,)),), outputs=(TensorSpec("y", "FP32", (-1,)),),
        batch=Batch(dimension=dimension),
    )  # fmt: skip
    session = Session(bundle)
    assert session.run({"n": np.array([[2], [2]])})["y"].shape == (2, 2)
    with pytest.raises(ModelFailed, match="different shapes"):
        session.run({"n": np.array([[2], [3]])})


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("x[:1].repeat(3, axis=0)[:2]", "has shape"),
        ("x.sum()", "has shape"),
        ("np.concatenate([x, x], axis=1)", "rows of shape"),
        ("x[:, :1]", "rows of shape"),
    ],
)
def test_an_answer_of_another_shape_is_refused_and_never_cut_into_rows(
    tmp_path: Path, expression: str, message: str
) -> None:
    bundle = write_function(tmp_path, f"import numpy as np\ndef predict(x):\n    return {expression}\n")
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    with pytest.raises(ModelFailed, match=message):
        Session(bundle).run({"x": x})


def test_a_column_where_the_contract_says_single_values_is_the_same_answer(tmp_path: Path) -> None:
    bundle = write_function(
        tmp_path, "def predict(x):\n    return x[:, :1]\n", outputs=(TensorSpec("y", "FP32"),)
    )
    answer = Session(bundle).run({"x": np.arange(4, dtype=np.float32).reshape(2, 2)})
    assert answer["y"].tolist() == [0.0, 2.0]


def test_a_function_may_change_what_it_is_given(tmp_path: Path) -> None:
    bundle = write_function(tmp_path, "def predict(x):\n    x[x < 0] = 0\n    return x\n")
    x = np.array([[-1.0, 2.0]], dtype=np.float32)
    raws, _ = Session(bundle).run_raw([x.tobytes()], 1, [(2,)])
    assert np.frombuffer(raws[0], np.float32).tolist() == [0.0, 2.0]
    Session(bundle).run({"x": x})
    assert x.tolist() == [[-1.0, 2.0]]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("raise ValueError('age is negative')", RowRejected, "the model refused the row: age is negative"),
        ("raise KeyError('age')", ModelFailed, "KeyError: 'age'"),
        ("return x, x, x", ModelFailed, "the function gave 3 outputs, the contract has 1"),
        ("return {'z': x}", ModelFailed, "the model gave no output 'y', but 'z'"),
        ("return 1 / 0", ModelFailed, "ZeroDivisionError"),
    ],
)
def test_what_the_models_own_code_raises(
    tmp_path: Path, body: str, kind: type[Exception], message: str
) -> None:
    bundle = write_function(tmp_path, f"def predict(x):\n    {body}\n")
    with pytest.raises(kind) as caught:
        Session(bundle).run({"x": np.zeros((1, 2), np.float32)})
    assert message in str(caught.value)


def test_source_that_cannot_be_imported_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No module named 'nowhere'"):
        Session(write_function(tmp_path, "import nowhere\ndef predict(x):\n    return x\n"))


def test_raw_bytes_give_what_tensors_give(tmp_path: Path) -> None:
    specs = (TensorSpec("a", "FP64", (3,)), TensorSpec("b", "BYTES", (2,)), TensorSpec("c", "INT64", (-1,)))
    session = Session(write_echo(tmp_path, "echo", specs))
    given = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.array([["x", "äöü"], ["", "y"]], dtype=object),
        "c": np.array([[1, 2, 3, 4], [5, 6, 7, 8]]),
    }
    raws = [to_raw(given[spec.name], spec.datatype) for spec in specs]
    out_raws, out_shapes = session.run_raw(raws, 2, [(3,), (2,), (4,)])
    assert out_raws == raws
    assert out_shapes == [(3,), (2,), (4,)]
    assert from_raw(out_raws[1], "BYTES", (2, 2)).tolist() == [[b"x", "äöü".encode()], [b"", b"y"]]


@given(data=st.data())
def test_single_rows_as_raw_bytes_have_the_bits_of_tensors(linear: StoredBundle, data: st.DataObject) -> None:
    """From the second on they go another way through onnxruntime; sizes between must not disturb it."""
    session, careful = Session(linear), Session(linear)
    for _ in range(data.draw(st.integers(2, 6))):
        rows = data.draw(st.sampled_from([1, 1, 1, 2, 5]))
        values = st.floats(-1e3, 1e3, width=32)
        x = np.array(data.draw(st.lists(values, min_size=30 * rows, max_size=30 * rows)), np.float32).reshape(
            rows, 30
        )
        raws, shapes = session.run_raw([x.tobytes()], rows, ((30,),))
        assert raws == [careful.run({"x": x})["y"].tobytes()]
        assert shapes == [(2,)]
    other = session.with_batch(Batch(invariant_from=4))
    x = np.ones((1, 30), np.float32)
    (padded,), _ = other.run_raw([x.tobytes()], 1, ((30,),))
    assert padded == other.run({"x": x})["y"].tobytes()


def test_a_row_that_the_graph_refuses_leaves_nothing_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is at the moment.
    monkeypatch.setattr("parbake.runtime.session._BOUND_S", 60.0)
    graph = models.model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [models.tensor("x", models.INT64, ("N", 1))],
        [models.tensor("y", models.FLOAT, ("N", 1))],
        {"table": np.array([10, 20, 30], np.float32)},
    )
    contract = Contract(
        name="gather", inputs=(TensorSpec("x", "INT64", (1,)),), outputs=(TensorSpec("y", "FP32", (1,)),),
        steps=(Step("onnx", "model.onnx"),), purpose="test", owner="test",
    )  # fmt: skip
    goldens = Goldens({"x": np.empty((0, 1), np.int64)}, {"y": np.empty((0, 1), np.float32)})
    files = {"model.onnx": graph.SerializeToString()}
    session = Session(write_bundle(tmp_path / "gather.bundle", contract, files, goldens, capture()))

    def ask(number: int) -> float:
        raws, _ = session.run_raw([np.int64(number).tobytes()], 1, ((1,),))
        return float(np.frombuffer(raws[0], np.float32)[0])

    assert [ask(0), ask(1)] == [10, 20]
    assert session._bound is not None
    with pytest.raises(ModelFailed, match="onnxruntime"):
        ask(7)
    assert [ask(2), ask(0)] == [30, 10]
    assert session._bound is not None
    with pytest.raises(ValueError, match="reshape"):
        session.run_raw([bytes(16)], 1, ((1,),))
    assert ask(1) == 20


def test_text_that_is_none_is_the_rows_fault(tmp_path: Path) -> None:
    session = Session(write_echo(tmp_path, "echo", (TensorSpec("b", "BYTES"),)))
    with pytest.raises(RowRejected, match="not UTF-8"):
        session.run({"b": np.array([b"\xff"], dtype=object)})


def test_goldens_that_this_machine_does_not_reproduce_are_refused(tmp_path: Path) -> None:
    x = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    contract = Contract(
        name="wrong", inputs=(X,), outputs=(Y,), steps=(Step("python", "source", "model:predict"),),
        purpose="test", owner="test",
    )  # fmt: skip
    source = {"source/model.py": b"def predict(x):\n    return x * 2\n"}
    wrong = np.array([[2.0, 4.0], [6.0, 8.5]], dtype=np.float32)
    bundle = write_bundle(
        tmp_path / "wrong.bundle", contract, source, Goldens({"x": x}, {"y": wrong}), capture()
    )
    with pytest.raises(GoldensDiffer, match="1 of 2 goldens differ; first: row 1, output 'y'"):
        check_goldens(Session(bundle), bundle)
    right = write_bundle(
        tmp_path / "right.bundle", contract, source, Goldens({"x": x}, {"y": 2 * x}), capture()
    )
    assert check_goldens(Session(right), right) == 2
