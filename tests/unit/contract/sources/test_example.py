"""What a user has becomes tensors, and tensors become what the model was trained on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from parbake.contract.model import TensorSpec
from parbake.contract.sources.example import layout, read, rows_for
from parbake.errors import PackRefused

pd = pytest.importorskip("pandas")


def test_an_array_is_one_input_x_of_its_own_datatype() -> None:
    specs, tensors, kind = layout(np.zeros((3, 2), dtype=np.float32))
    assert kind == "array"
    assert specs == (TensorSpec("x", "FP32", (2,)),)
    assert tensors["x"].shape == (3, 2)


def test_a_frame_of_numbers_of_one_kind_is_one_input_with_named_columns() -> None:
    specs, tensors, kind = layout(pd.DataFrame({"a": [1, 2], "b": np.array([3, 4], dtype=np.int16)}))
    assert kind == "matrix"
    assert specs == (TensorSpec("x", "INT64", (2,), columns=("a", "b")),)
    assert tensors["x"].tolist() == [[1, 3], [2, 4]]


def test_a_frame_of_several_kinds_is_one_input_per_column_and_comes_back() -> None:
    frame = pd.DataFrame({"age": [30, 40], "city": ["x", "y"], "rich": [True, False], "size": [1.5, np.nan]})
    example = read(frame)
    assert example.kind == "columns"
    assert [(s.name, s.datatype, s.shape, s.allow_nan) for s in example.specs] == [
        ("age", "INT64", (1,), False),
        ("city", "BYTES", (1,), False),
        ("rich", "BOOL", (1,), False),
        ("size", "FP64", (1,), True),
    ]
    back = example.frame(example.tensors)
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    assert back["age"].dtype == np.int64


def test_missing_strings_are_empty_in_tensors_and_missing_again_in_the_frame() -> None:
    example = read(pd.DataFrame({"city": ["x", np.nan], "n": [1, 2]}))
    assert example.tensors["city"].tolist() == [["x"], [""]]
    assert example.frame(example.tensors)["city"].isna().tolist() == [False, True]


def test_missing_and_empty_strings_in_one_column_are_refused() -> None:
    with pytest.raises(PackRefused, match="'city' has both empty and missing strings"):
        read(pd.DataFrame({"city": ["", np.nan], "n": [1, 2]}))


def test_integers_with_gaps_become_doubles_with_nan() -> None:
    example = read(pd.DataFrame({"n": pd.array([1, None], dtype="Int64"), "s": ["a", "b"]}))
    assert example.specs[0] == TensorSpec("n", "FP64", (1,), allow_nan=True)
    assert np.isnan(example.tensors["n"][1, 0])


def test_times_are_refused_with_what_to_do() -> None:
    with pytest.raises(PackRefused, match="'t' holds times") as caught:
        read(pd.DataFrame({"t": pd.to_datetime(["2024-01-01"])}))
    assert "give seconds" in caught.value.hint


def test_an_arrow_table_reads_as_the_same_frame_does() -> None:
    table = pa.table({"n": [1, 2], "s": ["a", None], "f": [True, False]})
    frame = pd.DataFrame({"n": [1, 2], "s": ["a", None], "f": [True, False]})
    ours, theirs = read(table), read(frame)
    assert ours.specs == theirs.specs
    assert all(ours.tensors[name].tolist() == theirs.tensors[name].tolist() for name in theirs.tensors)


def test_a_mapping_is_one_input_per_array() -> None:
    specs, tensors, kind = layout({"x": np.zeros((2, 3)), "name": np.array(["a", "b"])})
    assert kind == "tensors"
    assert specs == (TensorSpec("x", "FP64", (3,)), TensorSpec("name", "BYTES"))
    assert tensors["name"].dtype == object


def test_arrays_of_different_lengths_are_refused_by_name() -> None:
    with pytest.raises(PackRefused, match="a has 2, b has 3"):
        read({"a": np.zeros(2), "b": np.zeros(3)})


def test_columns_are_put_in_the_order_of_training_and_others_left_out() -> None:
    rows = rows_for(read(pd.DataFrame({"extra": [0.0], "b": [2.0], "a": [1.0]})), ["a", "b"])
    assert rows.example.specs[0].columns == ("a", "b")
    assert rows(rows.example.tensors).to_dict("list") == {"a": [1.0], "b": [2.0]}


def test_a_missing_column_is_named() -> None:
    with pytest.raises(PackRefused, match="the example lacks 'b', which the model was trained on"):
        rows_for(read(pd.DataFrame({"a": [1.0], "c": [2.0]})), ["a", "b"])


def test_a_nameless_array_gets_the_names_of_training() -> None:
    rows = rows_for(read(np.ones((1, 2))), ["a", "b"])
    assert rows.example.specs[0].columns == ("a", "b")
    assert list(rows(rows.example.tensors).columns) == ["a", "b"]
