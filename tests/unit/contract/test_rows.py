"""Rows as people have them: every form gives the same tensors, and what does not fit is named by its path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.model import TensorSpec
from parbake.contract.rows import as_inputs, gappy_texts, to_tensors
from parbake.errors import InvalidInput, PackRefused

MATRIX = (TensorSpec("x", "FP32", (2,), columns=("km", "kg")),)
COLUMNS = (
    TensorSpec("age", "FP64", (1,), allow_nan=True),
    TensorSpec("city", "BYTES"),
    TensorSpec("kids", "INT8"),
)
IMAGE = (TensorSpec("image", "UINT8", (2, 2)),)
FLAG = (TensorSpec("vip", "BOOL"),)


def pandas(content: dict[str, Any]) -> Any:
    """A DataFrame."""
    return pytest.importorskip("pandas").DataFrame(content)


MATRIX_FORMS = [
    np.array([[1.5, 2.0], [3.0, 4.0]]),
    [[1.5, 2], [3, 4]],
    {"x": np.array([[1.5, 2.0], [3.0, 4.0]], dtype=np.float32)},
    {"km": [1.5, 3], "kg": np.array([2, 4])},
    [{"km": 1.5, "kg": 2}, {"kg": 4, "km": 3}],
    pa.table({"kg": [2, 4], "km": [1.5, 3.0]}),
    pa.record_batch({"km": [1.5, 3.0], "kg": [2, 4]}),
]


@pytest.mark.parametrize("rows", MATRIX_FORMS, ids=lambda rows: type(rows).__name__)
def test_every_form_of_a_matrix_gives_the_same_tensor(rows: object) -> None:
    tensors, count = to_tensors(rows, MATRIX)
    assert count == 2
    assert tensors["x"].dtype == np.float32
    assert tensors["x"].tolist() == [[1.5, 2.0], [3.0, 4.0]]


def test_a_frame_gives_the_same_tensor() -> None:
    tensors, _ = to_tensors(pandas({"km": [1.5, 3.0], "kg": [2, 4]}), MATRIX)
    assert tensors["x"].tolist() == [[1.5, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    "rows",
    [
        {"age": [30.5, None], "city": ["rome", "oslo"], "kids": [1, 2]},
        [{"age": 30.5, "city": "rome", "kids": 1}, {"age": None, "city": "oslo", "kids": 2}],
        pa.table({"age": [30.5, None], "city": ["rome", "oslo"], "kids": [1, 2]}),
    ],
    ids=["dict", "list", "table"],
)
def test_columns_of_several_types_and_missing_numbers(rows: object) -> None:
    tensors, count = to_tensors(rows, COLUMNS)
    assert count == 2
    assert tensors["age"].shape == (2, 1)
    assert tensors["age"][0, 0] == 30.5
    assert np.isnan(tensors["age"][1, 0])
    assert tensors["city"].tolist() == ["rome", "oslo"]
    assert tensors["kids"].dtype == np.int8


def test_single_values_are_one_row() -> None:
    tensors, count = to_tensors({"age": 1, "city": "rome", "kids": np.int64(3)}, COLUMNS)
    assert count == 1
    assert (tensors["age"].tolist(), tensors["kids"].tolist()) == ([[1.0]], [3])


def test_rows_of_arrays_by_name() -> None:
    tensors, count = to_tensors([{"image": [[1, 2], [3, 4]]}, {"image": np.zeros((2, 2), int)}], IMAGE)
    assert count == 2
    assert tensors["image"].tolist() == [[[1, 2], [3, 4]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("rows", [np.zeros((0, 2)), [], {"x": np.zeros((0, 2))}, {"km": [], "kg": []}])
def test_no_rows_are_no_rows(rows: object) -> None:
    tensors, count = to_tensors(rows, MATRIX)
    assert count == 0
    assert tensors["x"].shape == (0, 2)


def test_a_whole_number_beyond_the_doubles_is_rounded_as_json_is() -> None:
    # 2**54 + 2**30 + 1 lies just above the middle of two float32; the double nearest to it lies on the middle.
    number = 2**54 + 2**30 + 1
    tensors, _ = to_tensors({"km": np.array([number]), "kg": [number]}, MATRIX)
    assert tensors["x"].tolist() == [[float(np.float32(float(number)))] * 2]


@pytest.mark.parametrize(
    ("rows", "inputs", "message", "path"),
    [
        ([[1.0, "x"]], MATRIX, "expected FP32 for 'x', got \"x\"", "$[0][1]"),
        ({"x": np.array([[1.0, np.nan]])}, MATRIX, "expected FP32 for 'x', got nan", "$.x[0][1]"),
        ([{"km": 1, "kg": 2}, {"km": 1, "kg": None}], MATRIX, "expected FP32 for 'kg', got null", "$[1].kg"),
        ([{"km": True, "kg": 2}], MATRIX, "expected FP32 for 'km', got true", "$[0].km"),
        ({"km": [1e300], "kg": [1]}, MATRIX, "expected FP32 for 'km', got 1e+300", "$.km[0]"),
        ({"km": [1]}, MATRIX, "column 'kg' is missing", "$"),
        ([{"km": 1, "kg": 2}, {"km": 1}], MATRIX, "column 'kg' is missing", "$[1]"),
        ([{"km": 1, "kg": 2}, {"km": 1, "kg": 2, "cm": 3}], MATRIX, "no column 'cm'", "$[1].cm"),
        ({"km": [1], "kg": [2], "cm": [3]}, MATRIX, "no column 'cm'", "$.cm"),
        ([{"km": 1, "kg": 2}, [1, 2]], MATRIX, "expected a row by column name, got [1, 2]", "$[1]"),
        (np.zeros((2, 3)), MATRIX, "expected rows of shape [2] for 'x', got [3]", "$"),
        (np.zeros(2), MATRIX, "expected rows of shape [2] for 'x', got []", "$"),
        (7.0, MATRIX, "expected rows, got 7.0", "$"),
        ("rome", MATRIX, 'expected rows, got "rome"', "$"),
        ([[1, 2], [3]], MATRIX, "the rows differ in length", "$"),
        ({"x": [[1, 2], [3]]}, MATRIX, "the rows differ in length", "$.x"),
        ({"km": [1, 2], "kg": [1]}, MATRIX, "column 'kg' has 1 rows, 'km' has 2", "$.kg"),
        ({"age": [1], "city": [3], "kids": [1]}, COLUMNS, "expected BYTES for 'city', got 3", "$.city[0]"),
        ({"age": [1], "city": [None], "kids": [1]}, COLUMNS, "expected BYTES for 'city', got null", "$.city[0]"),
        ({"age": [1], "city": ["a"], "kids": [1.5]}, COLUMNS, "expected INT8 for 'kids', got 1.5", "$.kids[0]"),
        ({"age": [1], "city": ["a"], "kids": [300]}, COLUMNS, "expected INT8 for 'kids', got 300", "$.kids[0]"),
        (
            {"age": [1], "city": ["a"], "kids": np.array([-200])}, COLUMNS,
            "expected INT8 for 'kids', got -200", "$.kids[0]",
        ),
        (
            {"age": [1], "city": ["a", "b"], "kids": [1]}, COLUMNS,
            "input 'city' has 2 rows, the one before has 1", "$.city",
        ),
        (np.zeros((1, 3, 3)), COLUMNS, "an array of shape [1, 3, 3] cannot be told apart into 3 inputs", "$"),
        ({"vip": [1]}, FLAG, "expected BOOL for 'vip', got 1", "$.vip[0]"),
        ({"vip": np.array([1.0])}, FLAG, "expected BOOL for 'vip', got 1.0", "$.vip[0]"),
        ({"image": np.full((1, 2, 2), 256)}, IMAGE, "expected UINT8 for 'image', got 256", "$.image[0][0][0]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_by_path_and_value(
    rows: object, inputs: tuple[TensorSpec, ...], message: str, path: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        to_tensors(rows, inputs)
    assert caught.value.message.startswith(message)
    assert caught.value.path == path


def test_the_remedy_for_a_missing_value_is_named() -> None:
    with pytest.raises(InvalidInput) as caught:
        to_tensors([{"km": 1.0, "kg": None}], MATRIX)
    assert caught.value.hint == "the contract allows no missing values for it (pack with allow_nan)"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["age", "city", "kids", "x", "vip"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(ANYTHING, st.sampled_from([MATRIX, COLUMNS, IMAGE, FLAG]))
def test_anything_else_is_an_invalid_input(rows: object, inputs: tuple[TensorSpec, ...]) -> None:
    try:
        tensors, count = to_tensors(rows, inputs)
    except InvalidInput:
        return
    assert {len(array) for array in tensors.values()} <= {count}


def test_an_example_names_the_columns_of_a_matrix_and_says_what_may_be_missing() -> None:
    plain = (TensorSpec("x", "FP32", (2,)),)
    specs, tensors = as_inputs(pa.table({"a": [1.0, None], "b": [2, 3]}), plain)
    assert specs == (TensorSpec("x", "FP32", (2,), columns=("a", "b"), allow_nan=True),)
    assert tensors["x"].shape == (2, 2)
    specs, _ = as_inputs({"x": np.zeros((3, 2))}, plain)
    assert specs == plain


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (np.zeros((0, 2)), "the example has no rows"),
        (np.zeros((1, 5)), "the example does not fit the model: expected rows of shape"),
        ({"y": np.zeros((1, 2))}, "the example does not fit the model: no column 'y'"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example: object, message: str) -> None:
    with pytest.raises(PackRefused) as caught:
        as_inputs(example, (TensorSpec("x", "FP32", (2,)), TensorSpec("z", "FP32"))[:1])
    assert caught.value.message.startswith(message)


def test_text_columns_with_gaps_are_found() -> None:
    table = pa.table({"a": ["x", None], "b": ["x", "y"], "c": [1, None]})
    assert gappy_texts(table) == {"a"}
    assert gappy_texts({"a": ["x", None]}) == frozenset()
