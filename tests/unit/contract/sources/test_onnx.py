"""ONNX files as sources: every datatype, the batch dimension, ZipMap, initialisers, external data, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pyarrow as pa
import pytest
from onnx import ModelProto, TensorProto, helper

from parbake.contract.model import Step, TensorSpec
from parbake.contract.sources.onnx import from_onnx
from parbake.contract.tensors import Tensor
from parbake.errors import NotConvertible, PackRefused
from tests import models
from tests.models import BOOL, DOUBLE, FLOAT, HALF, INT32, INT64, STRING, tensor


def run(files: dict[str, bytes], feed: dict[str, Tensor]) -> dict[str, Any]:
    """The packed model in onnxruntime."""
    session = ort.InferenceSession(files["model.onnx"], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "linear.onnx"
    onnx.save(models.linear(4), path)
    example = np.ones((3, 4), dtype=np.float32)
    source = from_onnx(path, example)
    assert source.inputs == (TensorSpec("x", "FP32", (4,)),)
    assert source.outputs == (TensorSpec("y", "FP32", (2,)),)
    assert source.steps == (Step("onnx", "model.onnx"),)
    assert source.files == {"model.onnx": path.read_bytes()}
    assert (source.framework, source.framework_version) == ("onnx", ort.__version__)
    assert (source.batch_dimension, source.own_runtime) == ("any", True)
    assert source.predict(source.example)["y"].shape == (3, 2)


def test_bytes_and_a_model_in_memory_are_models_too() -> None:
    model = models.linear(4)
    example = np.ones((3, 4))
    assert from_onnx(model.SerializeToString(), example).inputs == from_onnx(model, example).inputs


def test_columns_of_an_example_name_those_of_the_input() -> None:
    source = from_onnx(models.linear(2), pa.table({"km": [1.0, 2.0], "kg": [1.0, None]}))
    assert source.inputs == (TensorSpec("x", "FP32", (2,), columns=("km", "kg"), allow_nan=True),)


@pytest.mark.parametrize(
    ("kind", "datatype", "value"),
    [
        (HALF, "FP16", 0.5), (FLOAT, "FP32", 0.5), (DOUBLE, "FP64", 0.5), (BOOL, "BOOL", True), (STRING, "BYTES", "é"),
        (INT64, "INT64", -5), (INT32, "INT32", -5), (TensorProto.INT16, "INT16", -5), (TensorProto.INT8, "INT8", -5),
        (TensorProto.UINT64, "UINT64", 5), (TensorProto.UINT32, "UINT32", 5), (TensorProto.UINT16, "UINT16", 5),
        (TensorProto.UINT8, "UINT8", 5),
    ],
)  # fmt: skip
def test_every_datatype_of_the_protocol_goes_in_and_out(kind: int, datatype: str, value: object) -> None:
    shape = ("N", 2)
    model = models.model(
        [helper.make_node("Identity", ["a"], ["b"])], [tensor("a", kind, shape)], [tensor("b", kind, shape)]
    )
    example = np.empty((3, 2), dtype=object)
    example[:] = value
    source = from_onnx(model, {"a": example})
    assert (source.inputs[0].datatype, source.outputs[0].datatype) == (datatype, datatype)
    assert source.predict(source.example)["b"].tolist() == [[value, value]] * 3


def test_several_inputs_and_outputs_keep_their_names_and_shapes() -> None:
    model = models.model(
        [helper.make_node("Mul", ["a", "b"], ["c"]), helper.make_node("Not", ["flag"], ["off"])],
        [tensor("a", FLOAT, ("N", 2, 3)), tensor("b", FLOAT, ("N", 1, 1)), tensor("flag", BOOL, ("N",))],
        [tensor("c", FLOAT, ("N", 2, 3)), tensor("off", BOOL, ("N",))],
    )
    example = {"a": np.ones((4, 2, 3)), "b": np.ones((4, 1, 1)), "flag": np.zeros(4, dtype=bool)}
    source = from_onnx(model, example)
    assert [spec.shape for spec in source.inputs] == [(2, 3), (1, 1), ()]
    assert [(spec.name, spec.shape) for spec in source.outputs] == [("c", (2, 3)), ("off", ())]
    assert source.batch_dimension == "any"


@pytest.mark.parametrize(
    ("first", "found", "row"),
    [("N", "any", (4,)), (None, "any", (4,)), (1, "one", (4,)), (3, "none", (3, 4))],
)
def test_the_batch_dimension_is_read_from_the_first_axis(
    first: Any, found: str, row: tuple[int, ...]
) -> None:
    model = models.model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [tensor("x", FLOAT, (first, 4))],
        [tensor("y", FLOAT, (first, 4))],
    )
    source = from_onnx(model, np.ones((5, *row)))
    assert source.batch_dimension == found
    assert source.inputs[0].shape == source.outputs[0].shape == row
    assert source.predict(source.example)["y"].shape == (5, *row)


def test_a_free_batch_that_is_fixed_inside_is_found_by_running_it() -> None:
    model = models.model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [tensor("x", FLOAT, ("N", 4))],
        [tensor("y", FLOAT, ("M", 2))],
        {"shape": np.array([2, 2], dtype=np.int64)},
    )
    with pytest.raises(PackRefused, match="the model fails on the example"):
        from_onnx(model, np.ones((3, 4)), batch="any")
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.array([1, 4], dtype=np.int64), "shape")
    )
    source = from_onnx(model, np.ones((3, 4)))
    assert source.batch_dimension == "one"
    assert source.predict(source.example)["y"].shape == (3, 4)


def test_the_caller_may_overrule_the_batch_dimension() -> None:
    source = from_onnx(models.linear(4), np.ones((5, 3, 4)), batch="none")
    assert source.batch_dimension == "none"
    assert source.inputs[0].shape == (-1, 4)
    assert source.outputs[0].shape == (-1, 2)
    assert from_onnx(models.linear(4), np.ones((5, 4)), batch="one").batch_dimension == "one"


def test_open_sizes_stay_open_and_sizes_left_unsaid_are_found_by_running() -> None:
    shape = ("N", "T", 2)
    series = models.model(
        [helper.make_node("Relu", ["x"], ["y"])], [tensor("x", FLOAT, shape)], [tensor("y", FLOAT, shape)]
    )
    assert from_onnx(series, np.ones((2, 7, 2))).outputs[0].shape == (-1, 2)
    unsaid = models.model(
        [helper.make_node("Relu", ["x"], ["y"])], [tensor("x", FLOAT, ("N", 3))], [tensor("y", FLOAT, None)]
    )
    assert from_onnx(unsaid, np.ones((2, 3))).outputs[0].shape == (3,)


@pytest.mark.parametrize("texts", [False, True])
def test_a_zipmap_gives_way_to_its_tensor_with_the_classes_as_labels(texts: bool) -> None:
    model = models.linear_classifier(5, zipmap=True, texts=texts)
    example = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    source = from_onnx(model, example)
    spec = source.outputs[1]
    assert (spec.name, spec.datatype, spec.shape) == ("probability", "FP32", (3,))
    assert spec.labels == (("a", "b", "c") if texts else ("0", "1", "2"))
    packed = onnx.load_model_from_string(source.files["model.onnx"])
    assert "ZipMap" not in {node.op_type for node in packed.graph.node}
    # What the maps of the original say, position by position.
    expected = source.predict(source.example)["probability"]
    assert run(dict(source.files), {"x": example})["probability"].tobytes() == expected.tobytes()
    assert from_onnx(model, example).files == source.files


def test_a_zipmap_that_others_read_is_refused_with_the_remedy() -> None:
    model = models.linear_classifier(5, zipmap=True)
    model.graph.node.append(helper.make_node("SequenceAt", ["probability", "zero"], ["first"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    with pytest.raises(NotConvertible, match="gives maps, which no tensor holds") as caught:
        from_onnx(model, np.ones((2, 5)))
    assert caught.value.hint == "convert with zipmap=False"


def test_weights_among_the_inputs_are_dropped_there() -> None:
    model = models.linear(4)
    for weight in model.graph.initializer:
        model.graph.input.append(tensor(weight.name, FLOAT, tuple(weight.dims)))
    model.ir_version = 3
    source = from_onnx(model, np.ones((2, 4)))
    assert [spec.name for spec in source.inputs] == ["x"]
    packed = onnx.load_model_from_string(source.files["model.onnx"])
    assert [item.name for item in packed.graph.input] == ["x"]
    assert run(dict(source.files), {"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 2)


def external(path: Path, location: str = "weights.bin") -> ModelProto:
    """A saved model whose weights lie in another file."""
    model = models.linear(64)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return onnx.load(path, load_external_data=False)


def test_external_data_is_taken_into_the_file(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx")
    source = from_onnx(tmp_path / "m.onnx", np.ones((2, 64)))
    assert list(source.files) == ["model.onnx"]
    (tmp_path / "weights.bin").unlink()
    expected = source.predict(source.example)["y"]
    assert run(dict(source.files), {"x": np.ones((2, 64), np.float32)})["y"].tobytes() == expected.tobytes()


def test_large_external_data_stays_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parbake.contract.sources.onnx._INLINE_BYTES", 100)
    external(tmp_path / "m.onnx")
    source = from_onnx(tmp_path / "m.onnx", np.ones((2, 64)))
    assert set(source.files) == {"model.onnx", "weights.bin"}
    assert source.files["weights.bin"] == (tmp_path / "weights.bin").read_bytes()


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret"])
def test_external_data_outside_of_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_bytes(bytes(100_000))
    model = external(tmp_path / "m" / "m.onnx")
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    (tmp_path / "m" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NotConvertible, match="lies outside of the model's folder"):
        from_onnx(tmp_path / "m" / "m.onnx", np.ones((2, 64)))


def test_external_data_that_is_missing_or_out_of_reach_is_named(tmp_path: Path) -> None:
    model = external(tmp_path / "m.onnx")
    with pytest.raises(NotConvertible, match="keeps its weights in other files"):
        from_onnx(model, np.ones((2, 64)))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(NotConvertible, match=r"weights\.bin is missing"):
        from_onnx(tmp_path / "m.onnx", np.ones((2, 64)))


def test_types_that_no_tensor_has_are_refused_by_name() -> None:
    cast = models.model(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)],
        [tensor("x", FLOAT, ("N", 2))],
        [tensor("y", TensorProto.BFLOAT16, ("N", 2))],
    )
    with pytest.raises(NotConvertible, match=r"output 'y' is a tensor\(bfloat16\)"):
        from_onnx(cast, np.ones((2, 2)))
    sequence = models.model(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [tensor("x", FLOAT, ("N", 2))],
        [
            helper.make_value_info(
                "y", helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, ["N", 2]))
            )
        ],
    )
    with pytest.raises(NotConvertible, match=r"output 'y' is a seq\(tensor\(float\)\)"):
        from_onnx(sequence, np.ones((2, 2)))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07", bytes(1000)])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(NotConvertible, match=r"m\.onnx is not an ONNX model"):
        from_onnx(tmp_path / "m.onnx", np.ones((2, 2)))


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    content = models.linear(64).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(PackRefused):
        from_onnx(tmp_path / "m.onnx", np.ones((2, 64)))


def test_a_graph_that_does_not_check_is_refused_with_what_is_wrong() -> None:
    model = models.linear(4)
    model.graph.node[0].input[1] = "nothing"
    with pytest.raises(NotConvertible, match=r"does not pass onnx\.checker: .*nothing"):
        from_onnx(model, np.ones((2, 4)))


def test_an_operator_that_onnxruntime_lacks_is_refused_with_what_it_says() -> None:
    node = helper.make_node("Teleport", ["x"], ["y"], domain="com.example")
    model = models.model([node], [tensor("x", FLOAT, ("N", 2))], [tensor("y", FLOAT, ("N", 2))])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(NotConvertible, match=r"onnxruntime .* cannot load the model: .*Teleport"):
        from_onnx(model, np.ones((2, 2)))


def test_a_model_that_fails_on_the_example_is_refused_with_what_it_says() -> None:
    model = models.model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [tensor("x", INT64, ("N",))],
        [tensor("y", FLOAT, ("N",))],
        {"table": np.zeros(3, dtype=np.float32)},
    )
    with pytest.raises(
        PackRefused, match=r"the model fails on the example: .*indices element out of data bounds"
    ):
        from_onnx(model, np.array([0, 99]))


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PackRefused, match="the example does not fit the model: expected rows of shape"):
        from_onnx(models.linear(4), np.ones((2, 5)))
