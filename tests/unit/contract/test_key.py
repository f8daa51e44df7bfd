"""Keys of rows: the same for the same values however they came, different for different ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parbake.contract.key import KEY_BYTES, Keys
from parbake.contract.model import Contract, Key, Step, TensorSpec
from parbake.contract.tensors import Tensor, to_raw
from parbake.errors import PackRefused

MATRIX = TensorSpec("x", "FP32", (3,), columns=("store", "hour", "promo"))
CITY = TensorSpec("city", "BYTES", (1,))
OPEN = TensorSpec("series", "FP32", (-1,))


def keys(*inputs: TensorSpec, columns: tuple[str, ...] = ()) -> Keys:
    """Keys of a model with these inputs."""
    return Keys(Contract("m", inputs, (), (Step("onnx", "model.onnx"),), "p", "o", key=Key(columns)))


def raw(spec: TensorSpec, array: Tensor) -> bytes:
    """The raw bytes of an input."""
    return to_raw(array, spec.datatype)


@given(st.lists(st.tuples(st.floats(width=32), st.text(max_size=4)), min_size=1, max_size=8))
def test_a_row_has_one_key_alone_and_in_company(rows: list[tuple[float, str]]) -> None:
    matrix = np.array([[x, 1.0, 2.0] for x, _ in rows], dtype=np.float32)
    cities = np.array([[city] for _, city in rows], dtype=object)
    codec = keys(MATRIX, CITY)
    together = codec.of([raw(MATRIX, matrix), raw(CITY, cities)], len(rows))
    alone = [
        codec.of([raw(MATRIX, matrix[i : i + 1]), raw(CITY, cities[i : i + 1])], 1)[0]
        for i in range(len(rows))
    ]
    assert together == alone
    assert all(len(key) == KEY_BYTES for key in together)
    distinct = {(matrix[i].tobytes(), rows[i][1]) for i in range(len(rows))}
    assert len(set(together)) == len(distinct)


@given(
    st.sampled_from([("FP16", "<u2", 10, 5), ("FP32", "<u4", 23, 8), ("FP64", "<u8", 52, 11)]),
    st.integers(1, 4),
    st.data(),
)
def test_every_nan_has_the_key_of_the_usual_one(
    layout: tuple[Any, str, int, int], rows: int, data: st.DataObject
) -> None:
    datatype, integer, fraction, exponent = layout
    spec = TensorSpec("x", datatype, (2,), columns=("a", "b"), allow_nan=True)
    odd = data.draw(st.integers(1, (1 << fraction) - 1)) | ((1 << exponent) - 1) << fraction
    if data.draw(st.booleans()):
        odd |= 1 << (fraction + exponent)
    values = np.full((rows, 2), 1.5, np.dtype(integer.replace("u", "f")))
    at = data.draw(st.integers(0, rows - 1))
    values[at, 0] = np.nan
    strange = values.copy()
    strange.view(integer)[at, 0] = odd
    assert np.isnan(strange[at, 0])
    for codec in (keys(spec), keys(spec, CITY), keys(spec, columns=("a",)), keys(spec, CITY, columns=("a",))):
        city = np.array([["rome"]] * rows, dtype=object)
        usual, unusual = (
            codec.of([raw(spec, array), raw(CITY, city)][: len(codec.inputs)], rows)
            for array in (values, strange)
        )
        assert usual == unusual
        assert codec.of_tensors([strange, city], rows) == b"".join(usual)
        if rows > 1:
            assert usual[at] != usual[at - 1]


def test_an_entity_key_looks_at_its_columns_only() -> None:
    codec = keys(MATRIX, CITY, columns=("promo", "city"))
    matrix = np.array([[1, 2, 3], [9, 9, 3], [1, 2, 4]], dtype=np.float32)
    cities = np.array([["rome"], ["rome"], ["rome"]], dtype=object)
    first, second, third = codec.of([raw(MATRIX, matrix), raw(CITY, cities)], 3)
    assert first == second != third
    assert codec.inputs == (0, 1)
    assert keys(MATRIX, CITY, columns=("city",)).inputs == (1,)


def test_strings_are_not_run_together() -> None:
    pair = TensorSpec("pair", "BYTES", (2,))
    first, second = keys(pair).of([raw(pair, np.array([["ab", "c"], ["a", "bc"]], dtype=object))], 2)
    assert first != second


def test_shapes_that_hold_the_same_bytes_have_other_keys() -> None:
    codec = keys(TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "FP32", (-1,)))
    zeros = np.zeros(3, dtype=np.float32).tobytes()
    assert codec.of([zeros[:4], zeros[:8]], 1, [(1,), (2,)]) != codec.of(
        [zeros[:8], zeros[:4]], 1, [(2,), (1,)]
    )


def test_a_key_column_that_is_no_input_is_refused_by_name() -> None:
    with pytest.raises(PackRefused, match="key column 'shop' is not an input") as caught:
        keys(MATRIX, CITY, columns=("shop",))
    assert caught.value.hint == "inputs are store, hour, promo, city"
