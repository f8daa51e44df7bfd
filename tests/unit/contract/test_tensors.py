"""Tensors as raw bytes: what goes in comes out, and bytes that lie are a ValueError and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parbake.contract.datatypes import NUMPY, datatype_of
from parbake.contract.tensors import as_text, from_raw, row_slices, split_bytes, to_raw

NUMBERS = sorted(set(NUMPY) - {"BYTES"})
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)


def texts(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Object arrays of bytes."""
    count = math.prod(shape)
    return st.lists(st.binary(max_size=9), min_size=count, max_size=count).map(
        lambda items: _objects(items).reshape(shape)
    )


@given(st.data(), st.sampled_from(NUMBERS), SHAPES)
def test_numbers_come_back_bit_for_bit(data: st.DataObject, datatype: str, shape: tuple[int, ...]) -> None:
    array = data.draw(hnp.arrays(NUMPY[datatype], shape))
    raw = to_raw(array, datatype)
    back = from_raw(raw, datatype, shape)
    assert back.dtype == NUMPY[datatype]
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()
    assert datatype_of(back) == datatype


@given(st.data(), SHAPES)
def test_strings_come_back(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = data.draw(texts(shape))
    back = from_raw(to_raw(array, "BYTES"), "BYTES", shape)
    assert back.shape == shape
    assert back.reshape(-1).tolist() == array.reshape(-1).tolist()


@given(st.lists(st.text(max_size=5), max_size=6))
def test_text_is_utf8_on_the_wire_and_text_again_for_the_model(words: list[str]) -> None:
    raw = to_raw(_objects(words), "BYTES")
    assert as_text(from_raw(raw, "BYTES", (len(words),))).tolist() == words


@given(st.binary(max_size=60), st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 4), max_size=3))
def test_bytes_that_do_not_fit_are_a_value_error(raw: bytes, datatype: str, shape: list[int]) -> None:
    try:
        array = from_raw(raw, datatype, shape)
    except ValueError:
        return
    assert array.shape == tuple(shape)
    assert datatype == "BOOL" or to_raw(array, datatype) == raw


@given(st.data(), st.sampled_from(sorted(NUMPY)), st.integers(1, 5), st.integers(0, 3))
def test_the_rows_of_a_tensor_joined_are_the_tensor(
    data: st.DataObject, datatype: str, rows: int, elements: int
) -> None:
    shape = (rows, elements)
    array = data.draw(texts(shape) if datatype == "BYTES" else hnp.arrays(NUMPY[datatype], shape))
    raw = to_raw(array, datatype)
    parts = row_slices(raw, datatype, rows, elements)
    assert len(parts) == rows
    assert b"".join(parts) == raw
    assert parts == [to_raw(array[i : i + 1], datatype) for i in range(rows)]


@pytest.mark.parametrize(
    ("raw", "count", "message"),
    [
        (b"\x01\x00\x00", 1, "BYTES element 0 is cut short: no room for its length"),
        (b"\x05\x00\x00\x00ab", 1, "BYTES element 0 claims 5 bytes, 2 are left"),
        (b"\xff\xff\xff\xffab", 1, "BYTES element 0 claims 4294967295 bytes, 2 are left"),
        (b"\x00\x00\x00\x00", 2, "the shape takes 2 BYTES elements, got 1"),
        (b"\x00\x00\x00\x00\x00", 1, "1 bytes left over after 1 BYTES elements"),
    ],
)
def test_what_lies_about_lengths_is_named(raw: bytes, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_bytes(raw, count)


def test_a_dtype_without_a_word_in_the_protocol_is_refused() -> None:
    for dtype in ("complex128", "datetime64[s]"):
        with pytest.raises(ValueError, match="no tensor datatype"):
            datatype_of(np.zeros(1, dtype=dtype))


def _objects(items: list[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
